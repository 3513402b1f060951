"""Spans of the boundary, of calls to other services and of the client library, kept in memory."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc import aio
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from feddymem.client import AsyncInspectionClient, InspectionClient, OverloadedError
from feddymem.v1.inspection_pb2 import InspectRequest, InspectResponse
from services.runtime import tracing
from services.runtime.errors import invalid
from services.runtime.rpc import RpcBoundary
from services.runtime.trace_export import TELL_SECONDS
from tests.scripted_service import scripted_service

SECONDS = 30
SERVICE, METHODS = "feddymem.test.Mirror", ("Turn", "Fail", "Refuse", "Echo", "WatchNothing")
TRACE, PARENT = "1" * 32, "2" * 16
TRACEPARENT = ("traceparent", f"00-{TRACE}-{PARENT}-01")
_exporter = InMemorySpanExporter()


@pytest.fixture(scope="session")
def _provider() -> None:
    """For the rest of this process: OpenTelemetry lets nobody take it back."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(_exporter))
    trace.set_tracer_provider(provider)


@pytest.fixture
def exported(_provider: None) -> Iterator[InMemorySpanExporter]:
    _exporter.clear()
    yield _exporter
    _exporter.clear()


async def turn(request: bytes, context: Any) -> bytes:
    return request[::-1]


async def fail(request: bytes, context: Any) -> bytes:
    raise RuntimeError("secret of /var/lib")


async def refuse(request: bytes, context: Any) -> bytes:
    raise invalid("not so")


async def echo(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        with tracing.span("echo", size=len(request)):
            yield request


async def watch(request: bytes, context: Any) -> AsyncIterator[bytes]:
    yield b"nothing"


@asynccontextmanager
async def served() -> AsyncIterator[aio.Channel]:
    """A traced channel to a server of `METHODS`."""
    server = aio.server(interceptors=[RpcBoundary({}, {}, {}, 1000, 100, 100)])
    of_one: Any = grpc.unary_unary_rpc_method_handler
    handlers = [of_one(turn), of_one(fail), of_one(refuse), grpc.stream_stream_rpc_method_handler(echo)]
    handlers.append(grpc.unary_stream_rpc_method_handler(watch))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(SERVICE, dict(zip(METHODS, handlers, strict=True)))]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)


def of_kind(exported: InMemorySpanExporter, kind: SpanKind) -> list[ReadableSpan]:
    return [span for span in exported.get_finished_spans() if span.kind is kind]


def ids(span: ReadableSpan) -> tuple[str, str]:
    """Trace and parent."""
    assert span.context is not None
    parent = "" if span.parent is None else trace.format_span_id(span.parent.span_id)
    return trace.format_trace_id(span.context.trace_id), parent


@pytest.mark.parametrize(
    ("name", "code", "status"),
    [
        ("Turn", "OK", StatusCode.UNSET),
        ("Refuse", "INVALID_ARGUMENT", StatusCode.UNSET),
        ("Fail", "INTERNAL", StatusCode.ERROR),
    ],
)
async def test_an_rpc_is_a_span_in_the_trace_of_its_caller(
    exported: InMemorySpanExporter, name: str, code: str, status: StatusCode
) -> None:
    async with served() as channel:
        method: Any = channel.unary_unary(f"/{SERVICE}/{name}")
        call = method(b"ab", timeout=SECONDS, metadata=(TRACEPARENT,))
        assert (await call.code()).name == code
        async with asyncio.timeout(SECONDS):  # who is refused hears of it before the span ends
            while not of_kind(exported, SpanKind.SERVER):  # noqa: ASYNC110 - there is no event for a span
                await asyncio.sleep(0.01)
    [span] = of_kind(exported, SpanKind.SERVER)
    assert (span.name, ids(span)) == (f"{SERVICE}/{name}", (TRACE, PARENT))
    attributes = dict(span.attributes or {})
    assert len(str(attributes.pop("feddymem.request_id"))) == 32
    assert attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": f"{SERVICE}/{name}",
        "rpc.response.status_code": code,
    }
    assert span.status.status_code is status
    assert span.events == ()


