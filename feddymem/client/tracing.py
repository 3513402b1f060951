"""Calls as part of a trace, by OpenTelemetry's API alone.

Where the program has set up no tracing, all of this does nothing. The context of a trace goes along as W3C
`traceparent`; baggage does not, whatever the program has in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import feddymem

STATUS_CODE = "rpc.response.status_code"
"""Attribute of a span: name of the gRPC status code."""

Metadata = tuple[tuple[str, str], ...]

_INSPECT = "feddymem.v1.InspectionService/Inspect"
_tracer = trace.get_tracer("feddymem.client", feddymem.__version__)
_propagator = TraceContextTextMapPropagator()


@contextmanager
def traced_inspection(parent: Context | None = None) -> Iterator[Metadata | None]:
    """A span for one call of Inspect, its repetitions included, inside the block.

    Args:
        parent: the span is made in it; None for the current context.

    Yields:
        What the call must send along; None outside of traces.
    """
    with _tracer.start_as_current_span(
        _INSPECT,
        parent,
        kind=SpanKind.CLIENT,
        attributes=rpc_attributes(_INSPECT),
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield metadata_of(span)
        except grpc.RpcError as error:
            end_call(span, error.code())
            raise
        end_call(span, grpc.StatusCode.OK)


def rpc_attributes(method: str) -> dict[str, str]:
    """What OpenTelemetry's conventions want to know of an RPC.

    Args:
        method: its full name, as in `package.Service/Method`.
    """
    return {"rpc.system.name": "grpc", "rpc.method": method}


def metadata_of(span: Span) -> Metadata | None:
    """What a call must send along to be part of a span's trace; None where there is no trace."""
    if not span.get_span_context().is_valid:
        return None
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, trace.set_span_in_context(span, Context()))
    return tuple(carrier.items())


def end_call(span: Span, code: grpc.StatusCode) -> None:
    """Notes how a call ended, as its caller sees it."""
    span.set_attribute(STATUS_CODE, code.name)
    if code is not grpc.StatusCode.OK:
        span.set_status(StatusCode.ERROR)
