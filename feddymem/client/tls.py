"""A TLS identity: a folder of three files, named as Kubernetes and cert-manager name them in a secret."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

CERTIFICATE, KEY, AUTHORITY = "tls.crt", "tls.key", "ca.crt"


class TlsError(ValueError):
    """A TLS identity that cannot be used; the text names the file."""


@dataclass(frozen=True)
class TlsFiles:
    """What a process shows others, and whom it believes; all in PEM.

    Attributes:
        certificate: its certificate, and those between it and the authority.
        key: the certificate's private key.
        authority: the certificate of the authority that must have issued those of others.
    """

    certificate: bytes
    key: bytes
    authority: bytes


def read_tls(folder: Path) -> TlsFiles:
    """The files of a folder, as they are now.

    Raises:
        TlsError: one of them is missing or cannot be read.
    """
    return TlsFiles(*(_read(folder / name) for name in (CERTIFICATE, KEY, AUTHORITY)))


def channel_to(server: str, options: list[tuple[str, Any]], tls_dir: Path | None) -> grpc.Channel:
    """A channel for programs without asyncio, with mutual TLS where there is a folder for it.

    Raises:
        TlsError: see `read_tls`.
    """
    if tls_dir is None:
        return grpc.insecure_channel(server, options=options)
    return grpc.secure_channel(server, credentials(read_tls(tls_dir)), options=options)


def async_channel_to(server: str, options: list[tuple[str, Any]], tls_dir: Path | None) -> aio.Channel:
    """`channel_to` for asyncio."""
    if tls_dir is None:
        return aio.insecure_channel(server, options=options)
    return aio.secure_channel(server, credentials(read_tls(tls_dir)), options=options)


def credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """What a channel needs to show these files' certificate and to believe their authority."""
    return grpc.ssl_channel_credentials(files.authority, files.key, files.certificate)


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TlsError(
            f"TLS file {path} cannot be read ({error.strerror}); the folder needs {CERTIFICATE}, {KEY} and {AUTHORITY}"
        ) from error
    if b"-----BEGIN" not in content:  # gRPC would end the whole process for an empty one
        raise TlsError(f"TLS file {path} is not PEM, or is being written just now")
    return content
