"""Reading requests within bounds, so that nobody holds memory by sending slowly and much at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from weakref import WeakValueDictionary

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from services.runtime.checksums import without_checksum
from services.runtime.errors import Refusal, invalid

RECEIVED_AT_ONCE = 4
"""Single requests of one caller that are being received: enough that the line is never idle between two. The bytes of
further ones stay with the caller, as gRPC sends no more than a window of a message that nobody reads."""
RECEIVE_SECONDS = 60
"""Time that a single request may take to arrive, from when there is room for it: it keeps others of its caller out."""
SILENCE_SECONDS = 600
"""Wait for the next request of a stream, after which its caller counts as gone."""

BROKEN_OFF_SECONDS = 0.05
"""A request that broke off, or is too large, looks like none. Within this time gRPC cancels its call."""

_Context = aio.ServicerContext[Any, Any]


class SingleRequests:
    """Reads single requests, `RECEIVED_AT_ONCE` of each caller at the same time."""

    def __init__(self) -> None:
        # One for each caller that is sending: it goes when nobody waits for it or has a place in it.
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def read(self, name: str, context: _Context, deserializer: Any) -> Any:
        """The one request of a call; waits for a place, however long, before any of it is received.

        Args:
            name: of the caller.
            context: of the call.
            deserializer: makes a message of bytes; None where bytes are wanted.

        Raises:
            Refusal: DEADLINE_EXCEEDED where it does not arrive in time, INVALID_ARGUMENT where there is none or it is
                not a message, DATA_LOSS where it is damaged.
        """
        places = self._places.setdefault(name, asyncio.Semaphore(RECEIVED_AT_ONCE))
        async with places:
            too_slow = f"the request has not arrived within {RECEIVE_SECONDS:g} seconds; send less, or fewer at once"
            raw = await _next(context, RECEIVE_SECONDS, too_slow)
        if raw is aio.EOF:
            await asyncio.sleep(BROKEN_OFF_SECONDS)
            raise invalid("the call ended without a request; send one")
        return _message(raw, deserializer)


async def requests_of(context: _Context, deserializer: Any) -> AsyncIterator[Any]:
    """The requests of a stream, each read when it is asked for.

    Raises:
        Refusal: DEADLINE_EXCEEDED where none comes for `SILENCE_SECONDS`; else as `SingleRequests.read`.
    """
    silent = f"no request has come for {SILENCE_SECONDS:g} seconds; begin another stream when there is one"
    while (raw := await _next(context, SILENCE_SECONDS, silent)) is not aio.EOF:
        yield _message(raw, deserializer)


async def _next(context: _Context, seconds: float, otherwise: str) -> Any:
    try:
        async with asyncio.timeout(seconds):
            return await context.read()
    except TimeoutError:
        raise Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, otherwise) from None


def _message(raw: bytes, deserializer: Any) -> Any:
    if deserializer is None:
        return raw
    try:
        return deserializer(without_checksum(raw))
    except DecodeError as error:
        name = deserializer.__self__.DESCRIPTOR.full_name
        raise invalid(f"the request is not a valid {name} message: {error}") from error
