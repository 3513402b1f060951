"""Who calls: what a certificate says, and what it cannot say."""

from __future__ import annotations

import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from feddymem.client.tls import CERTIFICATE
from feddymem.names import NAME_PATTERN
from services.runtime.errors import Refusal
from services.runtime.identity import Identity, Role, caller, identity_from_uri, require_site
from tests.certificates import Authority


def context(pem: bytes | None) -> Any:
    """Of an RPC whose caller has shown a certificate; without one, of one without TLS."""
    if pem is None:
        return SimpleNamespace(auth_context=lambda: {"transport_security_type": [b"insecure"]})
    shown = {"x509_pem_cert": [pem], "transport_security_type": [b"ssl"]}
    return SimpleNamespace(auth_context=lambda: shown)


def certificate(*names: x509.GeneralName) -> bytes:
    """A certificate with these alternative names."""
    key, name, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([]), datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def refusal(pem: bytes | None, site: str = "berlin") -> Refusal:
    with pytest.raises(Refusal) as caught:
        require_site(context(pem), site)
    return caught.value


@given(st.sampled_from(Role), st.from_regex(NAME_PATTERN, fullmatch=True))
def test_a_uri_names_the_identity_that_it_is_made_of(role: Role, name: str) -> None:
    assert identity_from_uri(Identity(role, name).uri) == Identity(role, name)


@pytest.mark.parametrize(
    "uri",
    [
        *("", "feddymem://", "feddymem://site", "feddymem://site/", "feddymem://boss/a", "spiffe://site/a"),
        *("feddymem://site/a/b", "feddymem://site/..", "feddymem://site/a\n", "Feddymem://site/a", "feddymem://SITE/a"),
    ],
)
def test_other_uris_name_nobody(uri: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        identity_from_uri(uri)


def test_without_tls_nobody_is_known_and_everybody_may_speak() -> None:
    assert caller(context(None)) is None
    require_site(context(None), "berlin")


def test_where_tls_shows_no_certificate_nobody_is_let_in() -> None:
    """As gRPC is set up it cannot happen; it must not be taken for a connection without TLS."""
    nobody: Any = SimpleNamespace(auth_context=lambda: {"transport_security_type": [b"ssl"]})
    with pytest.raises(Refusal, match="names nobody"):
        caller(nobody)


def test_a_site_speaks_for_itself(tmp_path: Path) -> None:
    pem = (Authority(tmp_path).issue(Role.SITE, "berlin") / CERTIFICATE).read_bytes()
    assert caller(context(pem)) == Identity(Role.SITE, "berlin")
    require_site(context(pem), "berlin")


@pytest.mark.parametrize("who", [Identity(Role.SITE, "Berlin"), Identity(Role.INFERENCE, "berlin")], ids=str)
def test_nobody_else_speaks_for_a_site(tmp_path: Path, who: Identity) -> None:
    answer = refusal((Authority(tmp_path).issue(who.role, who.name) / CERTIFICATE).read_bytes())
    assert answer.status is grpc.StatusCode.PERMISSION_DENIED
    assert answer.text == f"the certificate is that of {who}, which cannot speak for site 'berlin'"


def test_a_certificate_that_expires_on_an_open_connection_counts_no_more(tmp_path: Path) -> None:
    answer = refusal((Authority(tmp_path).issue(Role.SITE, "berlin", days=-0.001) / CERTIFICATE).read_bytes())
    assert answer.status is grpc.StatusCode.UNAUTHENTICATED
    assert "has expired" in answer.text


BERLIN = x509.UniformResourceIdentifier("feddymem://site/berlin")


@pytest.mark.parametrize(
    "names",
    [
        (),
        (x509.DNSName("berlin"),),
        (x509.DNSName("feddymem://site/berlin"),),
        (x509.UniformResourceIdentifier("https://site/berlin"),),
        (x509.UniformResourceIdentifier("feddymem://mayor/berlin"),),
        (BERLIN, x509.UniformResourceIdentifier("feddymem://operator/ann")),
    ],
    ids=["none", "host", "host like an identity", "other URI", "unknown role", "two"],
)
def test_who_is_not_named_once_as_uri_is_nobody(names: tuple[x509.GeneralName, ...]) -> None:
    answer = refusal(certificate(*names))
    assert answer.status is grpc.StatusCode.PERMISSION_DENIED
    assert "names nobody" in answer.text


def test_other_names_beside_the_identity_do_not_matter() -> None:
    names = (x509.DNSName("edge.example"), BERLIN, x509.UniformResourceIdentifier("spiffe://example/edge"))
    assert caller(context(certificate(*names))) == Identity(Role.SITE, "berlin")
