"""TLS on a real connection: renewed certificates count, halves of them do not."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import typer
from cryptography import x509
from grpc import aio
from typer.testing import CliRunner

from feddymem.client.tls import AUTHORITY, CERTIFICATE, KEY, TlsError, read_tls
from services.cli.certs import certs, issue
from services.cli.exit_codes import USAGE
from services.runtime.channels import connected
from services.runtime.identity import Identity, Role
from services.runtime.server_identity import UnreachableError
from services.runtime.tls import server_credentials
from tests.certificates import Authority
from tests.samples import sample

SECONDS = 30
METHOD = "/feddymem.test.Mirror/Shown"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


def serial(folder: Path) -> int:
    return x509.load_pem_x509_certificate((folder / CERTIFICATE).read_bytes()).serial_number


@asynccontextmanager
async def served(folder: Path, role: Role = Role.AGGREGATOR, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """The address of a server that tells its callers the serial number of the certificate that they show."""

    async def shown(_request: bytes, context: aio.ServicerContext[bytes, bytes]) -> bytes:
        [pem] = context.auth_context()["x509_pem_cert"]
        return str(x509.load_pem_x509_certificate(pem).serial_number).encode()

    server = aio.server()
    service, _, name = METHOD[1:].partition("/")
    handler: Any = grpc.unary_unary_rpc_method_handler(shown)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {name: handler})])
    port = server.add_secure_port(address, server_credentials(folder, role))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def shown_to(address: str, folder: Path, seconds: float = SECONDS, role: Role = Role.AGGREGATOR) -> int:
    settings: Any = SimpleNamespace(tls_dir=folder, rpc_timeout_seconds=seconds)
    async with connected(address, settings, role) as channel:
        call: Any = channel.unary_unary(METHOD)
        return int(await call(b"", timeout=SECONDS))


async def test_a_caller_shows_its_renewed_certificate_when_it_connects_again(authority: Authority) -> None:
    server, client = authority.issue(Role.AGGREGATOR, "hub"), authority.issue(Role.SITE, "berlin")
    async with served(server) as address:
        first = serial(client)
        assert await shown_to(address, client) == first
        authority.issue(Role.SITE, "berlin")
        assert await shown_to(address, client) == serial(client) != first


async def test_a_server_shows_its_renewed_certificate_to_the_next_caller(authority: Authority, tmp_path: Path) -> None:
    """A new authority for both: the old certificate would not be believed."""
    server, client = authority.issue(Role.AGGREGATOR, "hub"), authority.issue(Role.SITE, "berlin")
    other = Authority(tmp_path / "other")
    async with served(server) as address:
        await shown_to(address, client)
        shutil.copytree(other.issue(Role.AGGREGATOR, "hub"), server, dirs_exist_ok=True)
        renewed = other.issue(Role.SITE, "berlin")
        assert await shown_to(address, renewed) == serial(renewed)
        with pytest.raises(UnreachableError, match="CERTIFICATE_VERIFY_FAILED"):
            await shown_to(address, client, seconds=1)


async def test_a_server_shows_when_the_certificate_that_it_uses_expires(authority: Authority) -> None:
    def expiry(folder: Path) -> float:
        pem = (folder / CERTIFICATE).read_bytes()
        return x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()

    server, client = authority.issue(Role.AGGREGATOR, "hub", days=0.25), authority.issue(Role.SITE, "berlin")
    async with served(server) as address:
        first = expiry(server)
        assert sample("certificate_expiry_timestamp_seconds") == first
        authority.issue(Role.AGGREGATOR, "hub", days=0.5)
        await shown_to(address, client)
        assert sample("certificate_expiry_timestamp_seconds") == expiry(server) != first


async def test_while_the_authority_changes_both_are_believed(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    server, old = authority.issue(Role.AGGREGATOR, "hub"), authority.issue(Role.SITE, "berlin")
    new = other.issue(Role.SITE, "berlin")
    for folder in (server, new):
        (folder / AUTHORITY).write_bytes(read_tls(server).authority + (other.folder / AUTHORITY).read_bytes())
    async with served(server) as address:
        for client in (old, new):
            assert await shown_to(address, client) == serial(client)


@pytest.mark.parametrize("name", [CERTIFICATE, KEY])
async def test_a_server_goes_on_with_the_pair_it_has_while_one_half_is_replaced(
    authority: Authority, tmp_path: Path, name: str
) -> None:
    server, client = authority.issue(Role.AGGREGATOR, "hub"), authority.issue(Role.SITE, "berlin")
    before = tmp_path / "before"
    shutil.copytree(server, before)
    async with served(server) as address:
        authority.issue(Role.AGGREGATOR, "hub")
        shutil.copy(before / name, server / name)  # a pair no more
        assert await shown_to(address, client) == serial(client)
        (server / name).write_bytes(b"half a fil")
        assert await shown_to(address, client) == serial(client)
        (server / name).unlink()
        assert await shown_to(address, client) == serial(client)


async def test_a_caller_speaks_only_to_the_role_that_it_means(authority: Authority) -> None:
    line, client = authority.issue(Role.LINE, "hub"), authority.issue(Role.SITE, "berlin")
    async with served(line, Role.LINE) as address:
        with pytest.raises(
            UnreachableError, match="shows the certificate of line 'hub'; expected that of role aggregator"
        ):
            await shown_to(address, client)


async def test_an_inference_service_speaks_only_to_edge_clients_of_its_own_site(authority: Authority) -> None:
    own, other = authority.issue(Role.INFERENCE, "berlin"), authority.issue(Role.INFERENCE, "paris")
    async with served(authority.issue(Role.SITE, "berlin"), Role.SITE) as address:
        assert await shown_to(address, own, role=Role.SITE) == serial(own)
        with pytest.raises(UnreachableError, match="certificate of site 'berlin'; expected that of site 'paris'"):
            await shown_to(address, other, role=Role.SITE)


async def test_a_caller_still_checks_the_host_name(authority: Authority) -> None:
    hub = authority.issue(Role.AGGREGATOR, "hub")
    issue(authority.folder, Role.AGGREGATOR, "hub", host=["elsewhere.example"])
    async with served(hub) as address:
        with pytest.raises(UnreachableError, match="IP address mismatch"):
            await shown_to(address, authority.issue(Role.SITE, "berlin"), seconds=1)


async def test_who_takes_the_place_of_a_server_that_was_looked_at_is_not_spoken_to(authority: Authority) -> None:
    """Even with a certificate of the same authority and host: gRPC believes the one that was seen, no other."""
    client, hub = authority.issue(Role.SITE, "berlin"), authority.issue(Role.AGGREGATOR, "hub")
    settings: Any = SimpleNamespace(tls_dir=client, rpc_timeout_seconds=SECONDS)
    async with AsyncExitStack() as first:
        address = await first.enter_async_context(served(hub))
        async with connected(address, settings, Role.AGGREGATOR) as channel:
            call: Any = channel.unary_unary(METHOD)
            await call(b"", timeout=SECONDS)
            await first.aclose()
            async with served(authority.issue(Role.LINE, "impostor"), Role.LINE, address):
                with pytest.raises(aio.AioRpcError) as caught:
                    await call(b"", timeout=5, wait_for_ready=True)
                assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            async with served(hub, address=address):
                assert int(await call(b"", timeout=SECONDS, wait_for_ready=True)) == serial(client)


@pytest.mark.parametrize(
    ("own", "said"),
    [(Identity(Role.SITE, "paris"), "site 'paris'"), (Role.INFERENCE, "role inference")],
    ids=["another site", "another role"],
)
def test_somebody_elses_certificate_starts_no_server(authority: Authority, own: Identity | Role, said: str) -> None:
    with pytest.raises(TlsError, match=f"is the certificate of site 'berlin'; this service needs that of {said}"):
        server_credentials(authority.issue(Role.SITE, "berlin"), own)


def test_files_that_are_no_pair_start_no_server(authority: Authority) -> None:
    hub, berlin = authority.issue(Role.AGGREGATOR, "hub"), authority.issue(Role.SITE, "berlin")
    shutil.copy(berlin / KEY, hub / KEY)
    with pytest.raises(TlsError, match="the private key is not that of the certificate"):
        server_credentials(hub, Role.AGGREGATOR)


def test_an_expired_certificate_starts_no_server(authority: Authority) -> None:
    with pytest.raises(TlsError, match=r"tls\.crt has expired on \d{4}-"):
        server_credentials(authority.issue(Role.AGGREGATOR, "hub", days=-0.1), Role.AGGREGATOR)


@pytest.mark.parametrize("name", [CERTIFICATE, KEY, AUTHORITY])
def test_a_missing_file_is_named(authority: Authority, name: str) -> None:
    folder = authority.issue(Role.SITE, "berlin")
    (folder / name).unlink()
    with pytest.raises(TlsError, match=name):
        read_tls(folder)


@pytest.mark.parametrize("name", [CERTIFICATE, KEY, AUTHORITY])
def test_what_is_no_pem_starts_no_server(authority: Authority, name: str) -> None:
    folder = authority.issue(Role.SITE, "berlin")
    for content in (b"", b"PEM"):
        (folder / name).write_bytes(content)
        with pytest.raises(TlsError, match=f"{name} is not PEM"):
            read_tls(folder)
    (folder / name).write_bytes(b"-----BEGIN NOTHING-----")
    with pytest.raises(TlsError, match="not three PEM files"):
        server_credentials(folder, Role.SITE)


def test_keys_are_for_their_owner_only(authority: Authority) -> None:
    folder = authority.issue(Role.SITE, "berlin")
    assert [path.stat().st_mode & 0o777 for path in (folder / KEY, authority.folder / "ca.key")] == [0o600, 0o600]


@pytest.mark.parametrize("kept", ["ca.key", "ca.crt"])
def test_an_authority_is_never_overwritten(authority: Authority, kept: str) -> None:
    (authority.folder / ({"ca.key": "ca.crt", "ca.crt": "ca.key"}[kept])).unlink()
    with pytest.raises(typer.Exit):
        Authority(authority.folder)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--days", "nan"], "--days nan: expected the number of days"),
        (["--days", "1e12"], "--days 1000000000000.0: expected"),
        (["--host", "m\u00fcnchen.example"], "neither an IP address nor a host name in ASCII"),
        (["--host", "a b"], "--host a b: neither"),
        (["--host", ""], "neither an IP address"),
    ],
)
def test_what_makes_no_certificate_is_said(authority: Authority, flags: list[str], said: str) -> None:
    result = CliRunner().invoke(certs, ["issue", str(authority.folder), "site", "berlin", *flags])
    assert result.exit_code == USAGE
    assert said in result.stderr
    assert not (authority.folder / "site-berlin").exists()


def test_a_server_of_many_names(authority: Authority) -> None:
    hosts = ["edge.example", "*.edge.example", "edge_1", "::1", "10.0.0.1"]
    issue(authority.folder, Role.SITE, "berlin", host=hosts)
    certificate = x509.load_pem_x509_certificate((authority.folder / "site-berlin" / CERTIFICATE).read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == hosts[:3]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == hosts[3:]


@pytest.mark.parametrize("own_first", [True, False])
def test_an_authority_that_replaces_another_issues_whatever_the_order_in_its_file(
    tmp_path: Path, authority: Authority, own_first: bool
) -> None:
    other = Authority(tmp_path / "other")
    own, others = ((each.folder / AUTHORITY).read_bytes() for each in (authority, other))
    (authority.folder / AUTHORITY).write_bytes(own + others if own_first else others + own)
    issued = authority.issue(Role.SITE, "berlin")
    certificate = x509.load_pem_x509_certificate((issued / CERTIFICATE).read_bytes())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(own))
    assert (issued / AUTHORITY).read_bytes() == (authority.folder / AUTHORITY).read_bytes()
    (authority.folder / AUTHORITY).write_bytes(others)
    result = CliRunner().invoke(certs, ["issue", str(authority.folder), "site", "rome"])
    assert (result.exit_code, "no certificate of the key" in result.stderr) == (USAGE, True)
