"""Work on many items at once, results in the order of the items: on threads, and in tasks of asyncio.

Items are taken apart from the results being handed out, so that a result does not wait for the next item: a camera may
take its time between two images. No more are taken than the window allows, so that a source is held back by whoever
does not take the results.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_order(work: Callable[[_Item], _Result], items: Iterable[_Item], window: int) -> Iterator[_Result]:
    """Results of work on threads; what has not begun when the caller leaves is not done.

    Args:
        work: called on one of `window` threads.
        items: taken on a thread of its own.
        window: items taken whose results are not done with, at most.

    Raises:
        Exception: what `work` or `items` raise, in its place in the order.
    """
    results: SimpleQueue[Future[_Result] | None] = SimpleQueue()
    room = threading.Semaphore(window - 1)  # beside the one that the feeder has
    left = threading.Event()
    pool = ThreadPoolExecutor(window, thread_name_prefix="in-order")

    def feed() -> None:
        try:
            for item in items:
                results.put(pool.submit(work, item))
                room.acquire()
                if left.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - raised where the results are taken
            failed: Future[_Result] = Future()
            failed.set_exception(error)
            results.put(failed)
        finally:
            results.put(None)

    threading.Thread(target=feed, name="in-order-feed", daemon=True).start()
    try:
        while (result := results.get()) is not None:
            yield result.result()
            room.release()
    finally:
        left.set()
        room.release()
        pool.shutdown(wait=False, cancel_futures=True)


async def in_order_async(
    work: Callable[[_Item], Coroutine[Any, Any, _Result]],
    items: Iterable[_Item] | AsyncIterable[_Item],
    window: int,
) -> AsyncIterator[_Result]:
    """Results of work in tasks, see `in_order`; what is in work when the caller leaves is cancelled and waited for.

    An iterable that is not asynchronous must not block.
    """
    results: asyncio.Queue[asyncio.Task[_Result] | None] = asyncio.Queue()
    room = asyncio.Semaphore(window - 1)

    async def feed() -> None:
        try:
            async for item in _asynchronous(items):
                results.put_nowait(asyncio.create_task(work(item)))
                await room.acquire()
        finally:
            results.put_nowait(None)

    feeder = asyncio.create_task(feed())
    try:
        while (result := await results.get()) is not None:
            yield await result
            room.release()
        await feeder
    finally:
        left = [results.get_nowait() for _ in range(results.qsize())]
        tasks = [feeder, *(task for task in left if task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _asynchronous(items: Iterable[_Item] | AsyncIterable[_Item]) -> AsyncIterator[_Item]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
