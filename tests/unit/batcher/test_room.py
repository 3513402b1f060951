"""Who waits for room: one is told of each inspection that ends, whoever waits the longest, and no turn is lost."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import pytest

from feddymem.images import ImageError
from services.inference.batcher import Batcher
from services.inference.job import Scored
from services.runtime.errors import Refusal
from tests.unit.batcher.fakes import (
    HELD,
    LONG,
    SECONDS,
    Extractor,
    Task,
    active,
    as_it_is,
    begun,
    busy_threads,
    image,
    refusal,
    scores,
    started,
)


class Waiters:
    """Some that wait for room, by their numbers."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self.told: list[int] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def come(self, *seconds: float | None) -> None:
        """More of them, for so long at most; each waits before the next comes."""
        for each in seconds:
            self.tasks.append(asyncio.create_task(self._wait(len(self.tasks), each)))
            await settled()

    async def _wait(self, number: int, seconds: float | None) -> None:
        await self._batcher.room(seconds)
        self.told.append(number)

    async def leave(self, number: int) -> None:
        self.tasks[number].cancel()
        await asyncio.wait([self.tasks[number]], timeout=SECONDS)
        assert self.tasks[number].cancelled()

    async def all_told(self) -> list[int]:
        """In the order in which they were told, when all have been or have gone."""
        _, waiting = await asyncio.wait(self.tasks, timeout=SECONDS)
        assert not waiting
        return self.told


async def settled() -> None:
    """What can go on without a thread or time has gone on."""
    for _ in range(10):
        await asyncio.sleep(0)


def inspection(batcher: Batcher, extractor: Extractor, number: int = 1) -> Coroutine[Any, Any, Scored]:
    return batcher.inspect(active(extractor), image(number), as_it_is)


async def inspected(batcher: Batcher, extractor: Extractor) -> None:
    """One inspection, from its beginning to its end."""
    await scores(await begun([inspection(batcher, extractor)]))
    await settled()


async def test_of_each_inspection_that_ends_the_one_is_told_that_waits_the_longest(extractor: Extractor) -> None:
    async with started(extractor) as batcher:
        waiters = Waiters(batcher)
        await waiters.come(None, LONG, None, LONG)
        for told in ([0], [0, 1], [0, 1, 2]):
            await inspected(batcher, extractor)
            assert waiters.told == told
        await waiters.come(None)
        await inspected(batcher, extractor)
        await inspected(batcher, extractor)
        assert await waiters.all_told() == [0, 1, 2, 3, 4]


async def test_of_an_inspection_that_has_ended_nobody_is_told_who_comes_later(extractor: Extractor) -> None:
    """That room may be gone."""
    async with started(extractor) as batcher:
        await inspected(batcher, extractor)
        waiters = Waiters(batcher)
        await waiters.come(None)
        assert waiters.told == []
        await inspected(batcher, extractor)
        assert await waiters.all_told() == [0]


async def test_who_has_gone_takes_no_turn(extractor: Extractor) -> None:
    async with started(extractor) as batcher:
        waiters = Waiters(batcher)
        await waiters.come(None, None, None, None)
        await waiters.leave(0)
        await waiters.leave(2)
        for told in ([1], [1, 3]):
            await inspected(batcher, extractor)
            assert waiters.told == told


async def test_who_goes_when_it_has_just_been_told_passes_its_turn_on(extractor: Extractor) -> None:
    async with started(extractor) as batcher:
        waiters = Waiters(batcher)
        await waiters.come(None, LONG, None)

        async def end_and_cancel() -> None:
            await inspection(batcher, extractor)
            for told in waiters.tasks[:2]:  # none has gone on yet: the turn is that of the first, and then the second's
                told.cancel()

        await asyncio.wait_for(end_and_cancel(), SECONDS)
        assert await waiters.all_told() == [2]
        assert [task.cancelled() for task in waiters.tasks] == [True, True, False]


async def test_whose_time_is_up_goes_on_untold_and_takes_no_turn(extractor: Extractor) -> None:
    async with started(extractor) as batcher:
        waiters = Waiters(batcher)
        await waiters.come(0.001, None, 0.0)
        await asyncio.wait([waiters.tasks[0], waiters.tasks[2]], timeout=SECONDS)
        assert sorted(waiters.told) == [0, 2]
        await inspected(batcher, extractor)
        assert await waiters.all_told() == [*waiters.told[:2], 1]


async def bounded(batcher: Batcher) -> tuple[Waiters, Refusal]:
    """As many as may wait, and what the next is told."""
    waiters = Waiters(batcher)
    while len(waiters.tasks) < 1000:
        waiters.tasks.append(asyncio.create_task(batcher.room(None)))
        await asyncio.sleep(0)
        if waiters.tasks[-1].done():
            break
    last = waiters.tasks.pop()
    assert last.done(), "there is a bound"
    with pytest.raises(Refusal) as caught:
        await last
    return waiters, caught.value


