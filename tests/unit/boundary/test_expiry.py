"""Calls of those whose certificate expires."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc._cython.cygrpc import SSLSessionCacheLRU

from feddymem.client.tls import async_channel_to
from feddymem.v1.inspection_pb2 import InspectStreamRequest
from feddymem.v1.release_pb2 import WatchReleasesRequest
from services.runtime.identity import Role
from tests.certificates import Authority
from tests.unit.boundary.serving import (
    HEALTH,
    INSPECTION,
    METHODS,
    REFLECTION,
    RELEASES,
    SECONDS,
    ended,
    outcome,
    served,
)

SHORT_SECONDS = 3
EXPIRED = grpc.StatusCode.UNAUTHENTICATED, "the certificate has expired; renew it and connect again"
STREAMS = {
    f"{RELEASES}/WatchReleases": WatchReleasesRequest().SerializeToString(),
    f"{INSPECTION}/InspectStream": InspectStreamRequest(id="1").SerializeToString(),
    f"{HEALTH}/Watch": b"",
    REFLECTION: b"",
}


async def begun_before(expires: float, channel: aio.Channel) -> tuple[list[Any], Any] | None:
    """As `begun`; None where the machine was too slow for it."""
    try:
        streams = await begun(channel)
    except (aio.AioRpcError, asyncio.InvalidStateError):
        assert time.time() >= expires
        return None
    return streams if time.time() < expires else None


async def begun(channel: aio.Channel) -> tuple[list[Any], Any]:
    """Streams of every kind that are open, and one that is blocked, because nobody reads."""
    calls = []
    for method, request in STREAMS.items():
        rpc: Any = channel.stream_stream(method)
        call = rpc(timeout=SECONDS)
        await call.write(request)
        calls.append(call)
    unread: Any = channel.stream_stream(f"{INSPECTION}/InspectStream")(timeout=SECONDS)
    await unread.write(InspectStreamRequest(id="flood").SerializeToString())
    if await unread.read() is aio.EOF:  # it came last on its connection, so the others have come before it
        raise asyncio.InvalidStateError
    return calls, unread


async def test_open_streams_end_when_the_certificate_of_who_calls_expires(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    hub = authority.issue(Role.INFERENCE, "berlin")
    async with served(tmp_path, hub) as address:
        for seconds in (SHORT_SECONDS, 3 * SHORT_SECONDS, 6 * SHORT_SECONDS):  # more, where the machine is too slow
            expires = time.time() + seconds - 1  # at the earliest: certificates have whole seconds
            short = authority.issue(Role.LINE, f"short-{seconds}", days=seconds / 86_400)
            async with async_channel_to(address, [], short) as channel:
                streams = await begun_before(expires, channel)
                if streams is None:
                    continue
                calls, unread = streams
                ends = await asyncio.gather(*(ended(call) for call in calls))
                assert time.time() >= expires
                assert ends == [EXPIRED] * len(STREAMS)
                assert await ended(unread) == EXPIRED
                for method in METHODS:  # on the connection that is still open
                    assert (await outcome(channel, method, b""))[:2] == EXPIRED
                return
    pytest.fail("no streams were begun in time")


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
        EXPIRED,
        (grpc.StatusCode.UNAVAILABLE, details),
    ]
