"""Around every RPC: what is refused is refused before its request has arrived, and what is not is answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc import aio

from services.runtime.errors import Refusal, not_found
from services.runtime.rpc import RPC_SECONDS, RPCS, RPCS_STARTED, Admission, RpcBoundary

SECONDS = 30
METHOD = "/feddymem.test.Mirror/Turn"
REFUSAL = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "as many as are allowed")
Context = aio.ServicerContext[bytes, bytes]


async def turn(request: bytes, context: Context) -> bytes:
    if not request:
        raise not_found("nothing to turn")
    return request[::-1]


@asynccontextmanager
async def served(admit: Admission) -> AsyncIterator[aio.Channel]:
    """A channel to a server of one method, which has an admission."""
    server = aio.server(interceptors=[RpcBoundary({}, {METHOD: admit}, {}, 1000, 100, 100)])
    service, _, name = METHOD[1:].partition("/")
    handler: Any = grpc.unary_unary_rpc_method_handler(turn)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {name: handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)


def refuse(name: str, seconds_left: float | None) -> None:
    raise REFUSAL


def allow(name: str, seconds_left: float | None) -> None:
    """Nothing is refused."""


def handled(code: grpc.StatusCode) -> float:
    return RPCS.labels(METHOD, code.name)._value.get()  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", [1, 2**20])
async def test_what_is_admitted_is_answered(size: int) -> None:
    async with served(allow) as channel:
        call: Any = channel.unary_unary(METHOD)
        assert await call(b"a" + bytes(size), timeout=SECONDS) == bytes(size) + b"a"


async def test_what_is_refused_is_refused_before_its_request_has_come() -> None:
    """The caller has not sent any."""
    before = handled(REFUSAL.status)
    async with served(refuse) as channel:
        call: Any = channel.stream_unary(METHOD)(timeout=SECONDS)
        assert (await call.code(), await call.details()) == (REFUSAL.status, REFUSAL.text)
    assert handled(REFUSAL.status) == before + 1


@pytest.mark.parametrize("size", [1, 3 * 2**20])
async def test_callers_of_large_requests_are_told_why_too(size: int) -> None:
    async with served(refuse) as channel:
        call: Any = channel.unary_unary(METHOD)
        for _ in range(20):
            with pytest.raises(aio.AioRpcError) as caught:
                await call(bytes(size), timeout=SECONDS)
            assert (caught.value.code(), caught.value.details()) == (REFUSAL.status, REFUSAL.text)


async def test_what_the_handler_refuses_is_refused() -> None:
    async with served(allow) as channel:
        call: Any = channel.unary_unary(METHOD)
        with pytest.raises(aio.AioRpcError) as caught:
            await call(b"", timeout=SECONDS)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "nothing to turn")


async def test_a_call_that_ends_without_a_request_is_told_so() -> None:
    async with served(allow) as channel:
        call: Any = channel.stream_unary(METHOD)(timeout=SECONDS)
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await call.details() == "the call ended without a request; send one"


async def test_a_call_is_counted_as_started_at_once_and_as_handled_when_it_has_ended() -> None:
    def counts() -> tuple[float, float, float]:
        [seconds] = [s for s in RPC_SECONDS.labels(METHOD)._child_samples() if s.name == "_count"]
        return RPCS_STARTED.labels(METHOD)._value.get(), handled(grpc.StatusCode.OK), seconds.value

    started, ended, timed = counts()
    admitted = asyncio.Event()
    async with served(lambda _name, _seconds: admitted.set()) as channel:
        call: Any = channel.stream_unary(METHOD)(timeout=SECONDS)
        await asyncio.wait_for(admitted.wait(), SECONDS)
        assert counts() == (started + 1, ended, timed)
        await call.write(b"ab")
        await call.done_writing()
        assert await call == b"ba"
    assert counts() == (started + 1, ended + 1, timed + 1)
