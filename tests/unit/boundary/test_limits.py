"""How often, how much and for how long callers may call."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2

from feddymem.client.tls import async_channel_to
from feddymem.v1.inspection_pb2 import InspectRequest, InspectStreamRequest, InspectStreamResponse
from feddymem.v1.release_pb2 import DownloadArrayRequest
from services.runtime import rate as rate_module
from services.runtime import receiving
from services.runtime.identity import Role
from services.runtime.rate import BURST_SECONDS, Rate
from services.runtime.receiving import RECEIVED_AT_ONCE
from services.runtime.rpc import RPCS, RPCS_OVER_LIMIT
from services.runtime.server import Service
from tests.certificates import Authority
from tests.unit.boundary.serving import (
    FULL,
    HEALTH,
    INSPECTION,
    MAX_REQUEST_BYTES,
    RELEASES,
    SECONDS,
    Inspections,
    ended,
    outcome,
    served,
)


@pytest.fixture
def _no_rate_is_regained(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a test takes: of a rate there is what may come at once, and no more."""
    monkeypatch.setattr(rate_module, "time", SimpleNamespace(monotonic=lambda: 100.0))


@pytest.mark.usefixtures("_no_rate_is_regained")
async def test_who_calls_too_often_is_refused_and_others_and_inspections_are_not(tmp_path: Path) -> None:
    authority, method = Authority(tmp_path / "authority"), f"{RELEASES}/DownloadArray"
    hub = authority.issue(Role.INFERENCE, "berlin")
    before = RPCS_OVER_LIMIT.labels(method, "rate")._value.get()
    async with served(tmp_path, hub, rate=0.5) as address:
        async with async_channel_to(address, [], authority.issue(Role.LINE, "one")) as channel:
            ends = [await outcome(channel, method, DownloadArrayRequest().SerializeToString()) for _ in range(8)]
            codes = [code for code, _details, _id in ends]
            assert codes == [grpc.StatusCode.NOT_FOUND] * 5 + [grpc.StatusCode.RESOURCE_EXHAUSTED] * 3
            assert "more than 0.5 RPCs a second" in ends[-1][1]
            inspect = [await outcome(channel, f"{INSPECTION}/Inspect", b"") for _ in range(20)]
            assert {code for code, _details, _id in inspect} == {grpc.StatusCode.OK}
        async with async_channel_to(address, [], authority.issue(Role.LINE, "two")) as channel:
            code, _details, _id = await outcome(channel, method, b"")
            assert code is grpc.StatusCode.NOT_FOUND
    assert RPCS_OVER_LIMIT.labels(method, "rate")._value.get() == before + 3


@pytest.mark.usefixtures("_no_rate_is_regained")
async def test_who_may_not_call_is_not_told_so_too_often(tmp_path: Path) -> None:
    """Each time may be a line of the audit log."""
    authority = Authority(tmp_path / "authority")
    hub, site = authority.issue(Role.INFERENCE, "berlin"), authority.issue(Role.SITE, "berlin")
    async with served(tmp_path, hub, rate=0.5) as address, async_channel_to(address, [], site) as channel:
        codes = [(await outcome(channel, f"{RELEASES}/DownloadArray", b""))[0] for _ in range(8)]
    assert codes == [grpc.StatusCode.PERMISSION_DENIED] * 5 + [grpc.StatusCode.RESOURCE_EXHAUSTED] * 3


class Unlisted(Inspections):
    """Does not say who may call Inspect."""

    @property
    def service(self) -> Service:
        service = super().service
        access = {name: roles for name, roles in service.access.items() if name != "Inspect"}
        return dataclasses.replace(service, access=access)


@pytest.mark.parametrize("role", list(Role))
async def test_a_method_that_nobody_is_said_to_call_is_for_nobody(tmp_path: Path, role: Role) -> None:
    authority, method, inspections = Authority(tmp_path / "authority"), f"{INSPECTION}/Inspect", Unlisted()
    hub, who = authority.issue(Role.INFERENCE, "berlin"), authority.issue(role, "somebody")
    async with (
        served(tmp_path, hub, inspections=inspections) as address,
        async_channel_to(address, [], who) as channel,
    ):
        code, details, _id = await outcome(channel, method, b"")
    assert (code, details.endswith(f"{method} is for nobody")) == (grpc.StatusCode.PERMISSION_DENIED, True)
    assert inspections.begun.empty()


