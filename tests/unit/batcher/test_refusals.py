"""What is not computed: no room, no time left, or nobody who waits for it any more."""

from __future__ import annotations

import asyncio
import re

import grpc
import pytest

from services.runtime.errors import Refusal
from tests.unit.batcher.fakes import (
    HELD,
    SECONDS,
    THREADS,
    Clock,
    Extractor,
    active,
    as_it_is,
    begun,
    busy_threads,
    image,
    refusal,
    scores,
    started,
)


async def test_what_waited_too_long_is_refused_and_not_decoded(extractor: Extractor, clock: Clock) -> None:
    async with busy_threads(extractor) as (batcher, held):
        late, patient = await begun(
            [
                batcher.inspect(active(extractor), image(number), as_it_is, "", left)
                for number, left in ((1, 5.0), (2, 5.1))
            ]
        )
        clock.now += 5
        extractor.reading.open()
        refused = await refusal(late)
        assert await scores([*held, patient]) == [*HELD, 2]
    assert refused.status is grpc.StatusCode.DEADLINE_EXCEEDED
    assert sorted(extractor.read_images) == [2, *HELD]


async def test_what_expired_after_it_was_decoded_is_not_computed(extractor: Extractor, clock: Clock) -> None:
    extractor.computing.close()
    async with started(extractor) as batcher:
        first = await begun([batcher.inspect(active(extractor), image(0), as_it_is)])
        await extractor.computing.come(1)
        [late] = await begun([batcher.inspect(active(extractor), image(1), as_it_is, "", 5.0)])
        [after] = await begun([batcher.inspect(active(extractor), image(2), as_it_is)])
        await extractor.reading.come(3)
        clock.now += 5
        extractor.computing.open()
        assert (await refusal(late)).status is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await scores([*first, after]) == [0, 2]
    assert sorted(number for batch in extractor.batches for number in batch) == [0, 2]


async def test_what_nobody_waits_for_any_more_is_not_decoded(extractor: Extractor) -> None:
    async with busy_threads(extractor) as (batcher, held):
        [gone, stays] = await begun([batcher.inspect(active(extractor), image(number), as_it_is) for number in (1, 2)])
        gone.cancel()
        await asyncio.wait([gone])
        extractor.reading.open()
        assert await scores([*held, stays]) == [*HELD, 2]
    assert gone.cancelled()
    assert sorted(extractor.read_images) == [2, *HELD]


async def test_what_nobody_waits_for_any_more_is_not_computed(extractor: Extractor) -> None:
    async with busy_threads(extractor) as (_batcher, [gone, *stay]):
        gone.cancel()
        await asyncio.wait([gone])
        extractor.reading.open()
        assert await scores(stay) == HELD[1:]
    assert sorted(extractor.read_images) == HELD
    assert sorted(number for batch in extractor.batches for number in batch) == HELD[1:]


async def test_the_place_of_who_leaves_is_free_at_once(extractor: Extractor) -> None:
    async with busy_threads(extractor, queue_size=1) as (batcher, held):
        [gone] = await begun([batcher.inspect(active(extractor), image(1), as_it_is)])
        gone.cancel()
        await asyncio.wait([gone])
        [stays] = await begun([batcher.inspect(active(extractor), image(2), as_it_is)])
        extractor.reading.open()
        assert await scores([*held, stays]) == [*HELD, 2]


async def test_who_leaves_while_it_is_computed_disturbs_nobody(extractor: Extractor) -> None:
    extractor.computing.close()
    async with started(extractor) as batcher:
        [gone] = await begun([batcher.inspect(active(extractor), image(0), as_it_is)])
        await extractor.computing.come(1)
        gone.cancel()
        await asyncio.wait([gone])
        [stays] = await begun([batcher.inspect(active(extractor), image(1), as_it_is)])
        extractor.computing.open()
        assert await scores([stays]) == [1]


async def test_a_full_queue_refuses_with_a_hint(extractor: Extractor) -> None:
    async with busy_threads(extractor, queue_size=2) as (batcher, held):
        waiting = await begun([batcher.inspect(active(extractor), image(number), as_it_is, "a") for number in (1, 2)])
        [refused] = await begun([batcher.inspect(active(extractor), image(3), as_it_is, "a")])
        answer = await refusal(refused)
        with pytest.raises(Refusal) as unreceived:
            batcher.admit("a", None)
        batcher.admit("b", None)  # would take the place of one of a's
        extractor.reading.open()
        assert await scores(held + waiting) == [*HELD, 1, 2]
    assert (unreceived.value.status, unreceived.value.text) == (answer.status, answer.text)
    assert answer.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert re.fullmatch(
        r"2 inspections are waiting, as many as are allowed; try again in \d+\.\d\d seconds", answer.text
    )


async def test_a_caller_with_little_in_a_full_queue_takes_the_place_of_one_with_much(extractor: Extractor) -> None:
    async with busy_threads(extractor, queue_size=2) as (batcher, held):
        first, newest = await begun(
            [batcher.inspect(active(extractor), image(number), as_it_is, "a") for number in (1, 2)]
        )
        [other] = await begun([batcher.inspect(active(extractor), image(3), as_it_is, "b")])
        assert (await refusal(newest)).status is grpc.StatusCode.RESOURCE_EXHAUSTED
        extractor.reading.open()
        assert await scores([*held, first, other]) == [*HELD, 1, 3]


async def test_what_would_wait_longer_than_it_may_is_refused_at_once(extractor: Extractor, clock: Clock) -> None:
    """Images take 10 seconds; of what is new a tenth goes into the mean that the wait is told from."""

    def pass_time() -> None:
        clock.now += 10

    extractor.on_compute = pass_time
    async with started(extractor, max_batch=1, max_delay=0) as batcher:
        await scores(await begun([batcher.inspect(active(extractor), image(0), as_it_is)]))
        extractor.reading.close()
        held = await begun([batcher.inspect(active(extractor), image(number), as_it_is) for number in HELD])
        await extractor.reading.come(1 + THREADS)
        waiting = await begun(
            [batcher.inspect(active(extractor), image(number), as_it_is, "a") for number in (1, 2, 3)]
        )
        hasty, other, patient = await begun(
            [
                batcher.inspect(active(extractor), image(4), as_it_is, "a", 2.9),
                batcher.inspect(active(extractor), image(5), as_it_is, "b", 1.1),
                batcher.inspect(active(extractor), image(6), as_it_is, "a", 1e6),
            ]
        )
        answer = await refusal(hasty)
        assert answer.status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert answer.text.startswith("images wait for about 3.000 seconds, longer than the 2.900 left; try again in ")
        with pytest.raises(Refusal, match=r"about 5\.000 seconds, longer than the 4\.900 left"):
            batcher.admit("a", 4.9)  # behind two more by now
        batcher.admit("a", 5.1)
        assert not other.done()  # of another caller, and served before most
        extractor.reading.open()
        assert await scores([*held, *waiting, patient]) == [*HELD, 1, 2, 3, 6]
        assert (await refusal(other)).status is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 4 not in extractor.read_images


async def test_room_is_told_of_when_an_inspection_is_done(extractor: Extractor) -> None:
    async with busy_threads(extractor) as (batcher, held):
        waiting = asyncio.create_task(batcher.room(None))
        await asyncio.sleep(0)
        assert not waiting.done()
        extractor.reading.open()
        await asyncio.wait_for(waiting, SECONDS)
        await scores(held)
