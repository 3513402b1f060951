"""Channels and the options of both their ends."""

from __future__ import annotations

import grpc
from grpc import aio

from feddymem.client.channel import CONNECT_OPTIONS, KEEPALIVE_OPTIONS, KEEPALIVE_SECONDS

FAREWELL_SECONDS = 0.5
"""Time that a stopping server gives its watchers to hear that it is not serving any more."""
MAX_MESSAGE_BYTES = 4 * 2**20
"""Largest message between services: chunks and manifests are far below it."""

SERVER_OPTIONS = [
    *KEEPALIVE_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 1000 // 2),
    ("grpc.so_reuseport", 0),
]

CHANNEL_OPTIONS = [
    *CONNECT_OPTIONS,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]

TRANSIENT = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})
"""Statuses after which an idempotent call is tried again."""


def open_channel(address: str) -> aio.Channel:
    """A channel to another service; connects, and reconnects, by itself."""
    return aio.insecure_channel(address, options=CHANNEL_OPTIONS)
