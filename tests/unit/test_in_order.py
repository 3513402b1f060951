"""Streams: order, window, and an end that leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.inference.in_order import in_order


async def numbers(count: int, read: list[int] | None = None) -> AsyncIterator[int]:
    for number in range(count):
        if read is not None:
            read.append(number)
        yield number


async def test_answers_come_in_the_order_of_the_requests_and_one_at_a_time() -> None:
    async def slower_first(number: int) -> int:
        for _ in range(10 - number):
            await asyncio.sleep(0)
        return number

    assert [answer async for answer in in_order(numbers(10), slower_first)] == list(range(10))


async def test_a_caller_who_waits_for_each_answer_gets_it() -> None:
    answered = asyncio.Event()

    async def one_by_one() -> AsyncIterator[int]:
        for number in range(3):
            yield number
            await answered.wait()
            answered.clear()

    async def echo(number: int) -> int:
        return number

    got = []
    async for answer in in_order(one_by_one(), echo):
        got.append(answer)
        answered.set()
    assert got == [0, 1, 2]


async def test_no_more_is_read_and_in_work_than_the_window() -> None:
    begun: list[int] = []
    read: list[int] = []
    finish = asyncio.Event()

    async def work(number: int) -> int:
        begun.append(number)
        await finish.wait()
        return number

    answers = in_order(numbers(20, read), work, window=3)
    first = asyncio.ensure_future(anext(answers))
    for _ in range(50):
        await asyncio.sleep(0)
    assert (begun, read) == ([0, 1, 2], [0, 1, 2])
    finish.set()
    assert await first == 0
    for _ in range(50):  # the first answer is taken and not yet done with: its place is not free
        await asyncio.sleep(0)
    assert begun == [0, 1, 2]
    assert [answer async for answer in answers] == list(range(1, 20))


async def test_a_caller_who_leaves_cancels_what_is_in_work() -> None:
    working: set[int] = set()
    all_work = asyncio.Event()

    async def forever(number: int) -> int:
        working.add(number)
        if len(working) == 5:
            all_work.set()
        try:
            await asyncio.Event().wait()
        finally:
            working.remove(number)
        return number

    call = asyncio.ensure_future(anext(in_order(numbers(5), forever)))
    await all_work.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    for _ in range(10):
        await asyncio.sleep(0)
    assert not working


async def test_a_fault_ends_the_stream() -> None:
    async def fails(number: int) -> int:
        if number == 2:
            raise RuntimeError("fault")
        return number

    answers = in_order(numbers(5), fails)
    assert [await anext(answers), await anext(answers)] == [0, 1]
    with pytest.raises(RuntimeError, match="fault"):
        await anext(answers)
