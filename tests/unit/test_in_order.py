"""Order, window, and an end that leaves nothing behind: on threads and in tasks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from feddymem.in_order import in_order, in_order_async

SECONDS = 30


async def numbers(count: int, taken: list[int] | None = None) -> AsyncIterator[int]:
    for number in counted(count, taken):
        yield number


def counted(count: int, taken: list[int] | None = None) -> Iterator[int]:
    for number in range(count):
        if taken is not None:
            taken.append(number)
        yield number


async def echo(number: int) -> int:
    return number


async def turns(count: int = 50) -> None:
    """Lets every task go on until it waits."""
    for _ in range(count):
        await asyncio.sleep(0)


def feeders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "in-order-feed"]


def wait_for_feeders() -> None:
    for thread in feeders():
        thread.join(SECONDS)
    assert feeders() == []


async def test_results_of_tasks_come_in_the_order_of_the_items() -> None:
    async def slower_first(number: int) -> int:
        await turns(10 - number)
        return number

    for items in (numbers(10), range(10)):
        assert [result async for result in in_order_async(slower_first, items, 4)] == list(range(10))


def test_results_of_threads_come_in_the_order_of_the_items() -> None:
    """Every item waits for the one after it, so that they end backwards, as many at once as there is room for."""
    ended = [threading.Event() for _ in range(9)]

    def slower_first(number: int) -> int:
        assert number % 3 == 2 or ended[number + 1].wait(SECONDS)
        ended[number].set()
        return number

    assert list(in_order(slower_first, range(9), 5)) == list(range(9))


async def test_a_result_of_a_task_does_not_wait_for_the_next_item() -> None:
    answered = asyncio.Event()

    async def one_by_one() -> AsyncIterator[int]:
        for number in range(3):
            yield number
            await answered.wait()
            answered.clear()

    got = []
    async for result in in_order_async(echo, one_by_one(), 8):
        got.append(result)
        answered.set()
    assert got == [0, 1, 2]


def test_a_result_of_a_thread_does_not_wait_for_the_next_item() -> None:
    answered = threading.Semaphore(0)

    def one_by_one() -> Iterator[int]:
        for number in range(3):
            yield number
            assert answered.acquire(timeout=SECONDS)

    got = []
    for result in in_order(lambda number: number, one_by_one(), 8):
        got.append(result)
        answered.release()
    assert got == [0, 1, 2]


@pytest.mark.parametrize("window", [1, 3])
async def test_no_more_is_taken_and_in_tasks_than_the_window(window: int) -> None:
    begun: list[int] = []
    taken: list[int] = []
    finish = asyncio.Event()

    async def work(number: int) -> int:
        begun.append(number)
        await finish.wait()
        return number

    results = in_order_async(work, numbers(20, taken), window)
    first = asyncio.ensure_future(anext(results))
    await turns()
    assert begun == taken == list(range(window))
    finish.set()
    assert await first == 0
    await turns()  # the first result is taken and not yet done with: its place is not free
    assert begun == taken == list(range(window))
    assert [result async for result in results] == list(range(1, 20))


@pytest.mark.parametrize("window", [1, 3])
def test_as_many_as_the_window_are_on_threads_and_no_more_is_taken(window: int) -> None:
    taken: list[int] = []
    together = threading.Barrier(window)

    def work(number: int) -> int:
        together.wait(SECONDS)
        return number

    done = 0
    for result in in_order(work, counted(4 * window, taken), window):
        assert result == done
        assert len(taken) <= done + window
        done += 1
    assert done == 4 * window


async def test_who_leaves_tasks_cancels_what_is_in_work() -> None:
    working: set[int] = set()
    all_work = asyncio.Event()

    async def forever(number: int) -> int:
        working.add(number)
        if len(working) == 5:
            all_work.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            working.remove(number)
        return number

    call = asyncio.ensure_future(anext(in_order_async(forever, numbers(9), 5)))
    await all_work.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not working


async def test_who_leaves_tasks_between_two_results_leaves_nothing_behind() -> None:
    results = in_order_async(echo, numbers(20), 3)
    assert await anext(results) == 0
    await results.aclose()  # type: ignore[attr-defined]
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_who_leaves_threads_has_nothing_more_taken_or_begun() -> None:
    taken: list[int] = []
    second, left = threading.Event(), threading.Event()
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        if number:
            second.set()
            assert left.wait(SECONDS)
        return number

    results = in_order(work, counted(20, taken), 2)
    assert next(results) == 0
    assert second.wait(SECONDS)
    results.close()  # type: ignore[attr-defined]
    left.set()
    wait_for_feeders()
    assert begun == taken == [0, 1]


async def test_an_error_of_a_task_comes_in_its_place_and_ends_the_rest() -> None:
    cancelled: list[int] = []

    async def fails(number: int) -> int:
        if number == 2:
            raise RuntimeError("fault")
        try:
            await (asyncio.sleep(0) if number < 2 else asyncio.Event().wait())
        except asyncio.CancelledError:
            cancelled.append(number)
            raise
        return number

    results = in_order_async(fails, numbers(4), 4)
    assert [await anext(results), await anext(results)] == [0, 1]
    with pytest.raises(RuntimeError, match="fault"):
        await anext(results)
    assert cancelled == [3]


def test_an_error_on_a_thread_comes_in_its_place_and_ends_the_rest() -> None:
    def fails(number: int) -> int:
        if number == 2:
            raise RuntimeError("fault")
        return number

    results = in_order(fails, range(5), 4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(RuntimeError, match="fault"):
        next(results)
    wait_for_feeders()


@pytest.mark.parametrize("error", [OSError, SystemExit])
async def test_an_error_of_the_items_comes_after_the_results_of_those_before(error: type[BaseException]) -> None:
    def breaks() -> Iterator[int]:
        yield from range(3)
        raise error("camera")

    results = in_order(lambda number: number, breaks(), 8)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(error, match="camera"):
        next(results)
    wait_for_feeders()


async def test_an_error_of_asynchronous_items_comes_after_the_results_of_those_before() -> None:
    async def breaks() -> AsyncIterator[int]:
        async for number in numbers(3):
            yield number
        raise OSError("camera")

    results = in_order_async(echo, breaks(), 8)
    assert [await anext(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="camera"):
        await anext(results)


@pytest.mark.parametrize("window", [1, 8])
async def test_no_items_have_no_results(window: int) -> None:
    assert list(in_order(lambda number: number, (), window)) == []
    assert [result async for result in in_order_async(echo, (), window)] == []
