"""A client whose certificate is renewed on disk while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from grpc import aio

from feddymem.client import AsyncInspectionClient, InspectionClient
from feddymem.client.tls import CERTIFICATE, KEY, TlsError
from feddymem.v1.inspection_pb2 import InspectRequest, InspectResponse
from feddymem.v1.inspection_pb2_grpc import InspectionServiceServicer, add_InspectionServiceServicer_to_server
from services.runtime.identity import Role
from services.runtime.tls import server_credentials
from tests.certificates import Authority

IMAGE = b"any"


class Showing(InspectionServiceServicer):
    """Notes the certificates that are shown to it; calls of a site named `slow` wait for `go_on`."""

    def __init__(self) -> None:
        self.shown: list[int] = []
        self.begun, self.both, self.go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def Inspect(self, request: InspectRequest, context: Any) -> InspectResponse:  # noqa: N802
        [pem] = context.auth_context()["x509_pem_cert"]
        self.shown.append(x509.load_pem_x509_certificate(pem).serial_number)
        if request.site == "slow":
            (self.both if self.begun.is_set() else self.begun).set()
            await self.go_on.wait()
        return InspectResponse(score=1)

    def InspectStream(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    def ReportFeedback(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    def GetInspectionStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError


def serial(folder: Path) -> int:
    return x509.load_pem_x509_certificate((folder / CERTIFICATE).read_bytes()).serial_number


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@asynccontextmanager
async def served(authority: Authority) -> AsyncIterator[tuple[str, Showing]]:
    server, showing = aio.server(), Showing()
    add_InspectionServiceServicer_to_server(showing, server)
    hub = authority.issue(Role.INFERENCE, "berlin")
    port = server.add_secure_port("127.0.0.1:0", server_credentials(hub, Role.INFERENCE))
    await server.start()
    try:
        yield f"127.0.0.1:{port}", showing
    finally:
        await server.stop(0)


async def test_the_next_call_shows_the_renewed_certificate_and_others_end_well(
    authority: Authority,
) -> None:
    line = authority.issue(Role.LINE, "one")
    async with served(authority) as (address, showing), AsyncInspectionClient(address, tls_dir=line) as client:
        await client.inspect(IMAGE)
        serials = [serial(line)]
        async with AsyncInspectionClient(address, site="slow", tls_dir=line) as slow:
            waiting = asyncio.ensure_future(slow.inspect(IMAGE))
            await showing.begun.wait()
            showing.shown.clear()
            authority.issue(Role.LINE, "one")
            serials.append(serial(line))
            await client.inspect(IMAGE)
            second = asyncio.ensure_future(slow.inspect(IMAGE))
            await showing.both.wait()
            showing.go_on.set()
            assert [(await call).score for call in (waiting, second)] == [1, 1]
        assert showing.shown == [serials[1]] * 2
        assert serials[0] != serials[1]


async def test_without_asyncio_too_and_halves_of_it_wait(authority: Authority) -> None:
    line = authority.issue(Role.LINE, "one")
    async with served(authority) as (address, showing):
        with InspectionClient(address, tls_dir=line) as client:
            await asyncio.to_thread(client.inspect, IMAGE)
            key = (line / KEY).read_bytes()
            for half in (b"", (authority.issue(Role.LINE, "two") / KEY).read_bytes()):
                (line / KEY).write_bytes(half)
                await asyncio.to_thread(client.inspect, IMAGE)
            (line / KEY).unlink()
            await asyncio.to_thread(client.inspect, IMAGE)
            assert showing.shown == [serial(line)] * 4
            (line / KEY).write_bytes(key)
            authority.issue(Role.LINE, "one")
            await asyncio.to_thread(client.inspect, IMAGE)
            assert showing.shown[-1] == serial(line) != showing.shown[0]


def test_files_that_are_not_there_at_the_start_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(TlsError, match=r"tls\.crt"):
        InspectionClient("127.0.0.1:1", tls_dir=tmp_path)
