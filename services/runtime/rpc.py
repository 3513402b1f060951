"""Around every RPC of ours: errors become statuses by the catalogue, and the call is counted after it has ended."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc
from grpc import aio
from prometheus_client import Counter, Histogram

from services.runtime.changes import Changes
from services.runtime.errors import as_refusal, invalid, is_disk_full
from services.runtime.identity import Role, caller, denied
from services.runtime.logs import get_logger

RPCS = Counter("feddymem_rpc_handled_total", "RPCs handled, by method and gRPC status code.", ["method", "code"])
RPC_SECONDS = Histogram(
    "feddymem_rpc_duration_seconds",
    "Time from the start to the end of an RPC, streams included.",
    ["method"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 600),
)

Admission = Callable[[aio.ServicerContext[Any, Any]], None]
"""Raises a `Refusal` where a request need not even be received."""

Access = frozenset[Role]
"""Roles that may call a method, where there is TLS."""

_OURS = ("/feddymem.", "/inference.")
_log = get_logger()


class RpcBoundary(aio.ServerInterceptor):
    """Turns what a servicer raises into a status, and records the RPC.

    Args:
        access: who may call, by full name of a method; a method that is not there, nobody.
        admissions: of unary methods by full name.
    """

    def __init__(self, access: Mapping[str, Access], admissions: Mapping[str, Admission]) -> None:
        self._access, self._admissions = access, admissions
        self._busy: set[object] = set()
        self._changes = Changes()

    async def wait_idle(self, seconds: float) -> None:
        """Waits until no RPC is in work, at most so long. Watches do not count: they never end by themselves."""
        deadline = time.monotonic() + seconds
        while self._busy and (left := deadline - time.monotonic()) > 0:
            await self._changes.wait(left)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the handlers of our own services; health and reflection answer for themselves."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_OURS):
            return handler
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            if handler.request_streaming:
                return grpc.stream_stream_rpc_method_handler(self._stream(method, handler.stream_stream), **codec)
            return grpc.unary_stream_rpc_method_handler(self._stream(method, handler.unary_stream), **codec)
        if admit := self._admissions.get(method):
            # A stream of one request, on the wire the same as a single one, can be refused before it is read.
            return grpc.stream_unary_rpc_method_handler(self._admitted(method, handler.unary_unary, admit), **codec)
        return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), **codec)

    def _unary(self, method: str, handle: Any) -> Any:
        async def handled(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            with self._in_work(method):
                async with _Call(method, context):
                    self._authorize(method, context)
                    return await handle(request, context)

        return handled

    def _admitted(self, method: str, handle: Any, admit: Admission) -> Any:
        async def handled(_requests: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            async with _Call(method, context):
                self._authorize(method, context)
                admit(context)
                request = await context.read()  # not in work yet: who sends slowly must not hold up a shutdown
                if request is aio.EOF:
                    raise invalid("the call ended without a request; send one")
                with self._in_work(method):
                    return await handle(request, context)

        return handled

    def _stream(self, method: str, handle: Any) -> Any:
        async def handled(request: Any, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            with self._in_work(method):
                async with _Call(method, context):
                    self._authorize(method, context)
                    async for response in handle(request, context):
                        yield response

        return handled

    def _authorize(self, method: str, context: aio.ServicerContext[Any, Any]) -> None:
        who = caller(context)
        allowed = self._access.get(method, Access())
        if who is not None and who.role not in allowed:
            roles = " or ".join(sorted(allowed)) or "nobody"
            _log.warning("access_denied", method=method, who=who.uri)
            raise denied(f"the certificate is that of {who}; {method} is for {roles}")

    @contextmanager
    def _in_work(self, method: str) -> Iterator[None]:
        call = object()
        if not method.rpartition("/")[2].startswith("Watch"):
            self._busy.add(call)
        try:
            yield
        finally:
            self._busy.discard(call)
            self._changes.notify()


class _Call:
    """One RPC, from its start to its end."""

    def __init__(self, method: str, context: aio.ServicerContext[Any, Any]) -> None:
        self._method, self._context = method, context
        self._start = time.perf_counter()
        self._code = grpc.StatusCode.OK

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object
    ) -> None:
        try:
            if isinstance(error, Exception) and not isinstance(error, aio.AbortError):
                await self._refuse(error)
            elif error is not None:
                self._code = grpc.StatusCode.CANCELLED
        finally:
            RPCS.labels(self._method, self._code.name).inc()
            RPC_SECONDS.labels(self._method).observe(time.perf_counter() - self._start)

    async def _refuse(self, error: Exception) -> None:
        refusal = as_refusal(error)
        if refusal is not None:
            if is_disk_full(error):
                _log.error("disk_full", method=self._method, reason=str(error))
            self._code = refusal.status
            await self._context.abort(refusal.status, refusal.text)
        self._code = grpc.StatusCode.INTERNAL
        request_id = uuid.uuid4().hex
        _log.error("rpc_failed", method=self._method, request_id=request_id, exc_info=error)
        await self._context.abort(
            grpc.StatusCode.INTERNAL,
            f"internal error; its details are in the server's log under request id {request_id}",
        )
