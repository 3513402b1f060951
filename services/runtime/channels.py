"""Channels and the options of both their ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from grpc import aio

from feddymem.client.channel import CONNECT_OPTIONS, KEEPALIVE_OPTIONS, KEEPALIVE_SECONDS
from feddymem.client.tls import async_channel_to
from services.runtime.settings import ClientSettings

FAREWELL_SECONDS = 0.5
"""Time that a stopping server gives its watchers to hear that it is not serving any more."""
MAX_MESSAGE_BYTES = 4 * 2**20
"""Largest message between services: chunks and manifests are far below it."""

MAX_STREAMS = 128
"""RPCs of one connection at once; more wait at the caller."""

SERVER_OPTIONS = [
    *KEEPALIVE_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 1000 // 2),
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
]

CHANNEL_OPTIONS = [
    *CONNECT_OPTIONS,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]


class UnreachableError(Exception):
    """Another service cannot be reached; trying again may help."""


TRANSIENT = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})
"""Statuses after which an idempotent call is tried again."""


@asynccontextmanager
async def connected(address: str, settings: ClientSettings) -> AsyncIterator[aio.Channel]:
    """A channel to another service, once it is connected.

    For as long as the block goes on, it reconnects by itself, with the certificate of its start: whoever tries again
    after an error opens another one, so that a renewed certificate counts.

    Raises:
        UnreachableError: not connected within `rpc_timeout_seconds`.
        TlsError: the TLS files cannot be used.
    """
    async with async_channel_to(address, CHANNEL_OPTIONS, settings.tls_dir) as channel:
        try:
            async with asyncio.timeout(settings.rpc_timeout_seconds):
                await channel.channel_ready()
        except TimeoutError:
            trusted = "" if settings.tls_dir is None else ", or one of the two certificates is not accepted"
            raise UnreachableError(
                f"{address} cannot be reached within {settings.rpc_timeout_seconds:g} seconds: nobody listens{trusted}"
            ) from None
        yield channel
