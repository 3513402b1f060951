"""Channels and the options of both their ends."""

from __future__ import annotations

import grpc
from grpc import aio

KEEPALIVE_SECONDS = 60
"""Pause between pings on an idle connection, for both ends: below the 4 minutes after which cloud load balancers cut
one, and
not below half of what a server tolerates (it answers too_many_pings otherwise)."""
KEEPALIVE_TIMEOUT_SECONDS = 20
"""Wait for the answer to a ping, after which a peer counts as gone."""
RECONNECT_SECONDS = 10
"""Longest pause between gRPC's own attempts to connect, so that a restarted server is found soon."""
FAREWELL_SECONDS = 0.5
"""Time that a stopping server gives its watchers to hear that it is not serving any more."""
MAX_MESSAGE_BYTES = 4 * 2**20
"""Largest message between services: chunks and manifests are far below it."""

_KEEPALIVE = [
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
]

SERVER_OPTIONS = [
    *_KEEPALIVE,
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 1000 // 2),
    ("grpc.so_reuseport", 0),
]

CHANNEL_OPTIONS = [
    *_KEEPALIVE,
    ("grpc.max_reconnect_backoff_ms", RECONNECT_SECONDS * 1000),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]

TRANSIENT = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})
"""Statuses after which an idempotent call is tried again."""


def open_channel(address: str) -> aio.Channel:
    """A channel to another service; connects, and reconnects, by itself."""
    return aio.insecure_channel(address, options=CHANNEL_OPTIONS)
