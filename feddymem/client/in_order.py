"""Work on many items at once, results in the order of the items.

Items are taken apart from the results being handed out, so that a result does not wait for the next item: a camera may
take its time between two images.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_order(work: Callable[[_Item], _Result], items: Iterable[_Item], window: int) -> Iterator[_Result]:
    """Results of work on threads.

    Args:
        work: called on one of `window` threads.
        items: taken on a thread of its own; at most `window` are taken whose results are not.
        window: how many.

    Raises:
        Exception: what `work` or `items` raise, in its place in the order.
    """
    results: SimpleQueue[Future[_Result] | None] = SimpleQueue()
    free = threading.Semaphore(window)
    left = threading.Event()
    pool = ThreadPoolExecutor(window, thread_name_prefix="inspect")

    def feed() -> None:
        try:
            for item in items:
                free.acquire()
                if left.is_set():
                    return
                results.put(pool.submit(work, item))
        except Exception as error:  # noqa: BLE001 - raised where the results are taken
            failed: Future[_Result] = Future()
            failed.set_exception(error)
            results.put(failed)
        finally:
            results.put(None)

    threading.Thread(target=feed, name="inspect-feed", daemon=True).start()
    try:
        while (result := results.get()) is not None:
            yield result.result()
            free.release()
    finally:
        left.set()
        free.release()
        pool.shutdown(wait=False, cancel_futures=True)


async def in_order_async(
    work: Callable[[_Item], Awaitable[_Result]], items: Iterable[_Item] | AsyncIterable[_Item], window: int
) -> AsyncIterator[_Result]:
    """Results of work in tasks; see `in_order`. An iterable that is not asynchronous must not block."""
    results: asyncio.Queue[asyncio.Future[_Result] | None] = asyncio.Queue()
    free = asyncio.Semaphore(window)

    async def feed() -> None:
        try:
            async for item in _asynchronous(items):
                await free.acquire()
                results.put_nowait(asyncio.ensure_future(work(item)))
        finally:
            results.put_nowait(None)

    feeder = asyncio.create_task(feed())
    try:
        while (result := await results.get()) is not None:
            yield await result
            free.release()
        await feeder
    finally:
        feeder.cancel()
        while not results.empty():
            if (result := results.get_nowait()) is not None:
                result.cancel()


async def _asynchronous(items: Iterable[_Item] | AsyncIterable[_Item]) -> AsyncIterator[_Item]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