@pytest.mark.parametrize("header", ["", "00-zz", f"00-{'0' * 32}-{PARENT}-01", "x" * 4000])
async def test_what_is_no_trace_begins_a_new_one(exported: InMemorySpanExporter, header: str) -> None:
    async with served() as channel:
        call: Any = channel.unary_unary(f"/{SERVICE}/Turn")
        await call(b"ab", timeout=SECONDS, metadata=(("traceparent", header), ("baggage", "site=a")))
    [span] = of_kind(exported, SpanKind.SERVER)
    assert ids(span)[0] != TRACE
    assert ids(span)[1] == ""


@pytest.mark.parametrize(("state", "kept"), [("vendor=1", 1), (f"vendor={'x' * 200},b={'y' * 200},c={'z' * 200}", 0)])
async def test_the_state_of_a_trace_is_kept_unless_it_is_long(
    exported: InMemorySpanExporter, state: str, kept: int
) -> None:
    async with served() as channel:
        call: Any = channel.unary_unary(f"/{SERVICE}/Turn")
        await call(b"ab", timeout=SECONDS, metadata=(TRACEPARENT, ("tracestate", state)))
    [span] = of_kind(exported, SpanKind.SERVER)
    assert span.context is not None
    assert len(span.context.trace_state) == kept


async def test_a_stream_is_a_span_until_its_end_and_what_is_done_in_it_is_below(exported: InMemorySpanExporter) -> None:
    async with served() as channel:
        stream: Any = channel.stream_stream(f"/{SERVICE}/Echo")(timeout=SECONDS, metadata=(TRACEPARENT,))
        for size in (1, 2):
            await stream.write(bytes(size))
            await stream.read()
        assert of_kind(exported, SpanKind.SERVER) == []
        await stream.done_writing()
        assert await stream.read() is aio.EOF
        await stream.code()
    [span] = of_kind(exported, SpanKind.SERVER)
    assert span.context is not None
    parts = of_kind(exported, SpanKind.INTERNAL)
    assert [ids(part) for part in parts] == [(TRACE, trace.format_span_id(span.context.span_id))] * 2
    assert [dict(part.attributes or {}) for part in parts] == [{"feddymem.size": 1}, {"feddymem.size": 2}]


async def test_watches_and_methods_that_are_not_there_make_no_spans(exported: InMemorySpanExporter) -> None:
    async with served() as channel:
        any_channel: Any = channel
        async for _ in any_channel.unary_stream(f"/{SERVICE}/WatchNothing")(b"", timeout=SECONDS):
            pass
        missing = any_channel.unary_unary(f"/{SERVICE}/Missing")(b"", timeout=SECONDS)
        assert await missing.code() is grpc.StatusCode.UNIMPLEMENTED
    assert exported.get_finished_spans() == ()


@pytest.mark.parametrize(("name", "status"), [("Turn", StatusCode.UNSET), ("Refuse", StatusCode.ERROR)])
async def test_a_call_between_services_is_a_span_that_its_server_continues(
    exported: InMemorySpanExporter, name: str, status: StatusCode
) -> None:
    async with served() as plain:
        channel: Any = tracing.traced_channel(plain)
        with tracing.span("round", root=True):
            call = channel.unary_unary(f"/{SERVICE}/{name}")(b"ab", timeout=SECONDS)
            await call.code()
    [whole] = of_kind(exported, SpanKind.INTERNAL)
    [sent], [received] = of_kind(exported, SpanKind.CLIENT), of_kind(exported, SpanKind.SERVER)
    assert whole.context is not None
    assert sent.context is not None
    assert ids(sent) == (trace.format_trace_id(whole.context.trace_id), trace.format_span_id(whole.context.span_id))
    assert ids(received) == (ids(sent)[0], trace.format_span_id(sent.context.span_id))
    assert sent.status.status_code is status  # who is refused has failed