async def test_only_so_many_may_wait_and_more_when_some_have_gone(extractor: Extractor) -> None:
    async with started(extractor) as batcher:
        waiters, refused = await bounded(batcher)
        allowed = len(waiters.tasks)
        assert allowed == 256
        assert refused.status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert re.fullmatch(
            rf"{allowed} images of streams wait for room, as many as are allowed; try again in \d+\.\d\d seconds",
            refused.text,
        )
        await inspected(batcher, extractor)  # tells the first
        assert waiters.tasks[0].done()
        await waiters.leave(5)
        assert sum(not task.done() for task in waiters.tasks) == allowed - 2
        more = Waiters(batcher)
        await more.come(None, None)
        assert not any(task.done() for task in more.tasks)
        with pytest.raises(Refusal, match="as many as are allowed"):
            await batcher.room(None)
        for task in (*waiters.tasks, *more.tasks):
            task.cancel()
        await asyncio.wait([*waiters.tasks, *more.tasks], timeout=SECONDS)
        await more.come(0.0)  # those whose time is up do not count either
        await asyncio.wait(more.tasks, timeout=SECONDS)
        assert len((await bounded(batcher))[0].tasks) == allowed


Ends = Callable[[Batcher, Extractor], Coroutine[Any, Any, None]]


async def is_late(batcher: Batcher, extractor: Extractor) -> None:
    """As one does that was told of room when its time was up already."""
    with pytest.raises(Refusal) as caught:
        await batcher.inspect(active(extractor), image(1), as_it_is, seconds_left=0.0)
    assert caught.value.status is grpc.StatusCode.DEADLINE_EXCEEDED


async def is_cancelled_while_it_waits(batcher: Batcher, extractor: Extractor) -> None:
    [task] = await begun([inspection(batcher, extractor)])
    assert batcher.queue_length == 1
    task.cancel()
    await asyncio.wait([task], timeout=SECONDS)
    assert batcher.queue_length == 0


@pytest.mark.parametrize("ends", [is_late, is_cancelled_while_it_waits])
async def test_an_inspection_without_a_result_leaves_its_room_to_the_next(extractor: Extractor, ends: Ends) -> None:
    async with busy_threads(extractor) as (batcher, _held):
        waiters = Waiters(batcher)
        await waiters.come(None, None)
        await ends(batcher, extractor)
        await settled()
        assert waiters.told == [0]
        await ends(batcher, extractor)
        assert await waiters.all_told() == [0, 1]


async def test_an_inspection_that_fails_leaves_its_room_to_the_next(extractor: Extractor) -> None:
    extractor.fails_to_read = {7}
    async with started(extractor) as batcher:
        waiters = Waiters(batcher)
        await waiters.come(None)
        [broken] = await begun([inspection(batcher, extractor, 7)])
        with pytest.raises(ImageError, match="broken"):
            await asyncio.wait_for(broken, SECONDS)
        assert await waiters.all_told() == [0]


async def test_who_is_refused_for_want_of_room_tells_nobody(extractor: Extractor) -> None:
    """Nothing has changed; else those who wait would wake each other for ever."""
    async with busy_threads(extractor, queue_size=1) as (batcher, held):
        queued = await begun([inspection(batcher, extractor)])
        waiters = Waiters(batcher)
        await waiters.come(None)
        for _ in range(3):
            [refused] = await begun([inspection(batcher, extractor, 2)])
            assert (await refusal(refused)).status is grpc.StatusCode.RESOURCE_EXHAUSTED
        await settled()
        assert waiters.told == []
        extractor.reading.open()
        assert await scores([*held, *queued]) == [*HELD, 1]
        assert await waiters.all_told() == [0]


@pytest.mark.parametrize("gone", [[], [1], [0, 1, 2, 5, 6, 11]])
async def test_all_who_wait_come_to_their_turn_whoever_gives_up(extractor: Extractor, gone: list[int]) -> None:
    async def patient(batcher: Batcher, number: int) -> Scored:
        while True:
            try:
                return await inspection(batcher, extractor, number)
            except Refusal as refused:
                if refused.status is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
            await batcher.room(None)

    async with busy_threads(extractor, queue_size=1, max_delay=0) as (batcher, held):
        tasks: list[Task] = await begun([patient(batcher, number) for number in range(12)])
        await settled()
        for number in gone:
            tasks[number].cancel()
        extractor.reading.open()
        await scores(held)
        stay = [number for number in range(12) if number not in gone]
        assert await scores([tasks[number] for number in stay]) == stay
