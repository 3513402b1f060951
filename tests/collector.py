"""A receiver of OTLP that keeps the spans it is sent; `python -m tests.collector` prints them, a line each."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage

PATIENCE_SECONDS = 60
_POLL_SECONDS = 0.05
_KINDS = {SpanMessage.SPAN_KIND_CLIENT: "client", SpanMessage.SPAN_KIND_SERVER: "server"}


@dataclass(frozen=True)
class Span:
    """A span as it came.

    Attributes:
        service: name of the program that has made it.
        name: says what was done.
        kind: client, server or internal.
        trace: id of its trace.
        id: its own.
        parent: of its parent; empty for none.
        seconds: how long it took.
        failed: whether its status is an error.
        links: traces and ids of spans that it links to.
        attributes: by name.
        events: their names.
    """

    service: str
    name: str
    kind: str
    trace: str
    id: str
    parent: str
    seconds: float
    failed: bool
    links: tuple[tuple[str, str], ...]
    attributes: Mapping[str, str | int]
    events: tuple[str, ...]


@dataclass(eq=False)
class Collector:
    """A running receiver.

    Attributes:
        endpoint: as OTEL_EXPORTER_OTLP_ENDPOINT wants it.
        spans: all that have come.
    """

    endpoint: str
    spans: list[Span] = field(default_factory=list)

    def wait_for(self, count: int, name: str, **wanted: str) -> list[Span]:
        """Waits until as many spans of a name have come, and such attributes of `Span`; all of them.

        Raises:
            AssertionError: they did not in time.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(found := self._find(name, wanted)) < count:
            assert time.monotonic() < deadline, f"{len(found)} spans {name} {wanted}; all: {self._names()}"
            time.sleep(_POLL_SECONDS)
        return found

    def one(self, name: str, **wanted: str) -> Span:
        """Waits for the only such span."""
        [span] = self.wait_for(1, name, **wanted)
        return span

    def _find(self, name: str, wanted: Mapping[str, str]) -> list[Span]:
        return [s for s in list(self.spans) if s.name == name and all(getattr(s, k) == v for k, v in wanted.items())]

    def _names(self) -> list[tuple[str, str]]:
        return sorted({(span.service, span.name) for span in self.spans})


@contextmanager
def collecting(port: int = 0) -> Iterator[Collector]:
    """Receives at a port of this machine, by default a free one, until the block is left."""
    server = grpc.server(ThreadPoolExecutor(4))
    collector = Collector(f"http://127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}")
    add_TraceServiceServicer_to_server(_Servicer(collector.spans), server)
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()


class _Servicer(TraceServiceServicer):
    def __init__(self, spans: list[Span]) -> None:
        self._spans = spans

    def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:  # noqa: N802
        for of_resource in request.resource_spans:
            service = str(_values(of_resource.resource.attributes)["service.name"])
            self._spans += [_span(service, span) for scope in of_resource.scope_spans for span in scope.spans]
        return ExportTraceServiceResponse()


def _span(service: str, span: SpanMessage) -> Span:
    return Span(
        service=service,
        name=span.name,
        kind=_KINDS.get(span.kind, "internal"),
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        failed=span.status.code == span.status.STATUS_CODE_ERROR,
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        attributes=_values(span.attributes),
        events=tuple(event.name for event in span.events),
    )


def _values(attributes: Any) -> dict[str, str | int]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


def _print(port: int) -> None:
    shown = 0
    with collecting(port) as collector:
        sys.stdout.write(f"OTEL_EXPORTER_OTLP_ENDPOINT={collector.endpoint}\n")
        while True:
            for span in collector.spans[shown:]:
                shown += 1
                named = " ".join(f"{key}={value}" for key, value in span.attributes.items())
                ids = f"{span.trace} {span.id} < {span.parent or 'none':16}"
                sys.stdout.write(f"{ids} {span.service} {span.name} {span.seconds * 1000:.1f} ms {named}\n")
            sys.stdout.flush()
            threading.Event().wait(_POLL_SECONDS)


if __name__ == "__main__":
    _print(int(sys.argv[1]) if len(sys.argv) > 1 else 4317)