def test_what_fails_in_a_span_fails_it_and_its_text_stays_in_the_log(exported: InMemorySpanExporter) -> None:
    with pytest.raises(RuntimeError), tracing.span("work"):
        raise RuntimeError("secret")
    [span] = exported.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert "secret" not in span.to_json()
    assert dict(span.attributes or {}) == {"error.type": "RuntimeError"}


def test_parts_have_the_times_that_they_had(exported: InMemorySpanExporter) -> None:
    with tracing.span("whole") as whole:
        tracing.add_part(whole, "part", 10.0, 10.25, images=3)
    [part, _whole] = exported.get_finished_spans()
    assert (part.end_time or 0) - (part.start_time or 0) == 250_000_000
    assert dict(part.attributes or {}) == {"feddymem.images": 3}


def score(request: InspectRequest) -> InspectResponse:
    return InspectResponse(score=len(request.encoded))


async def test_the_clients_call_within_the_trace_of_their_program(exported: InMemorySpanExporter) -> None:
    with scripted_service(score) as service, tracing.span("part", root=True) as begun:
        with InspectionClient(service.address) as client:
            client.inspect(b"x")
            assert len(list(client.inspect_many([b"x"] * 3))) == 3  # on other threads
        async with AsyncInspectionClient(service.address) as another:
            await another.inspect(b"x")
            assert len([outcome async for outcome in another.inspect_many([b"x"] * 3)]) == 3
    context = begun.get_span_context()
    wanted = trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)
    assert [ids(span) for span in of_kind(exported, SpanKind.CLIENT)] == [wanted] * 8


async def test_repetitions_are_in_one_span_and_its_status_is_the_last_one(exported: InMemorySpanExporter) -> None:
    with (
        scripted_service(lambda _request: grpc.StatusCode.RESOURCE_EXHAUSTED) as service,
        InspectionClient(service.address, attempts=2) as client,
        pytest.raises(OverloadedError),
    ):
        client.inspect(b"x")
    assert len(service.requests) == 2
    [span] = of_kind(exported, SpanKind.CLIENT)
    assert dict(span.attributes or {})["rpc.response.status_code"] == "RESOURCE_EXHAUSTED"
    assert span.status.status_code is StatusCode.ERROR


def log_lines(program: str) -> list[dict[str, str]]:
    """What a process logs whose logs are set up as those of a service."""
    setup = "import logging; from services.runtime.logs import configure_logs, get_logger; configure_logs('auto')\n"
    run = subprocess.run(
        [sys.executable, "-c", setup + program], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout == ""
    return [json.loads(line) for line in run.stderr.splitlines()]


def test_lines_in_a_trace_name_it_and_those_of_libraries_are_like_ours() -> None:
    context = f"trace.SpanContext({int(TRACE, 16)}, {int(PARENT, 16)}, is_remote=False)"
    inside, outside = log_lines(f"""
from opentelemetry import trace
with trace.use_span(trace.NonRecordingSpan({context})):
    logging.getLogger("some.library").warning("%d things", 3)
    logging.getLogger("some.library").info("nothing to say")
get_logger().info("later")
""")
    assert (inside["trace_id"], inside["span_id"]) == (TRACE, PARENT)
    assert (inside["event"], inside["logger"], inside["text"]) == ("library", "some.library", "3 things")
    assert (inside["level"], outside["event"]) == ("warning", "later")
    assert "trace_id" not in outside


def test_a_collector_that_is_away_is_told_of_once_a_while() -> None:
    told = log_lines(f"""
from services.runtime import trace_export
now = 1000.0
trace_export.time.monotonic = lambda: now
trouble = trace_export._Trouble()
for _ in range(20):
    trouble.handle(logging.LogRecord("opentelemetry", logging.ERROR, "", 0, "away", None, None))
now += {TELL_SECONDS}
trouble.handle(logging.LogRecord("opentelemetry", logging.ERROR, "", 0, "still", None, None))
""")
    assert [(line["event"], line["reason"], line["level"]) for line in told] == [
        ("traces_not_sent", "away", "warning"),
        ("traces_not_sent", "still", "warning"),
    ]