async def test_who_has_many_streams_open_gets_no_more_until_one_ends(tmp_path: Path) -> None:
    async with served(tmp_path, open_rpcs=2) as address:  # noqa: SIM117 - the address is needed
        async with aio.insecure_channel(address) as channel, aio.insecure_channel(address) as other:
            watch: Any = channel.unary_stream(f"{HEALTH}/Watch")
            watching = [watch(b"", timeout=SECONDS) for _ in range(2)]
            for stream in watching:
                assert await stream.read() is not aio.EOF
            code, details, _id = await outcome(other, f"{HEALTH}/Check", b"")
            assert (code, "more than 2 RPCs at once" in details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
            assert (await outcome(other, f"{INSPECTION}/Inspect", b""))[0] is grpc.StatusCode.OK  # they count apart
            watching[0].cancel()
            while (await outcome(other, f"{HEALTH}/Check", b""))[0] is not grpc.StatusCode.OK:
                pass


async def test_of_single_inspections_one_caller_has_open_what_may_wait_beside_other_rpcs(tmp_path: Path) -> None:
    method, inspections = f"{INSPECTION}/Inspect", Inspections()
    before = RPCS_OVER_LIMIT.labels(method, "open")._value.get()
    async with (
        served(tmp_path, open_rpcs=2, admitted=3, inspections=inspections) as address,
        aio.insecure_channel(address) as channel,
        aio.insecure_channel(address) as other,
    ):
        silent = [begun_call(channel, method) for _ in range(5)]
        begun = [await asyncio.wait_for(inspections.begun.get(), SECONDS) for _ in silent]
        code, details, _id = await outcome(other, method, b"")
        assert (code, "more than 5 RPCs at once" in details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        assert set(begun) == {"ipv4:127.0.0.1"}  # whatever the connection
        check: Any = other.unary_unary(f"{HEALTH}/Check")
        assert await check(health_pb2.HealthCheckRequest(service="liveness").SerializeToString(), timeout=SECONDS)
        for call in silent:
            call.cancel()
        while (await outcome(other, method, b""))[0] is not grpc.StatusCode.OK:
            pass
    assert RPCS_OVER_LIMIT.labels(method, "open")._value.get() > before


async def test_a_caller_is_an_identity_whatever_its_connections(tmp_path: Path) -> None:
    authority, inspections = Authority(tmp_path / "authority"), Inspections()
    one, two = (authority.issue(Role.LINE, name) for name in ("one", "two"))
    async with served(tmp_path, authority.issue(Role.INFERENCE, "berlin"), inspections=inspections) as address:
        for who in (one, one, two):
            async with async_channel_to(address, [], who) as channel:
                assert (await outcome(channel, f"{INSPECTION}/Inspect", b""))[0] is grpc.StatusCode.OK
    names = [inspections.begun.get_nowait() for _ in range(3)]
    assert names == ["feddymem://line/one", "feddymem://line/one", "feddymem://line/two"]


async def test_who_is_not_admitted_is_told_so_however_many_calls_are_open(tmp_path: Path) -> None:
    method, inspections = f"{INSPECTION}/Inspect", Inspections()
    async with (
        served(tmp_path, open_rpcs=1, inspections=inspections) as address,
        aio.insecure_channel(address) as channel,
    ):
        begun_call(channel, method)
        await asyncio.wait_for(inspections.begun.get(), SECONDS)
        inspections.full = True
        code, details, _id = await outcome(channel, method, b"")
        assert (code, details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, FULL.text)


async def test_what_one_caller_sends_is_received_a_few_requests_at_a_time(tmp_path: Path) -> None:
    method, inspections, large = f"{INSPECTION}/Inspect", Inspections(), InspectRequest(encoded=bytes(2**20))
    async with served(tmp_path, inspections=inspections) as address, aio.insecure_channel(address) as channel:
        silent = [begun_call(channel, method) for _ in range(RECEIVED_AT_ONCE)]
        for _ in silent:
            await asyncio.wait_for(inspections.begun.get(), SECONDS)
        further = asyncio.create_task(outcome(channel, method, large.SerializeToString()))
        await asyncio.wait_for(inspections.begun.get(), SECONDS)
        stream = begun_call(channel, f"{INSPECTION}/InspectStream")  # is not held up
        for number in range(10):
            assert await answered(stream, f"{number}")
        assert not further.done()
        silent[0].cancel()
        assert (await further)[0] is grpc.StatusCode.OK


async def test_who_sends_slowly_keeps_no_probe_from_its_host_out(tmp_path: Path) -> None:
    inspections = Inspections()
    async with served(tmp_path, inspections=inspections) as address, aio.insecure_channel(address) as channel:
        silent = [begun_call(channel, f"{INSPECTION}/Inspect") for _ in range(2 * RECEIVED_AT_ONCE)]
        for _ in silent:
            await asyncio.wait_for(inspections.begun.get(), SECONDS)
        check: Any = channel.unary_unary(f"{HEALTH}/Check")
        assert await check(health_pb2.HealthCheckRequest(service="liveness").SerializeToString(), timeout=SECONDS)


async def test_a_request_that_gets_lost_or_is_too_large_is_no_fault_of_its_text(tmp_path: Path) -> None:
    method, inspections = f"{INSPECTION}/Inspect", Inspections()

    def counted(code: str) -> float:
        return float(RPCS.labels(method, code)._value.get())

    invalid, cancelled = counted("INVALID_ARGUMENT"), counted("CANCELLED")
    async with served(tmp_path, inspections=inspections) as address, aio.insecure_channel(address) as channel:
        begun = begun_call(channel, method)
        await asyncio.wait_for(inspections.begun.get(), SECONDS)
        begun.cancel()
        too_large: Any = channel.unary_unary(method)
        with pytest.raises(aio.AioRpcError) as caught:
            await too_large(bytes(MAX_REQUEST_BYTES + 1), timeout=SECONDS)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with asyncio.timeout(SECONDS):
            while counted("CANCELLED") < cancelled + 2:  # noqa: ASYNC110 - there is no event for a metric
                await asyncio.sleep(0.01)
    assert counted("INVALID_ARGUMENT") == invalid


async def test_a_request_that_stops_half_way_ends_and_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "RECEIVE_SECONDS", 0.2)
    monkeypatch.setattr(receiving, "RECEIVED_AT_ONCE", 1)
    method, large = f"{INSPECTION}/Inspect", InspectRequest(encoded=bytes(2**23)).SerializeToString()
    async with served(tmp_path) as address, stalling(address, 2**22) as stalled:
        async with aio.insecure_channel(stalled) as channel:
            code, details, _id = await outcome(channel, method, large)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert details == "the request has not arrived within 0.2 seconds; send less, or fewer at once"
        monkeypatch.undo()
        async with aio.insecure_channel(address) as channel:
            assert (await outcome(channel, method, large))[0] is grpc.StatusCode.OK


async def test_a_stream_ends_whose_caller_has_fallen_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        stream = begun_call(channel, f"{INSPECTION}/InspectStream")
        assert await answered(stream, "1")
        said = receiving.SILENCE_SECONDS  # by the text, which is as old as the stream
        monkeypatch.setattr(receiving, "SILENCE_SECONDS", 0.2)  # from the next request on, however late that comes
        assert await answered(stream, "2")
        assert await ended(stream) == (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            f"no request has come for {said} seconds; begin another stream when there is one",
        )


async def test_of_one_caller_only_so_many_streams_of_requests_are_open(tmp_path: Path) -> None:
    method = f"{INSPECTION}/InspectStream"
    before = RPCS_OVER_LIMIT.labels(method, "streams")._value.get()
    async with served(tmp_path, open_streams=8) as address, aio.insecure_channel(address) as channel:
        streams = [begun_call(channel, method) for _ in range(8)]
        for stream in streams:
            assert await answered(stream, "1")
        code, details, _id = await outcome(channel, method)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "more than 8 streams of requests at once" in details
        assert "max_open_streams" in details
        assert (await outcome(channel, f"{INSPECTION}/Inspect", b""))[0] is grpc.StatusCode.OK
        await streams[0].done_writing()
        assert await ended(streams[0]) == (grpc.StatusCode.OK, "")
        assert (await outcome(channel, method))[0] is grpc.StatusCode.OK
    assert RPCS_OVER_LIMIT.labels(method, "streams")._value.get() == before + 1


def begun_call(channel: aio.Channel, method: str) -> Any:
    """A call that has sent nothing yet."""
    rpc: Any = channel.stream_stream(method)
    return rpc(timeout=SECONDS)


async def answered(stream: Any, name: str) -> bool:
    """Whether InspectStream answers one more request."""
    await stream.write(InspectStreamRequest(id=name).SerializeToString())
    return bool(await stream.read() == InspectStreamResponse(id=name).SerializeToString())


@asynccontextmanager
async def stalling(address: str, most: int) -> AsyncIterator[str]:
    """A way to a server that lets only so many bytes of each caller through, and all of the server."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: int) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(2**16):
                writer.write(piece[:left])
                left = max(left - len(piece), 0)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = address.rpartition(":")
        server_reader, server_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pass_on(reader, server_writer, most), pass_on(server_reader, writer, sys.maxsize))

    async with asyncio.TaskGroup() as connections:
        server = await asyncio.start_server(lambda *ends: connections.create_task(serve(*ends)), "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        yield f"{host}:{port}"
        server.close()


def test_a_rate_is_regained_by_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("services.runtime.rate.time.monotonic", lambda: now)
    rate = Rate(2)
    assert [rate.take("a") for _ in range(2 * BURST_SECONDS + 1)] == [True] * 2 * BURST_SECONDS + [False]
    now = 1.0
    assert [rate.take("a") for _ in range(3)] == [True, True, False]
    now = 10_000.0  # however long nobody came
    assert [rate.take("a") for _ in range(2 * BURST_SECONDS + 1)] == [True] * 2 * BURST_SECONDS + [False]
    for number in range(20_000):
        assert rate.take(f"{number}")
    assert len(rate._buckets) == 10_000
