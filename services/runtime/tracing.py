"""What RPCs and rounds consist of, as spans of OpenTelemetry; where no tracing is set up, next to nothing is done.

Attributes are names, numbers and statuses, never what an image or a bank holds. `services.runtime.trace_export` sends
spans, and cuts what callers have named.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import grpc
from grpc import aio
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, Link, Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import feddymem
from feddymem.client.tracing import STATUS_CODE, end_call, metadata_of, rpc_attributes
from services.runtime.methods import is_work

_LONGEST_STATE = 512
"""Characters of `tracestate` that everybody must take by W3C's recommendation; a longer one is passed over."""
_FAULTS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""Statuses that are a server's errors by OpenTelemetry's conventions; others are its callers'."""

_tracer = trace.get_tracer("feddymem", feddymem.__version__)
_propagator = TraceContextTextMapPropagator()
_ends: set[asyncio.Task[None]] = set()
"""Of calls under way: an event loop holds its tasks only weakly."""


def enabled() -> bool:
    """Whether somebody wants spans."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def begin_rpc(method: str, context: aio.ServicerContext[Any, Any], request_id: str) -> Span:
    """The span of an RPC that has come in; of no trace where none is wanted. To be made current, and ended."""
    if not enabled() or not is_work(method):
        return INVALID_SPAN
    return _tracer.start_span(
        method[1:],
        _propagator.extract(dict(_trace_context(context)), Context()),
        kind=SpanKind.SERVER,
        attributes={**rpc_attributes(method[1:]), "feddymem.request_id": request_id},
    )


def current(span: Span) -> AbstractContextManager[object]:
    """Makes a span the current one inside the block."""
    if span is INVALID_SPAN:
        return nullcontext()
    return trace.use_span(span, record_exception=False, set_status_on_exception=False)


def end_rpc(span: Span, code: grpc.StatusCode) -> None:
    """Ends the span of an RPC."""
    span.set_attribute(STATUS_CODE, code.name)
    if code in _FAULTS:
        span.set_status(StatusCode.ERROR)
    span.end()


@contextmanager
def span(name: str, links: Sequence[Link] = (), root: bool = False, **attributes: str | int) -> Iterator[Span]:
    """A span of what the block does.

    Args:
        name: says what.
        links: to what has led to it.
        root: whether it begins a trace.
        attributes: without the prefix `feddymem.`.
    """
    if not enabled():
        yield INVALID_SPAN
        return
    with _tracer.start_as_current_span(
        name,
        Context() if root else None,
        links=links,
        attributes=_prefixed(attributes),
        record_exception=False,  # its text may hold what somebody has sent; the log has it, under the same trace
        set_status_on_exception=False,
    ) as begun:
        try:
            yield begun
        except Exception as error:
            begun.set_attribute("error.type", type(error).__name__)
            begun.set_status(StatusCode.ERROR)
            raise


def add_part(whole: Span, name: str, began: float, ended: float, **attributes: str | int) -> None:
    """Adds a part to a span after it was done; on any thread.

    Args:
        whole: the span.
        name: says what the part was.
        began: time by `time.monotonic`.
        ended: likewise.
        attributes: without the prefix `feddymem.`.
    """
    if not whole.is_recording():
        return
    offset = time.time_ns() - time.monotonic_ns()
    part = _tracer.start_span(
        name,
        trace.set_span_in_context(whole, Context()),
        attributes=_prefixed(attributes),
        start_time=int(began * 1e9) + offset,
    )
    part.end(int(ended * 1e9) + offset)


def note(of: Span, **attributes: str | int) -> None:
    """Adds attributes to a span, without the prefix `feddymem.`."""
    if of.is_recording():
        of.set_attributes(_prefixed(attributes))


def add_event(name: str) -> None:
    """Notes in the current span that something began."""
    trace.get_current_span().add_event(name)


def link_to_current() -> Link | None:
    """A link to the current span; None outside of traces."""
    context = trace.get_current_span().get_span_context()
    return Link(context) if context.is_valid else None


def traced_channel(channel: aio.Channel) -> aio.Channel:
    """A channel for stubs whose calls have spans, and take their trace along."""
    return cast("aio.Channel", _TracedChannel(channel))


class _TracedChannel:
    def __init__(self, channel: aio.Channel) -> None:
        self._channel = channel

    def __getattr__(self, name: str) -> Any:
        """Of the kinds of methods, `unary_unary` to `stream_stream`."""
        make = getattr(self._channel, name)

        def made(method: str, **more: Any) -> Any:
            call = make(method, **more)
            return partial(_begin_call, call, method[1:]) if is_work(method) else call

        return made


def _begin_call(call: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    if not enabled():
        return call(*args, **kwargs)
    begun = _tracer.start_span(method, kind=SpanKind.CLIENT, attributes=rpc_attributes(method))
    under_way = call(*args, **kwargs, metadata=metadata_of(begun))
    end = asyncio.create_task(_end_call(begun, under_way))
    _ends.add(end)
    end.add_done_callback(_ends.discard)
    return under_way


async def _end_call(begun: Span, call: aio.Call) -> None:
    try:
        end_call(begun, await call.code())
    finally:
        begun.end()


def _trace_context(context: aio.ServicerContext[Any, Any]) -> Iterable[tuple[str, str]]:
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent" or (key == "tracestate" and len(value) <= _LONGEST_STATE):
            yield key, str(value)


def _prefixed(attributes: dict[str, str | int]) -> dict[str, str | int]:
    return {f"feddymem.{name}": value for name, value in attributes.items()}
