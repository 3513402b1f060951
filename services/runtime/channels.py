"""Channels and the options of both their ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from grpc import aio

from feddymem.client.channel import CONNECT_OPTIONS, KEEPALIVE_OPTIONS, KEEPALIVE_SECONDS
from services.runtime.checksums import checked_channel
from services.runtime.identity import Role
from services.runtime.server_identity import UnreachableError, credentials_for
from services.runtime.settings import ClientSettings
from services.runtime.tracing import traced_channel

FAREWELL_SECONDS = 0.5
"""Time that a stopping server gives its watchers to hear that it is not serving any more."""
MAX_MESSAGE_BYTES = 2**20
"""Largest request between services: chunks are half of it, and all else is smaller."""
MAX_ANSWER_BYTES = 2**24
"""Largest answer: a release holds what each site tells of its held-out images, at most 9 KiB of each of 1,000 sites."""

CONNECTION_SECONDS = 20
"""Age at which a server has its callers connect anew; RPCs under way go on. A caller looks for servers only when it
connects: one that is new behind a name would otherwise get nothing until another one goes."""

MAX_STREAMS = 128
"""RPCs of one connection at once; more wait at the caller."""

SERVER_OPTIONS = [
    *KEEPALIVE_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 1000 // 2),
    ("grpc.so_reuseport", 0),
    ("grpc.max_connection_age_ms", CONNECTION_SECONDS * 1000),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    # Else gRPC measures what a line can carry, and takes as much of each message that nobody reads yet: all of 50 with
    # 8 MiB on one connection, 64 KiB of each with this. A stream still carries 9 MB/s where a round trip takes 50 ms.
    ("grpc.http2.bdp_probe", 0),
]

CHANNEL_OPTIONS = [
    *CONNECT_OPTIONS,
    ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
]


def bind(setting: str, address: str, add: Callable[[str], int]) -> str:
    """Binds an address; HOST:PORT as it is bound.

    Args:
        setting: its name.
        address: HOST:PORT; port 0 picks a free one.
        add: of a server, `add_insecure_port` or the like.

    Raises:
        OSError: it cannot be bound.
    """
    try:
        port = add(address)
    except RuntimeError as error:
        raise OSError(f"{setting}: {address} cannot be bound; is another process using it?") from error
    return f"{address.rpartition(':')[0]}:{port}"


@asynccontextmanager
async def connected(address: str, settings: ClientSettings, role: Role) -> AsyncIterator[aio.Channel]:
    """A channel to another service, once it is connected; its messages have checksums, its calls are parts of traces.

    For as long as the block goes on, it reconnects by itself, with the certificates of its start: whoever tries again
    after an error opens another one, so that a renewed certificate counts, be it the own one or the other's.

    Args:
        address: HOST:PORT of the service.
        settings: of this service.
        role: that the certificate of the other must have, where there is TLS; a site must be the own one.

    Raises:
        UnreachableError: not connected within `rpc_timeout_seconds`, or it is somebody else.
        TlsError: the TLS files cannot be used.
    """
    if settings.tls_dir is None:
        made, why = aio.insecure_channel(address, CHANNEL_OPTIONS), "nobody listens"
    else:
        shown = await credentials_for(address, settings.tls_dir, role, settings.rpc_timeout_seconds)
        made, why = aio.secure_channel(address, shown, CHANNEL_OPTIONS), "it does not accept this service's certificate"
    async with made as channel:
        try:
            async with asyncio.timeout(settings.rpc_timeout_seconds):
                await channel.channel_ready()
        except TimeoutError:
            raise UnreachableError(
                f"{address} cannot be reached within {settings.rpc_timeout_seconds:g} seconds: {why}"
            ) from None
        yield checked_channel(traced_channel(channel))
