"""Between the network and the servicers: a real server, and callers that send and do what they like."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc._cython.cygrpc import SSLSessionCacheLRU
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from feddymem.client.channel import REQUEST_ID
from feddymem.client.tls import async_channel_to
from feddymem.v1 import inspection_pb2_grpc
from feddymem.v1.inspection_pb2 import InspectRequest, InspectResponse, InspectStreamRequest, InspectStreamResponse
from feddymem.v1.release_pb2 import DownloadArrayRequest, WatchReleasesRequest
from services.runtime import receiving
from services.runtime.array_store import ArrayStore
from services.runtime.audit import audited
from services.runtime.errors import invalid
from services.runtime.identity import Role
from services.runtime.publisher import Publisher
from services.runtime.rate import BURST_SECONDS, Rate
from services.runtime.receiving import RECEIVED_AT_ONCE
from services.runtime.rpc import MAX_TEXT_BYTES, RPCS, RPCS_OVER_LIMIT
from services.runtime.server import Service, listening
from services.runtime.settings import ServiceSettings
from tests.certificates import Authority

SECONDS = 30
GARBAGE = b"\xff\xff"
MAX_REQUEST_BYTES = 2**24
RELEASES, INSPECTION = "/feddymem.v1.ReleaseService", "/feddymem.v1.InspectionService"
HEALTH, REFLECTION = "/grpc.health.v1.Health", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
METHODS = {
    f"{RELEASES}/WatchReleases": "feddymem.v1.WatchReleasesRequest",
    f"{RELEASES}/DownloadArray": "feddymem.v1.DownloadArrayRequest",
    f"{INSPECTION}/Inspect": "feddymem.v1.InspectRequest",
    f"{INSPECTION}/InspectStream": "feddymem.v1.InspectStreamRequest",
    f"{HEALTH}/Check": "grpc.health.v1.HealthCheckRequest",
    f"{HEALTH}/Watch": "grpc.health.v1.HealthCheckRequest",
    f"{HEALTH}/List": "grpc.health.v1.HealthListRequest",
    REFLECTION: "grpc.reflection.v1alpha.ServerReflectionRequest",
}
FAULT = RuntimeError("secret of /var/lib")


class Inspections(inspection_pb2_grpc.InspectionServiceServicer):
    """Refuses, in the words of `site`, what has a site; fails where the federation is named `fault`.

    Attributes:
        begun: calls of Inspect of which nothing has been read.
    """

    def __init__(self) -> None:
        self.begun: asyncio.Queue[str] = asyncio.Queue()

    async def Inspect(  # noqa: N802
        self, request: InspectRequest, context: Any
    ) -> InspectResponse:
        with audited(context, "inspect", request.federation, request.site):
            if request.federation == "fault":
                raise FAULT
            if request.site:
                raise invalid(request.site)
        return InspectResponse(score=1)

    async def InspectStream(  # noqa: N802
        self, request_iterator: AsyncIterator[InspectStreamRequest], context: Any
    ) -> AsyncIterator[InspectStreamResponse]:
        async for request in request_iterator:
            if request.id == "flood":
                while True:
                    yield InspectStreamResponse(id="x" * 2**20)
            yield InspectStreamResponse(id=request.id)

    async def ReportFeedback(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    async def GetInspectionStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    @property
    def service(self) -> Service:
        return Service(
            INSPECTION[1:],
            lambda server: inspection_pb2_grpc.add_InspectionServiceServicer_to_server(self, server),
            access=dict.fromkeys(
                ("Inspect", "InspectStream", "ReportFeedback", "GetInspectionStatus"), frozenset({Role.LINE})
            ),
            audited={"Inspect": "inspect"},
            admissions={"Inspect": lambda context: self.begun.put_nowait(context.peer())},
        )


@asynccontextmanager
async def served(
    folder: Path,
    tls_dir: Path | None = None,
    rate: float = 1000,
    open_rpcs: int = 100,
    open_streams: int | None = None,
    inspections: Inspections | None = None,
) -> AsyncIterator[str]:
    """The address of a server of releases, of which there are none, and of `Inspections`."""
    services = [(inspections or Inspections()).service]
    settings = ServiceSettings(
        listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
        state_dir=folder,
        tls_dir=tls_dir,
        address_file=folder / "address.json",
        drain_seconds=0,
        max_rpcs_per_second=rate,
        max_open_rpcs=open_rpcs,
    )
    publisher = Publisher(ArrayStore(folder / "arrays"), frozenset({Role.LINE}), lambda _who, _federation: True)
    services.append(publisher.service)
    with capture_logs() as lines:
        async with listening(settings, Role.INFERENCE, services, MAX_REQUEST_BYTES, open_streams):
            address = next(line["grpc"] for line in lines if line["event"] == "listening")
            yield address


async def outcome(channel: aio.Channel, method: str, *requests: bytes) -> tuple[grpc.StatusCode, str, str]:
    """How an RPC of any kind ends: status, text and request id."""
    rpc: Any = channel.stream_stream(method)
    call = rpc(iter(requests), timeout=SECONDS, metadata=((REQUEST_ID, "mine"),))
    code, details = await ended(call)
    [request_id] = [value for key, value in await call.trailing_metadata() if key == REQUEST_ID]
    return code, details, request_id


async def ended(call: Any) -> tuple[grpc.StatusCode, str]:
    """How a stream ends that is read."""
    try:
        while await call.read() is not aio.EOF:
            pass
    except aio.AioRpcError:
        pass
    return await call.code(), await call.details()


@pytest.mark.parametrize("method", METHODS)
async def test_bytes_that_are_no_message_are_an_invalid_argument(
    tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = RPCS.labels(method, "INVALID_ARGUMENT")._value.get()
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        code, details, _id = await outcome(channel, method, GARBAGE)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith(f"the request is not a valid {METHODS[method]} message: ")
    assert RPCS.labels(method, "INVALID_ARGUMENT")._value.get() == before + 1
    assert not caplog.records  # of gRPC itself, with a stack trace


@pytest.mark.parametrize("method", [name for name in METHODS if "Stream" not in name and name != REFLECTION])
async def test_a_call_without_a_request_is_an_invalid_argument(tmp_path: Path, method: str) -> None:
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        code, details, _id = await outcome(channel, method)
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "the call ended without a request; send one")


async def test_garbage_ends_a_stream_after_its_answers(tmp_path: Path) -> None:
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        rpc: Any = channel.stream_stream(f"{INSPECTION}/InspectStream")
        call = rpc(iter([InspectStreamRequest(id="1").SerializeToString(), GARBAGE]), timeout=SECONDS)
        assert await call.read() == InspectStreamResponse(id="1").SerializeToString()
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_health_and_reflection_answer(tmp_path: Path) -> None:
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        check: Any = channel.unary_unary(f"{HEALTH}/Check")
        answer = await check(health_pb2.HealthCheckRequest(service="liveness").SerializeToString(), timeout=SECONDS)
        assert health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.SERVING
        unknown = health_pb2.HealthCheckRequest(service="moon").SerializeToString()
        assert (await outcome(channel, f"{HEALTH}/Check", unknown))[0] is grpc.StatusCode.NOT_FOUND
        listing: Any = channel.unary_unary(f"{HEALTH}/List")
        listed = health_pb2.HealthListResponse.FromString(await listing(b"", timeout=SECONDS)).statuses
        assert {name: status.status for name, status in listed.items()} == {
            "liveness": health_pb2.HealthCheckResponse.SERVING,
            **dict.fromkeys(("", RELEASES[1:], INSPECTION[1:]), health_pb2.HealthCheckResponse.NOT_SERVING),
        }
        watch: Any = channel.unary_stream(f"{HEALTH}/Watch")
        first = await watch(b"", timeout=SECONDS).read()
        assert health_pb2.HealthCheckResponse.FromString(first).status == health_pb2.HealthCheckResponse.NOT_SERVING
        reflect: Any = channel.stream_stream(REFLECTION)
        question = reflection_pb2.ServerReflectionRequest(list_services="*").SerializeToString()
        listed = await reflect(iter([question]), timeout=SECONDS).read()
        names = reflection_pb2.ServerReflectionResponse.FromString(listed).list_services_response.service
        assert {f"/{service.name}" for service in names} == {
            RELEASES,
            INSPECTION,
            HEALTH,
            REFLECTION.rpartition("/")[0],
        }


@pytest.mark.parametrize(
    ("request_", "event"),
    [
        (InspectRequest(site="no such thing"), "rpc_refused"),
        (InspectRequest(federation="fault"), "rpc_failed"),
    ],
    ids=["refused", "failed"],
)
async def test_what_goes_wrong_is_found_in_the_log_by_the_id_that_the_caller_gets(
    tmp_path: Path, request_: InspectRequest, event: str
) -> None:
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        with capture_logs(processors=[merge_contextvars]) as lines:
            _code, details, request_id = await outcome(channel, f"{INSPECTION}/Inspect", request_.SerializeToString())
    found = [line for line in lines if line.get("request_id") == request_id]
    assert [line["event"] for line in found] == ["audit", event]
    assert {line["method"] for line in found} == {f"{INSPECTION}/Inspect"}
    assert request_id != "mine"
    assert "secret" not in details
    assert event != "rpc_failed" or request_id in details


async def test_every_rpc_has_an_id_of_its_own(tmp_path: Path) -> None:
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        ids = [(await outcome(channel, f"{INSPECTION}/Inspect", b""))[2] for _ in range(3)]
    assert len(set(ids)) == 3


@pytest.mark.parametrize("letter", ["a", "\N{PILE OF POO}"])
async def test_a_text_that_repeats_a_long_name_still_arrives(tmp_path: Path, letter: str) -> None:
    request = InspectRequest(site=letter * 10**5).SerializeToString()
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        code, details, _id = await outcome(channel, f"{INSPECTION}/Inspect", request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details == letter * (MAX_TEXT_BYTES // len(letter.encode())) + " ..."


async def test_a_flood_of_refusals_does_not_flood_the_log(tmp_path: Path) -> None:
    refused = InspectRequest(site="no").SerializeToString()
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        with capture_logs() as lines:
            for _ in range(300):
                await outcome(channel, f"{INSPECTION}/Inspect", refused)
            await outcome(channel, f"{RELEASES}/DownloadArray", b"")
    logged = [line for line in lines if line["event"] == "rpc_refused" and line["code"] == "INVALID_ARGUMENT"]
    assert 0 < len(logged) < 250
    assert [line["code"] for line in lines if line["event"] == "rpc_refused"][-1] == "NOT_FOUND"


async def test_who_calls_too_often_is_refused_and_others_and_inspections_are_not(tmp_path: Path) -> None:
    authority, method = Authority(tmp_path / "authority"), f"{RELEASES}/DownloadArray"
    hub = authority.issue(Role.INFERENCE, "berlin")
    before = RPCS_OVER_LIMIT.labels(method, "rate")._value.get()
    async with served(tmp_path, hub, rate=0.5) as address:
        async with async_channel_to(address, [], authority.issue(Role.LINE, "one")) as channel:
            ends = [await outcome(channel, method, DownloadArrayRequest().SerializeToString()) for _ in range(8)]
            codes = [code for code, _details, _id in ends]
            assert codes[:5] == [grpc.StatusCode.NOT_FOUND] * 5
            assert codes[-1] is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "more than 0.5 RPCs a second" in ends[-1][1]
            inspect = [await outcome(channel, f"{INSPECTION}/Inspect", b"") for _ in range(20)]
            assert {code for code, _details, _id in inspect} == {grpc.StatusCode.OK}
        async with async_channel_to(address, [], authority.issue(Role.LINE, "two")) as channel:
            code, _details, _id = await outcome(channel, method, b"")
            assert code is grpc.StatusCode.NOT_FOUND
    assert RPCS_OVER_LIMIT.labels(method, "rate")._value.get() > before


async def test_who_may_not_change_anything_is_in_the_audit_log(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    hub, site = authority.issue(Role.INFERENCE, "berlin"), authority.issue(Role.SITE, "berlin")
    async with served(tmp_path, hub) as address, async_channel_to(address, [], site) as channel:
        with capture_logs() as lines:
            for method in ("InspectStream", "Inspect"):
                code, details, _id = await outcome(channel, f"{INSPECTION}/{method}", GARBAGE)
                assert code is grpc.StatusCode.PERMISSION_DENIED
                assert details == f"the certificate is that of site 'berlin'; {INSPECTION}/{method} is for line"
    assert [line for line in lines if line["event"] == "audit"] == [
        {
            "event": "audit",
            "log_level": "info",
            "who": "feddymem://site/berlin",
            "action": "inspect",
            "federation": "",
            "site": "",
            "result": "PERMISSION_DENIED",
        }
    ]


async def test_who_may_not_call_is_not_told_so_too_often(tmp_path: Path) -> None:
    """Each time may be a line of the audit log."""
    authority = Authority(tmp_path / "authority")
    hub, site = authority.issue(Role.INFERENCE, "berlin"), authority.issue(Role.SITE, "berlin")
    async with served(tmp_path, hub, rate=0.5) as address, async_channel_to(address, [], site) as channel:
        codes = [(await outcome(channel, f"{RELEASES}/DownloadArray", b""))[0] for _ in range(8)]
    assert codes[0] is grpc.StatusCode.PERMISSION_DENIED
    assert codes[-1] is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_who_has_many_streams_open_gets_no_more_until_one_ends(tmp_path: Path) -> None:
    async with served(tmp_path, open_rpcs=2) as address:  # noqa: SIM117 - the address is needed
        async with aio.insecure_channel(address) as channel, aio.insecure_channel(address) as other:
            watch: Any = channel.unary_stream(f"{HEALTH}/Watch")
            watching = [watch(b"", timeout=SECONDS) for _ in range(2)]
            for stream in watching:
                assert await stream.read() is not aio.EOF
            code, details, _id = await outcome(other, f"{HEALTH}/Check", b"")
            assert (code, "more than 2 RPCs at once" in details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
            assert (await outcome(other, f"{INSPECTION}/Inspect", b""))[0] is grpc.StatusCode.OK
            watching[0].cancel()
            while (await outcome(other, f"{HEALTH}/Check", b""))[0] is not grpc.StatusCode.OK:
                pass


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
    monkeypatch.setattr(receiving, "SILENCE_SECONDS", 0.2)
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        stream = begun_call(channel, f"{INSPECTION}/InspectStream")
        assert await answered(stream, "1")
        assert await ended(stream) == (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "no request has come for 0.2 seconds; begin another stream when there is one",
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
    for number in range(20_000):
        assert rate.take(f"{number}")
    assert len(rate._buckets) == 10_000


SHORT_SECONDS = 3
STREAMS = {
    f"{RELEASES}/WatchReleases": WatchReleasesRequest().SerializeToString(),
    f"{INSPECTION}/InspectStream": InspectStreamRequest(id="1").SerializeToString(),
    f"{HEALTH}/Watch": b"",
    REFLECTION: b"",
}


async def test_open_streams_end_when_the_certificate_of_who_calls_expires(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    hub = authority.issue(Role.INFERENCE, "berlin")
    async with served(tmp_path, hub) as address:
        short = authority.issue(Role.LINE, "short", days=SHORT_SECONDS / 86_400)
        async with async_channel_to(address, [], short) as channel:
            calls = []
            for method, request in STREAMS.items():
                rpc: Any = channel.stream_stream(method)
                call = rpc(timeout=SECONDS)
                await call.write(request)
                calls.append(call)
            unread: Any = channel.stream_stream(f"{INSPECTION}/InspectStream")(timeout=SECONDS)
            await unread.write(InspectStreamRequest(id="flood").SerializeToString())  # blocked, because nobody reads
            ends = await asyncio.gather(*(ended(call) for call in calls))
            expired = (grpc.StatusCode.UNAUTHENTICATED, "the certificate has expired; renew it and connect again")
            assert ends == [expired] * len(STREAMS)
            assert await ended(unread) == expired
            for method in METHODS:  # on the connection that is still open
                assert (await outcome(channel, method, b""))[:2] == expired


async def test_who_resumes_a_tls_session_with_an_expired_certificate_gets_nothing(tmp_path: Path) -> None:
    """The server takes the session up without another look at the certificate; or there is no session, where the last
    connection ended before its ticket had come, and then no connection either."""
    authority = Authority(tmp_path / "authority")
    hub = authority.issue(Role.INFERENCE, "berlin")
    options = [("grpc.ssl_session_cache", SSLSessionCacheLRU(1)), ("grpc.use_local_subchannel_pool", 1)]
    async with served(tmp_path, hub) as address:
        short = authority.issue(Role.LINE, "short", days=SHORT_SECONDS / 86_400)
        async with asyncio.timeout(SECONDS):
            while True:
                async with async_channel_to(address, options, short) as channel:
                    check: Any = channel.unary_stream(f"{HEALTH}/Check")
                    code, details = await ended(check(b"", timeout=SECONDS))
                if code is not grpc.StatusCode.OK:
                    break
    assert (code, details) in [
        (grpc.StatusCode.UNAUTHENTICATED, "the certificate has expired; renew it and connect again"),
        (grpc.StatusCode.UNAVAILABLE, details),
    ]
