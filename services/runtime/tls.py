"""TLS of a server: both ends show certificates, and renewed ones count without a restart."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from prometheus_client import Gauge

from feddymem.client.tls import CERTIFICATE, TlsError, TlsFiles, read_tls
from services.runtime.identity import Identity, Role, described, identity_in
from services.runtime.logs import get_logger

EXPIRY = Gauge("feddymem_certificate_expiry_timestamp_seconds", "When the certificate in use expires.")

_log = get_logger()


def server_credentials(folder: Path, own: Identity | Role) -> grpc.ServerCredentials:
    """Credentials of a server that speaks only to who shows a certificate of the same authority.

    The files are read again for each new connection. Where they are not a pair, as in the moment in which they are
    replaced, the server goes on with those it has.

    Args:
        folder: of the TLS files.
        own: who the server is, as the certificate must say.

    Raises:
        TlsError: the files cannot be used.
    """
    used = _checked(read_tls(folder), own)

    def renewed() -> Any:  # noqa: ANN401 - None for no change, which grpc's stubs leave out
        nonlocal used
        try:
            files = read_tls(folder)
            if files == used:
                return None
            used = _checked(files, own)
        except TlsError as error:
            _log.error("certificate_not_renewed", folder=str(folder), reason=str(error))
            return None
        _log.info("certificate_renewed", folder=str(folder))
        return _configuration(used)

    return grpc.dynamic_ssl_server_credentials(_configuration(used), renewed, require_client_authentication=True)


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(files.key, files.certificate)], files.authority)


def _checked(files: TlsFiles, own: Identity | Role) -> TlsFiles:
    try:
        certificate, *_between = x509.load_pem_x509_certificates(files.certificate)
        key = load_pem_private_key(files.key, password=None)
        x509.load_pem_x509_certificates(files.authority)
    except (ValueError, TypeError) as error:  # TypeError: the key is encrypted
        raise TlsError(f"the TLS files are not three PEM files, or the key has a password: {error}") from error
    if key.public_key() != certificate.public_key():
        raise TlsError("the private key is not that of the certificate; issue both again")
    expiry = certificate.not_valid_after_utc
    if expiry.timestamp() <= time.time():
        raise TlsError(f"{CERTIFICATE} has expired on {expiry:%Y-%m-%d %H:%M} UTC; renew it")
    try:
        identity = identity_in(files.certificate)
    except ValueError as error:
        raise TlsError(f"{CERTIFICATE}: {error}") from None
    if not identity.fits(own):
        raise TlsError(f"{CERTIFICATE} is the certificate of {identity}; this service needs that of {described(own)}")
    EXPIRY.set(expiry.timestamp())
    return files
