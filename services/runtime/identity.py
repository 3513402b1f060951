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

    def fits(self, wanted: Identity | Role) -> bool:
        """Whether it is this one, or one of this role."""
        return self == wanted if isinstance(wanted, Identity) else self.role is wanted


def identity_from_uri(uri: str) -> Identity:
    """The identity that a URI names.

    Raises:
        ValueError: it names none.
    """
    role, _, name = uri.removeprefix(_SCHEME).partition("/")
    if not uri.startswith(_SCHEME) or not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(f"{uri!r} is not {_SCHEME}ROLE/NAME")
    return Identity(Role(role), name)


def described(wanted: Identity | Role) -> str:
    """In words: an identity, or any of a role."""
    return str(wanted) if isinstance(wanted, Identity) else f"role {wanted}"


def identity_in(pem: bytes) -> Identity:
    """The identity in a certificate.

    Raises:
        ValueError: it has none, or several.
    """
    identity, _expiry = _shown(pem)
    if identity is None:
        raise ValueError(f"the certificate names nobody: it needs one {_SCHEME}ROLE/NAME as URI")
    return identity


def caller(context: _Context) -> Identity | None:
    """Who calls; None at a server without TLS.

    Raises:
        Refusal: PERMISSION_DENIED where the certificate names nobody, UNAUTHENTICATED where it has expired since the
            connection was made.
    """
    pem = _certificate(context)
    if pem is None:
        return None
    try:
        identity = identity_in(pem)
    except ValueError as error:
        raise denied(str(error)) from None
    if _shown(pem)[1] <= time.time():
        raise expired()
    return identity


def seconds_until_expiry(context: _Context) -> float | None:
    """How long the certificate of who calls is still valid; None at a server without TLS."""
    pem = _certificate(context)
    return None if pem is None else _shown(pem)[1] - time.time()


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


def expired() -> Refusal:
    """The certificate of who calls was valid when the connection was made, and is not any more."""
    return Refusal(grpc.StatusCode.UNAUTHENTICATED, "the certificate has expired; renew it and connect again")


def _certificate(context: _Context) -> bytes | None:
    """As who calls has shown it, in PEM, empty for none; None at a server without TLS."""
    connection = context.auth_context()
    if next(iter(connection.get("transport_security_type", ())), None) == b"insecure":
        return None
    return next(iter(connection.get("x509_pem_cert", ())), b"")


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
