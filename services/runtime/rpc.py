"""Around every RPC: who may call, how often and for how long; bytes become messages, errors statuses; all is counted.

Whatever goes wrong, the caller gets a proper status with a request id, under which the log tells more.
"""

from __future__ import annotations

import asyncio
import functools
import time
import uuid
from collections import Counter as Tally
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext
from typing import Any

import grpc
from grpc import aio
from prometheus_client import Counter, Histogram
from structlog.contextvars import bound_contextvars

from feddymem.client.channel import REQUEST_ID
from services.runtime import tracing
from services.runtime.audit import audited
from services.runtime.changes import Changes
from services.runtime.checksums import with_checksum
from services.runtime.errors import Refusal, as_refusal, is_disk_full
from services.runtime.identity import Identity, Role, caller, denied, expired, seconds_until_expiry
from services.runtime.logs import get_logger
from services.runtime.methods import is_ours, is_work
from services.runtime.rate import Rate
from services.runtime.receiving import Bodies, SingleRequests, requests_of

RPCS_STARTED = Counter("feddymem_rpc_started_total", "RPCs started, by method.", ["method"])
RPCS = Counter("feddymem_rpc_handled_total", "RPCs handled, by method and gRPC status code.", ["method", "code"])
RPC_SECONDS = Histogram(
    "feddymem_rpc_duration_seconds",
    "Time from the start to the end of an RPC, streams included.",
    ["method"],
    buckets=(0.1, 10),
)
RPCS_OVER_LIMIT = Counter(
    "feddymem_rpcs_over_limit_total",
    "RPCs refused because who called has begun (limit rate) or holds open (limits open and streams) too many, or "
    "because its request does not fit into memory (limit bytes).",
    ["method", "limit"],
)

Admission = Callable[[str, float | None], None]
"""Raises a `Refusal` where a request need not even be received; is told who calls, see `caller_name`, and the seconds
until that stops waiting, None for as long as it takes."""

Access = frozenset[Role]
"""Roles that may call a method, where there is TLS."""

MAX_TEXT_BYTES = 1000
"""Public texts are cut there: they repeat what callers send, and gRPC drops a status that is larger than its headers
may be, 8 KiB with each byte written as up to three."""

_LOGGED_PER_SECOND = 10
"""Refusals of a method that are logged, on average: an overloaded service must not be busy with its log."""
_started = functools.cache(RPCS_STARTED.labels)
_handled, _seconds = functools.cache(RPCS.labels), functools.cache(RPC_SECONDS.labels)
_BETWEEN_SERVICES = (
    "/feddymem.v1.FederationService/",
    "/feddymem.v1.ReleaseService/",
    "/feddymem.v1.FeedbackService/",
)
_SERIOUS = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
_Context = aio.ServicerContext[Any, Any]
_log = get_logger()


