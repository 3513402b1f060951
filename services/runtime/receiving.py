"""Reading requests within bounds, so that nobody holds memory by sending slowly and much at once."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from services.runtime.changes import Changes
from services.runtime.checksums import without_checksum
from services.runtime.errors import Refusal, invalid

RECEIVED_AT_ONCE = 4
"""Single requests of one caller that are being received: enough that the line is never idle between two. The bytes of
further ones stay with the caller, as gRPC sends no more than a window of a message that nobody reads."""
RECEIVE_SECONDS = 60
"""Time that a single request may take to arrive, from when there is room for it: it keeps others of its caller out."""
SILENCE_SECONDS = 600
"""Wait for the next request of a stream, after which its caller counts as gone."""

_SMALL_BYTES = 2**16
"""Requests up to this size are not counted: a question must not wait because of images."""

BROKEN_OFF_SECONDS = 0.05
"""A request that broke off, or is too large, looks like none. Within this time gRPC cancels its call."""

_Context = aio.ServicerContext[Any, Any]


class SingleRequests:
    """Reads single requests, `RECEIVED_AT_ONCE` of each caller at the same time."""

    def __init__(self) -> None:
        # One for each caller that is sending: it goes when nobody waits for it or has a place in it.
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def read(self, name: str, context: _Context, deserializer: Any) -> tuple[Any, int]:
        """The one request of a call, and its bytes; waits for a place, however long, before any of it is received.

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
        return _message(raw, deserializer), len(raw)


class Bodies:
    """Bytes of requests in memory, bounded for all callers together.

    Where no more fit, a caller that holds less than an equal share still gets that, so that nobody keeps others out.

    Args:
        most: bytes; None for any number.
    """

    def __init__(self, most: int | None) -> None:
        self._most = math.inf if most is None else most
        self._held: Counter[str] = Counter()
        self._changes = Changes()

    def fits(self, name: str, size: int) -> bool:
        """Whether there is room for a request.

        Args:
            name: of the caller.
            size: bytes of the request.
        """
        if size <= _SMALL_BYTES or self._held.total() + size <= self._most:
            return True
        return self._held[name] + size <= self._most / len({*self._held, name})

    def refusal(self, size: int) -> Refusal:
        """What a request is refused with that does not fit."""
        return Refusal(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"{self._held.total()} bytes of requests are in memory, and {size} more do not fit into the {self._most} "
            "that are allowed; try again in a second",
        )

    @contextmanager
    def held(self, name: str, size: int) -> Iterator[None]:
        """Counts a request inside the block."""
        self._take(name, size)
        try:
            yield
        finally:
            self._give(name, size)

    @contextmanager
    def of_stream(self, name: str) -> Iterator[StreamBodies]:
        """Counts the requests of a stream inside the block; in the end, none of them any more."""
        stream = StreamBodies(self, name)
        try:
            yield stream
        finally:
            while stream.sizes:
                stream.answered()

    async def _wait(self, name: str, size: int) -> None:
        """Until it fits: what is in memory is being worked on, and each of that has its own end."""
        while not self.fits(name, size):
            await self._changes.wait()
        self._take(name, size)

    def _take(self, name: str, size: int) -> None:
        if size > _SMALL_BYTES:
            self._held[name] += size

    def _give(self, name: str, size: int) -> None:
        if size > _SMALL_BYTES:
            self._held[name] -= size
            if not self._held[name]:
                del self._held[name]
            self._changes.notify()


class StreamBodies:
    """What one stream has of `Bodies`.

    Attributes:
        sizes: bytes of its requests that have no answer yet, in the order in which they came.
    """

    def __init__(self, bodies: Bodies, name: str) -> None:
        self._bodies, self._name = bodies, name
        self.sizes: deque[int] = deque()

    async def take(self, size: int) -> None:
        """Waits until a request fits, and counts it; the next one is not read meanwhile."""
        await self._bodies._wait(self._name, size)
        self.sizes.append(size)

    def answered(self) -> None:
        """The oldest request has its answer."""
        if self.sizes:
            self._bodies._give(self._name, self.sizes.popleft())


async def requests_of(context: _Context, deserializer: Any, bodies: StreamBodies) -> AsyncIterator[Any]:
    """The requests of a stream, each read when it is asked for.

    Raises:
        Refusal: DEADLINE_EXCEEDED where none comes for `SILENCE_SECONDS`; else as `SingleRequests.read`.
    """
    silent = f"no request has come for {SILENCE_SECONDS:g} seconds; begin another stream when there is one"
    while (raw := await _next(context, SILENCE_SECONDS, silent)) is not aio.EOF:
        message, size = _message(raw, deserializer), len(raw)
        del raw  # while its message is there it would take as much again
        await bodies.take(size)
        yield message


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
