"""Who calls: the identity in a certificate, and what it may do.

An identity is a URI among the certificate's subject alternative names, `feddymem://ROLE/NAME`. A server without TLS,
which by default only listens on loopback, does not know who calls and trusts whoever reaches it.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

import grpc
from cryptography import x509
from grpc import aio

from feddymem.names import NAME_PATTERN
from services.runtime.errors import Refusal

_SCHEME = "feddymem://"
_Context = aio.ServicerContext[Any, Any]


class Role(StrEnum):
    """What an identity is for, and what its name means."""

    AGGREGATOR = "aggregator"
    """An aggregator, by any name; a server only."""
    SITE = "site"
    """The edge clients of the site of that name."""
    INFERENCE = "inference"
    """The inference services of the site of that name."""
    LINE = "line"
    """Whoever sends images to be inspected, by any name."""
    OPERATOR = "operator"
    """A person who runs federations, by any name."""


@dataclass(frozen=True)
class Identity:
    """Who somebody is.

    Attributes:
        role: what for.
        name: see `Role`.
    """

    role: Role
    name: str

    def __str__(self) -> str:
        return f"{self.role} {self.name!r}"

    @property
    def uri(self) -> str:
        """As it stands in a certificate."""
        return f"{_SCHEME}{self.role}/{self.name}"


def identity_from_uri(uri: str) -> Identity:
    """The identity that a URI names.

    Raises:
        ValueError: it names none.
    """
    role, _, name = uri.removeprefix(_SCHEME).partition("/")
    if not uri.startswith(_SCHEME) or not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(f"{uri!r} is not {_SCHEME}ROLE/NAME")
    return Identity(Role(role), name)


def caller(context: _Context) -> Identity | None:
    """Who calls; None at a server without TLS.

    Raises:
        Refusal: PERMISSION_DENIED where the certificate names nobody, UNAUTHENTICATED where it has expired since the
            connection was made.
    """
    connection = context.auth_context()
    if next(iter(connection.get("transport_security_type", ())), None) == b"insecure":
        return None
    shown = next(iter(connection.get("x509_pem_cert", ())), None)
    identity, expiry = (None, 0) if shown is None else _shown(shown)
    if identity is None:
        raise denied(f"the certificate names nobody: it needs one {_SCHEME}ROLE/NAME as URI")
    if expiry <= time.time():
        raise _unauthenticated("the certificate has expired; renew it and connect again")
    return identity


def require_site(context: _Context, site: str) -> None:
    """Checks that who calls may speak for a site.

    Raises:
        Refusal: PERMISSION_DENIED if not; UNAUTHENTICATED, see `caller`.
    """
    who = caller(context)
    if who is not None and who != Identity(Role.SITE, site):
        raise denied(f"the certificate is that of {who}, which cannot speak for site {site!r}")


def denied(text: str) -> Refusal:
    """Something that who calls may not do."""
    return Refusal(grpc.StatusCode.PERMISSION_DENIED, text)


def _unauthenticated(text: str) -> Refusal:
    return Refusal(grpc.StatusCode.UNAUTHENTICATED, text)


@lru_cache(maxsize=1024)
def _shown(pem: bytes) -> tuple[Identity | None, float]:
    """The identity in a certificate, and when it expires, in seconds since the epoch."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        [uri] = [uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if uri.startswith(_SCHEME)]
        identity = identity_from_uri(uri)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return None, 0
    return identity, certificate.not_valid_after_utc.timestamp()