class RpcBoundary(aio.ServerInterceptor):
    """What is between the network and the servicers, health and reflection included.

    Args:
        access: who may call, by full name of a method; a method that is not there, nobody.
        admissions: of unary methods by full name; these may be called as often as they admit, and are counted apart
            among what is open: what they hold back keeps no other call out.
        audited: actions by full name of a method; that somebody may not call it is in the audit log.
        rpcs_per_second: of all other methods together, by one identity or, without TLS, from one address.
        open_rpcs: likewise, at once.
        open_streams: of methods that take a stream of requests, likewise.
        admitted: how many requests the admissions let wait; so many more of their methods may be open, as it is for
            the admissions to refuse what is too much, with a hint when to try again.
        held_bytes: of requests in memory, of all callers; None for any number.
    """

    def __init__(
        self,
        access: Mapping[str, Access],
        admissions: Mapping[str, Admission],
        audited: Mapping[str, str],
        rpcs_per_second: float,
        open_rpcs: int,
        open_streams: int,
        admitted: int = 0,
        held_bytes: int | None = None,
    ) -> None:
        self._access, self._admissions, self._audited = access, admissions, audited
        self._rpcs_per_second = rpcs_per_second
        self._begun, self._logged = Rate(rpcs_per_second), Rate(_LOGGED_PER_SECOND)
        self._open = _Open(open_rpcs, "open", "RPCs", "max_open_rpcs")
        self._open_admitted = _Open(open_rpcs + admitted, "open", "RPCs", "max_open_rpcs")
        self._open_streams = _Open(open_streams, "streams", "streams of requests", "max_open_streams")
        # Apart, so that who sends slowly does not keep a probe from its host out.
        self._requests_of_ours, self._other_requests = SingleRequests(), SingleRequests()
        self._bodies = Bodies(held_bytes)
        self._left_out: Tally[str] = Tally()
        self._busy: set[object] = set()
        self._changes = Changes()

    async def wait_idle(self, seconds: float) -> None:
        """Waits until no RPC of ours is in work, at most so long. Watches do not count: they never end."""
        deadline = time.monotonic() + seconds
        while self._busy and (left := deadline - time.monotonic()) > 0:
            await self._changes.wait(left)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps a handler.

        gRPC is not told how to read requests: it would answer bytes that are no message with UNKNOWN, and write a
        stack trace. A stream of one request, on the wire the same as a single one, can be refused before it is read.
        """
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        wrap, made = (
            (self._streaming, grpc.stream_stream_rpc_method_handler)
            if handler.response_streaming
            else (self._answering, grpc.stream_unary_rpc_method_handler)
        )
        return made(
            wrap(handler_call_details.method, handler),
            response_serializer=_serializer(handler_call_details.method, handler),
        )

    def _answering(self, method: str, handler: Any) -> Any:
        handle = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def handled(_requests: Any, context: _Context) -> Any:
            async with (
                self._call(method, context) as name,
                self._requests(method, name, context, handler) as (requests, _answered),
            ):
                with self._in_work(method):  # not before: who sends slowly must not hold up a shutdown
                    return await handle(requests, context)

        return handled

    def _streaming(self, method: str, handler: Any) -> Any:
        handle = handler.stream_stream if handler.request_streaming else handler.unary_stream

        async def handled(_requests: Any, context: _Context) -> None:
            async with (
                self._call(method, context) as name,
                self._requests(method, name, context, handler) as (requests, answered),
            ):
                with self._in_work(method):
                    responses = handle(requests, context)
                    if not isinstance(responses, AsyncGenerator):  # health writes by itself
                        await responses
                        return
                    async with aclosing(responses):
                        async for response in responses:
                            await context.write(response)
                            answered()

        return handled

    @asynccontextmanager
    async def _call(self, method: str, context: _Context) -> AsyncIterator[str]:
        """One RPC, from its start to its end; the name of who calls."""
        started, code = time.perf_counter(), grpc.StatusCode.CANCELLED
        _started(method).inc()
        request_id = uuid.uuid4().hex
        context.set_trailing_metadata(((REQUEST_ID, request_id),))
        span = tracing.begin_rpc(method, context, request_id)
        try:
            with tracing.current(span), bound_contextvars(request_id=request_id, method=method):
                try:
                    with self._admitted(method, context) as name:
                        async with _while_valid(context):
                            yield name
                    code = grpc.StatusCode.OK
                except aio.AbortError:  # health does so
                    code = _status(context.code())
                    raise
                except aio.InternalError as error:  # gRPC's, for a call that nobody waits for any more
                    raise asyncio.CancelledError from error
                except Exception as error:  # noqa: BLE001 - whatever it is, the caller is answered
                    refusal = self._refusal(method, context, error, request_id)
                    code = refusal.status
                    await context.abort(refusal.status, refusal.text)
        finally:
            tracing.end_rpc(span, code)
            _handled(method, code.name).inc()
            if is_ours(method):  # health and reflection are watched for as long as somebody likes
                _seconds(method).observe(time.perf_counter() - started)

    @contextmanager
    def _admitted(self, method: str, context: _Context) -> Iterator[str]:
        """An RPC that is not refused before any of it is received; the name of who calls."""
        who = caller(context)
        name, admit = _name(who, context), self._admissions.get(method)
        if admit is None and not self._begun.take(name):  # before all that writes to the audit log
            raise _over_limit(
                method, "rate", f"more than {self._rpcs_per_second:g} RPCs a second", "max_rpcs_per_second"
            )
        self._require_role(method, who, context)
        if admit:
            admit(name, context.time_remaining())
        with (self._open_admitted if admit else self._open).one_more(name, method):
            yield name

    def _require_role(self, method: str, who: Identity | None, context: _Context) -> None:
        allowed = self._access.get(method, Access())
        if who is None or who.role in allowed:
            return
        roles = " or ".join(sorted(allowed)) or "nobody"
        action = self._audited.get(method)
        with audited(context, action, federation="") if action else nullcontext():  # the request has not been read
            raise denied(f"the certificate is that of {who}; {method} is for {roles}")

    @asynccontextmanager
    async def _requests(
        self, method: str, name: str, context: _Context, handler: Any
    ) -> AsyncIterator[tuple[Any, Callable[[], None]]]:
        """What a handler takes, its one request or an iterator over them; and what is called for each answer of a
        stream, which is that to the oldest request that has none."""
        if not handler.request_streaming:
            places = self._requests_of_ours if is_ours(method) else self._other_requests
            request, size = await places.read(name, context, handler.request_deserializer)
            if not self._bodies.fits(name, size):
                RPCS_OVER_LIMIT.labels(method, "bytes").inc()
                raise self._bodies.refusal(size)
            with self._bodies.held(name, size):
                yield request, lambda: None
            return
        with self._open_streams.one_more(name, method), self._bodies.of_stream(name) as bodies:
            yield requests_of(context, handler.request_deserializer, bodies), bodies.answered

    def _refusal(self, method: str, context: _Context, error: Exception, request_id: str) -> Refusal:
        """What an error is answered with; logged once."""
        refusal = as_refusal(error)
        if refusal is None:
            _log.error("rpc_failed", exc_info=error)
            text = f"internal error; its details are in the server's log under request id {request_id}"
            return Refusal(grpc.StatusCode.INTERNAL, text)
        refusal = Refusal(refusal.status, _cut(refusal.text))
        if is_disk_full(error):
            _log.error("disk_full", reason=str(error))
        elif not self._logged.take(method):
            self._left_out[method] += 1
        else:
            log = _log.warning if refusal.status in _SERIOUS else _log.info
            left_out = {"left_out": left} if (left := self._left_out.pop(method, 0)) else {}
            who = _shown_name(context)
            log("rpc_refused", who=who, code=refusal.status.name, reason=refusal.text, **left_out)
        return refusal

    @contextmanager
    def _in_work(self, method: str) -> Iterator[None]:
        call = object()
        if is_work(method):
            self._busy.add(call)
        try:
            yield
        finally:
            self._busy.discard(call)
            self._changes.notify()


class _Open:
    """What each caller has open, at most so many at once.

    Args:
        most: how many.
        limit: its name among the metrics.
        what: is open, in words.
        setting: that says how many.
    """

    def __init__(self, most: int, limit: str, what: str, setting: str) -> None:
        self._most, self._limit, self._what, self._setting = most, limit, what, setting
        self._open: Tally[str] = Tally()

    @contextmanager
    def one_more(self, name: str, method: str) -> Iterator[None]:
        """Counts one of a caller inside the block, or refuses it."""
        if self._open[name] >= self._most:
            raise _over_limit(method, self._limit, f"more than {self._most} {self._what} at once", self._setting)
        self._open[name] += 1
        try:
            yield
        finally:
            self._open[name] -= 1
            if not self._open[name]:
                del self._open[name]


def _over_limit(method: str, limit: str, what: str, setting: str) -> Refusal:
    RPCS_OVER_LIMIT.labels(method, limit).inc()
    return Refusal(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"{what} from here; do with fewer, or have the operator of this service raise {setting}",
    )


def _serializer(method: str, handler: Any) -> Any:
    """Lines get no checksum: they do not look for one, and a map is large."""
    return (
        with_checksum(handler.response_serializer)
        if method.startswith(_BETWEEN_SERVICES)
        else handler.response_serializer
    )


@asynccontextmanager
async def _while_valid(context: _Context) -> AsyncIterator[None]:
    """Ends the block when the certificate of who calls expires."""
    try:
        async with asyncio.timeout(seconds_until_expiry(context)) as validity:
            yield
    except TimeoutError as error:
        if validity.expired():
            raise expired() from error
        raise


def caller_name(context: _Context) -> str:
    """Who is counted as one: an identity or, without TLS, a host.

    Raises:
        Refusal: see `services.runtime.identity.caller`.
    """
    return _name(caller(context), context)


def _name(who: Identity | None, context: _Context) -> str:
    return context.peer().rpartition(":")[0] if who is None else who.uri


def _shown_name(context: _Context) -> str:
    try:
        who = caller(context)
    except Refusal:
        who = None
    return context.peer() if who is None else who.uri


def _cut(text: str) -> str:
    raw = text.encode()
    if len(raw) <= MAX_TEXT_BYTES:
        return text
    return raw[:MAX_TEXT_BYTES].decode(errors="ignore") + " ..."


def _status(code: Any) -> grpc.StatusCode:
    return next((status for status in grpc.StatusCode if code in (status, status.value[0])), grpc.StatusCode.UNKNOWN)
