"""Who a server is: gRPC checks the authority and the host name of its certificate only, and shows it to nobody.

So a caller first makes a TLS connection of its own, looks at the certificate, and then has gRPC believe that very
certificate instead of the authority. gRPC connects to nobody else with it.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import replace
from pathlib import Path

import grpc

from feddymem.client.tls import CERTIFICATE, KEY, TlsError, TlsFiles, credentials, read_tls
from services.runtime.identity import Identity, Role, described, identity_in

HANDSHAKE_RETRY_SECONDS = 0.5
"""Pause before the next attempt to see the certificate of a server that is not there."""


class UnreachableError(Exception):
    """Another service cannot be reached; trying again may help."""


async def credentials_for(address: str, folder: Path, role: Role, seconds: float) -> grpc.ChannelCredentials:
    """Credentials for the server at an address, if it is the one that is wanted.

    Args:
        address: HOST:PORT.
        folder: of the caller's TLS files.
        role: that the server must have; a site must be the caller's own.
        seconds: how long to try.

    Raises:
        UnreachableError: it shows no certificate in that time that the caller believes, or is somebody else.
        TlsError: the caller's files cannot be used.
    """
    files = read_tls(folder)
    certificate = await _certificate_of(address, _context(folder, files), seconds)
    try:
        identity = identity_in(certificate)
        wanted = Identity(role, identity_in(files.certificate).name) if role is Role.SITE else role
    except ValueError as error:
        raise UnreachableError(f"{address}: {error}") from None
    if not identity.fits(wanted):
        raise UnreachableError(f"{address} shows the certificate of {identity}; expected that of {described(wanted)}")
    return credentials(replace(files, authority=certificate))


async def _certificate_of(address: str, context: ssl.SSLContext, seconds: float) -> bytes:
    """The certificate that a server shows, in PEM; checked by authority, host name and time."""
    host, _, port = address.rpartition(":")
    reason = "it does not answer"
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    return await _shake_hands(host.strip("[]"), int(port), context)
                except (OSError, UnicodeError) as error:  # TLS errors are OSErrors; no host name is the other
                    reason = str(error)
                await asyncio.sleep(HANDSHAKE_RETRY_SECONDS)
    except TimeoutError:
        raise UnreachableError(f"{address} cannot be reached within {seconds:g} seconds: {reason}") from None


async def _shake_hands(host: str, port: int, context: ssl.SSLContext) -> bytes:
    _reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=host)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return ssl.DER_cert_to_PEM_cert(shown).encode()


def _context(folder: Path, files: TlsFiles) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cadata=files.authority.decode())
        context.load_cert_chain(folder / CERTIFICATE, folder / KEY, password="")  # else it would ask for one
    except (ValueError, OSError) as error:
        raise TlsError(f"the TLS files in {folder} cannot be used: {error}") from error
    context.set_alpn_protocols(["h2"])
    return context
