"""Streams: several requests in work at once, answered in the order in which they came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

Request = TypeVar("Request")
Response = TypeVar("Response")

WINDOW = 8
"""Requests of one stream in work at once."""


async def in_order(
    requests: AsyncIterator[Request], answer: Callable[[Request], Coroutine[Any, Any, Response]], window: int = WINDOW
) -> AsyncIterator[Response]:
    """Answers requests as they come; what is in work when the caller leaves is cancelled.

    Args:
        requests: read only as far as the window allows, so that a caller who does not read is not read either.
        answer: answers one request; what it raises ends the stream.
        window: requests in work or answered and not yet taken, at most.
    """
    room = asyncio.Semaphore(window)
    begun: asyncio.Queue[asyncio.Task[Response] | None] = asyncio.Queue()

    async def read() -> None:
        try:
            while True:
                await room.acquire()
                begun.put_nowait(asyncio.create_task(answer(await anext(requests))))
        except StopAsyncIteration:
            pass
        finally:
            begun.put_nowait(None)

    reader = asyncio.create_task(read())
    try:
        while (task := await begun.get()) is not None:
            yield await task
            room.release()
        await reader
    finally:
        reader.cancel()
        while not begun.empty():
            if (task := begun.get_nowait()) is not None:
                task.cancel()
