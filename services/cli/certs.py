"""`feddymem certs`: an authority, and certificates that it issues, for trials; in production, cert-manager."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import secrets
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from feddymem.client.tls import AUTHORITY, CERTIFICATE, KEY
from services.cli.exit_codes import USAGE
from services.cli.failures import fail
from services.runtime.files import sync_folder, write_atomically
from services.runtime.identity import Identity, Role, identity_from_uri

AUTHORITY_KEY = "ca.key"
_SKEW = datetime.timedelta(minutes=5)
"""Certificates hold from a little before now on, for clocks that are late."""
_HOST_PATTERN = r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_EXAMPLE = "xn--mnchen-3ya.example"

certs = typer.Typer(help="Make certificates for trials.", no_args_is_help=True)
_Folder = Annotated[Path, typer.Argument(help="Folder of the authority: ca.crt and ca.key.")]


@certs.command()
def authority(
    folder: _Folder, days: Annotated[float, typer.Option(help="How long its certificate holds.")] = 3650
) -> None:
    """Make an authority. Keep its key where nobody but you can read it."""
    until = _expiry(days)
    for file in (AUTHORITY_KEY, AUTHORITY):
        if (folder / file).exists():
            fail(f"{folder / file} is there already; what it has issued would be worth nothing any more", USAGE)
    key = ec.generate_private_key(ec.SECP256R1())
    # Whoever believes two authorities, as while one replaces the other, looks for the issuer by its name.
    title = f"FedDyMem authority for trials {secrets.token_hex(4)}"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title)])
    certificate = (
        _builder(name, name, key.public_key(), until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write_key(folder / AUTHORITY_KEY, key)
    write_atomically(folder / AUTHORITY, certificate.public_bytes(Encoding.PEM))


@certs.command()
def issue(
    folder: _Folder,
    role: Annotated[Role, typer.Argument(help="What the certificate is for.")],
    name: Annotated[str, typer.Argument(help="For a site and its inference services the site's name, else any.")],
    host: Annotated[
        list[str] | None, typer.Option(help="Name or IP address that others reach this server by; may be repeated.")
    ] = None,
    days: Annotated[float, typer.Option(help="How long it holds.")] = 90,
    out: Annotated[
        Path | None, typer.Option(help="Folder for tls.crt, tls.key and ca.crt; without it, FOLDER/ROLE-NAME.")
    ] = None,
) -> None:
    """Issue a certificate, or renew it: a service that runs uses the new one for its next connections."""
    until, hosts = _expiry(days), [_host(name) for name in host or []]
    try:
        identity = identity_from_uri(Identity(role, name).uri)
        authority_key = load_pem_private_key((folder / AUTHORITY_KEY).read_bytes(), None)
        authority_pem = (folder / AUTHORITY).read_bytes()
        authorities = x509.load_pem_x509_certificates(authority_pem)
    except (OSError, ValueError) as error:
        fail(f"{error}; `feddymem certs authority {folder}` makes an authority", USAGE)
    assert isinstance(authority_key, ec.EllipticCurvePrivateKey), "as `authority` makes it"
    # While one authority replaces another, the file has the certificates of both.
    own = (each for each in authorities if each.public_key() == authority_key.public_key())
    authority_certificate = next(own, None)
    if authority_certificate is None:
        fail(f"{folder / AUTHORITY} has no certificate of the key in {AUTHORITY_KEY}; put it back", USAGE)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{role} {name}")])
    certificate = (
        _builder(subject, authority_certificate.subject, key.public_key(), until)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri), *hosts]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )
    target = out or folder / f"{role}-{name}"
    target.mkdir(parents=True, exist_ok=True)
    _write_key(target / KEY, key)
    write_atomically(target / CERTIFICATE, certificate.public_bytes(Encoding.PEM))
    write_atomically(target / AUTHORITY, authority_pem)
    typer.echo(f"{target}: {identity.uri}, until {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")


def _expiry(days: float) -> datetime.datetime:
    try:
        expiry = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    except (ValueError, OverflowError):
        fail(f"--days {days}: expected the number of days that the certificate holds", USAGE)
    return expiry


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, until: datetime.datetime
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, until) - _SKEW)
        .not_valid_after(until)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not re.fullmatch(_HOST_PATTERN, host):
            fail(
                f"--host {host}: neither an IP address nor a host name in ASCII (write münchen.example as {_EXAMPLE})",
                USAGE,
            )
        return x509.DNSName(host)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Readable by its owner only, from the first byte on."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)
