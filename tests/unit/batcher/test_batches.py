"""Batches: filled, made into results beside the event loop, and each image with the outcome that is its own."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any, cast

import grpc
import pytest
from torch import Tensor

from feddymem.image_data import EncodedImage
from feddymem.images import ImageError
from feddymem.scoring import Inspection
from services.inference.job import Scored
from tests.unit.batcher.fakes import (
    HELD,
    SECONDS,
    THREADS,
    Clock,
    Extractor,
    Finish,
    Gate,
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


async def test_an_image_alone_waits_for_nobody(extractor: Extractor) -> None:
    async with started(extractor) as batcher:
        for number in (1, 2):
            scored = await asyncio.wait_for(batcher.inspect(active(extractor), image(number), as_it_is), SECONDS)
            assert (scored.inspection.score, scored.height, scored.width) == (number, number, 99)
    assert extractor.batches == [[1], [2]]


async def test_batches_are_filled_and_the_last_does_not_wait_for_what_is_done(extractor: Extractor) -> None:
    """While one image is computed, nine come."""
    extractor.computing.close()
    async with started(extractor, max_batch=4) as batcher:
        first = await begun([batcher.inspect(active(extractor), image(0), as_it_is)])
        await extractor.computing.come(1)
        others = await begun([batcher.inspect(active(extractor), image(number), as_it_is) for number in range(1, 10)])
        extractor.computing.open()
        assert await scores(first + others) == list(range(10))
    assert [len(batch) for batch in extractor.batches] == [1, 4, 4, 1]
    assert sorted(number for batch in extractor.batches for number in batch) == list(range(10))


async def test_a_batch_waits_for_what_is_being_decoded(extractor: Extractor) -> None:
    gate = extractor.reading_of[1] = Gate()
    gate.close()
    async with started(extractor) as batcher:
        [slow] = await begun([batcher.inspect(active(extractor), image(1), as_it_is)])
        await gate.come(1)
        [fast] = await begun([batcher.inspect(active(extractor), image(0), as_it_is)])
        await extractor.reading.come(2)
        gate.open()
        assert await scores([fast, slow]) == [0, 1]
    assert [sorted(batch) for batch in extractor.batches] == [[0, 1]]


async def test_a_batch_waits_no_longer_than_the_delay(extractor: Extractor) -> None:
    """The second image is being decoded until the first has its score."""
    gate = extractor.reading_of[1] = Gate()
    gate.close()
    async with started(extractor, max_delay=0.001) as batcher:
        [slow] = await begun([batcher.inspect(active(extractor), image(1), as_it_is)])
        await gate.come(1)
        assert await scores(await begun([batcher.inspect(active(extractor), image(0), as_it_is)])) == [0]
        gate.open()
        assert await scores([slow]) == [1]
    assert extractor.batches == [[0], [1]]


async def test_the_event_loop_neither_decodes_nor_computes_nor_makes_results(extractor: Extractor) -> None:
    finish = Finish()
    async with started(extractor) as batcher:
        await scores(await begun([batcher.inspect(active(extractor), image(number), finish) for number in range(20)]))
    assert {kind for kind, _name in extractor.threads} == {"read", "compute"}
    names = {name for _kind, name in extractor.threads} | set(finish.threads)
    assert all(name.startswith("inspect-") for name in names)
    assert len(finish.threads) == 20


async def test_an_image_alone_goes_through_one_thread(extractor: Extractor) -> None:
    for number in range(10):
        alone, finish = Extractor(), Finish()
        async with started(alone) as batcher:
            assert await scores(await begun([batcher.inspect(active(alone), image(number), finish)])) == [number]
        [(_read, reader), (_compute, computer)] = alone.threads
        assert [reader] == [computer] == finish.threads


async def test_the_caller_gets_what_is_made_of_the_score(extractor: Extractor) -> None:
    async with started(extractor) as batcher:
        made = batcher.inspect(active(extractor), image(7), lambda scored: f"score {scored.inspection.score}")
        assert await asyncio.wait_for(made, SECONDS) == "score 7.0"


async def test_while_a_result_is_made_the_next_image_is_scored_and_waits_for_nobody(extractor: Extractor) -> None:
    """What has its score already is no reason for a batch to wait."""
    slow = Finish()
    slow.gate.close()
    async with started(extractor) as batcher:
        try:
            [first] = await begun([batcher.inspect(active(extractor), image(0), slow)])
            await slow.gate.come(1)
            for number in (1, 2):
                assert await scores(await begun([batcher.inspect(active(extractor), image(number), as_it_is)])) == [
                    number
                ]
            assert not first.done()
        finally:
            slow.gate.open()
        assert await scores([first]) == [0]
    assert extractor.batches == [[0], [1], [2]]


async def test_as_many_batches_are_computed_at_once_as_are_allowed(extractor: Extractor) -> None:
    extractor.computing.close()
    async with started(extractor, max_batch=1, at_once=2) as batcher:
        tasks = await begun([batcher.inspect(active(extractor), image(number), as_it_is) for number in range(6)])
        await extractor.computing.come(2)
        await extractor.reading.come(4)
        assert len(extractor.batches) == 2
        extractor.computing.open()
        assert await scores(tasks) == list(range(6))


async def test_a_batch_does_not_wait_for_what_another_one_computes(extractor: Extractor) -> None:
    extractor.computing.close()
    async with started(extractor, at_once=2) as batcher:
        tasks = []
        for number in range(2):
            tasks += await begun([batcher.inspect(active(extractor), image(number), as_it_is)])
            await extractor.computing.come(len(tasks))
        extractor.computing.open()
        assert await scores(tasks) == [0, 1]
    assert extractor.batches == [[0], [1]]


async def test_what_was_decoded_meanwhile_does_not_wait_until_a_result_is_made(extractor: Extractor) -> None:
    """One thread computes and makes image 0's result, one decodes image 2, the third has nothing to do but image 1."""
    slow, gates = Finish(), {number: Gate() for number in (2, 3)}
    extractor.reading_of = gates
    for gate in (slow.gate, extractor.computing, *gates.values()):
        gate.close()
    async with started(extractor, max_delay=0) as batcher:
        try:
            [first] = await begun([batcher.inspect(active(extractor), image(0), slow)])
            await extractor.computing.come(1)
            [decoding] = await begun([batcher.inspect(active(extractor), image(2), as_it_is)])
            await gates[2].come(1)
            decoded, broken = await begun(
                [batcher.inspect(active(extractor), image(number), as_it_is) for number in (1, 3)]
            )
            await gates[3].come(1)  # so image 1 is decoded, and its thread has seen that another one computes
            extractor.fails_to_read.add(3)
            gates[3].open()
            with pytest.raises(ImageError, match="image is broken"):
                await asyncio.wait_for(broken, SECONDS)
            extractor.computing.open()
            await slow.gate.come(1)
            assert await scores([decoded]) == [1]
            assert not first.done()
        finally:
            slow.gate.open()
        gates[2].open()
        assert await scores([first, decoding]) == [0, 2]


async def test_an_error_in_making_a_result_reaches_its_caller_alone(extractor: Extractor) -> None:
    """More errors than there are threads: each of them goes on."""

    def fail(scored: Scored) -> Scored:
        raise ValueError(f"no map of {scored.inspection.score}")

    extractor.computing.close()
    async with started(extractor, max_batch=12) as batcher:
        first = await begun([batcher.inspect(active(extractor), image(0), as_it_is)])
        await extractor.computing.come(1)
        tasks = await begun(
            [batcher.inspect(active(extractor), image(number), (as_it_is, fail)[number % 2]) for number in range(1, 13)]
        )
        extractor.computing.open()
        assert await scores([*first, *tasks[1::2]]) == list(range(0, 13, 2))
        for number, task in zip(range(1, 13, 2), tasks[::2], strict=True):
            with pytest.raises(ValueError, match=f"no map of {number}.0"):
                await asyncio.wait_for(task, SECONDS)
        assert [len(batch) for batch in extractor.batches] == [1, 12]
        for number in range(2 * THREADS):
            [broken] = await begun([batcher.inspect(active(extractor), image(number), fail)])
            with pytest.raises(ValueError, match="no map"):
                await asyncio.wait_for(broken, SECONDS)
        assert await scores(
            await begun([batcher.inspect(active(extractor), image(number), as_it_is) for number in range(THREADS)])
        ) == list(range(THREADS))


async def test_what_waits_while_scoring_is_held_up_waits_undecoded(extractor: Extractor) -> None:
    """One batch is computed, another one may lie decoded; the rest stays in the queue, which is full in the end."""
    max_batch, queue_size = 8, 5
    extractor.computing.close()
    async with started(extractor, max_batch=max_batch, queue_size=queue_size) as batcher:
        tasks: list[Task] = []
        for number in range(max_batch):
            tasks += await begun([batcher.inspect(active(extractor), image(number), as_it_is)])
            await extractor.reading.come(len(tasks))
            await extractor.computing.come(1)
        more = range(len(tasks), len(tasks) + queue_size)
        tasks += await begun([batcher.inspect(active(extractor), image(number), as_it_is) for number in more])
        [refused] = await begun([batcher.inspect(active(extractor), image(99), as_it_is)])
        assert (await refusal(refused)).status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(extractor.threads) == len(tasks) - queue_size + 1  # and one computation
        extractor.computing.open()
        assert await scores(tasks) == list(range(len(tasks)))


async def test_images_of_several_federations_and_backbones_get_their_own_scores(extractor: Extractor) -> None:
    other = Extractor(factor=-1)
    actives = [active(extractor), active(other, 0.25), active(extractor, 0.5)]
    extractor.computing.close()
    async with started(extractor, other, max_batch=16) as batcher:
        first = await begun([batcher.inspect(actives[0], image(0), as_it_is)])
        await extractor.computing.come(1)
        others = await begun([batcher.inspect(actives[number % 3], image(number), as_it_is) for number in range(1, 14)])
        extractor.computing.open()
        expected = [(number, 0.25 - number, number + 0.5)[number % 3] for number in range(14)]
        assert await scores(first + others) == expected
    assert [len(batch) for batch in extractor.batches] == [1, 8]
    assert [len(batch) for batch in other.batches] == [5]


async def test_a_scored_image_does_not_wait_for_a_garbage_collection(extractor: Extractor) -> None:
    images = [image(number) for number in range(5)]
    left = [weakref.ref(image) for image in images]
    gc.disable()
    try:
        async with started(extractor) as batcher:
            tasks = await begun([batcher.inspect(active(extractor), image, as_it_is) for image in images])
            assert await scores(tasks) == [0, 1, 2, 3, 4]
        images.clear()
        del tasks
        assert [image() for image in left] == [None] * 5
    finally:
        gc.enable()


async def test_an_image_that_cannot_be_decoded_fails_alone(extractor: Extractor) -> None:
    async with busy_threads(extractor) as (batcher, held):
        broken, whole = await begun(
            [batcher.inspect(active(extractor), i, as_it_is) for i in (EncodedImage(b""), image(1))]
        )
        extractor.reading.open()
        with pytest.raises(ImageError, match="image is empty"):
            await asyncio.wait_for(broken, SECONDS)
        assert await scores([*held, whole]) == [*HELD, 1]


async def test_an_error_of_the_computation_reaches_all_of_the_batch_and_no_others(extractor: Extractor) -> None:
    extractor.computing.close()
    async with started(extractor, max_batch=4) as batcher:
        first = await begun([batcher.inspect(active(extractor), image(0), as_it_is)])
        await extractor.computing.come(1)
        batch = await begun([batcher.inspect(active(extractor), image(number), as_it_is) for number in range(1, 5)])
        await extractor.reading.come(4)
        extractor.fails = True
        extractor.computing.open()
        for task in first + batch:
            with pytest.raises(RuntimeError, match="out of memory"):
                await asyncio.wait_for(task, SECONDS)
        extractor.fails = False
        assert await scores(await begun([batcher.inspect(active(extractor), image(9), as_it_is)])) == [9]
    assert [len(b) for b in extractor.batches] == [1, 4, 1]


async def test_an_error_of_one_backbone_or_scorer_reaches_its_own_images_alone(extractor: Extractor) -> None:
    def fail(_features: Tensor) -> list[Inspection]:
        raise RuntimeError("out of memory")

    other, broken = Extractor(), active(extractor)
    other.fails = True
    cast(Any, broken.scorer).inspect_features = fail
    actives = [active(extractor), active(other), broken]
    extractor.computing.close()
    async with started(extractor, other, max_batch=16) as batcher:
        first = await begun([batcher.inspect(actives[0], image(0), as_it_is)])
        await extractor.computing.come(1)
        others = await begun([batcher.inspect(actives[number % 3], image(number), as_it_is) for number in range(1, 9)])
        extractor.computing.open()
        assert await scores([*first, others[2], others[5]]) == [0, 3, 6]
        for number in (1, 2, 4, 5, 7, 8):
            with pytest.raises(RuntimeError, match="out of memory"):
                await asyncio.wait_for(others[number - 1], SECONDS)


async def test_stopping_finishes_what_is_accepted(extractor: Extractor) -> None:
    before = set(threading.enumerate())
    async with busy_threads(extractor) as (batcher, held):
        waiting = await begun([batcher.inspect(active(extractor), image(number), as_it_is) for number in range(10)])
        threads = set(threading.enumerate()) - before
    assert await scores(held + waiting) == [*HELD, *range(10)]
    mine = [thread for thread in threads if thread.name.startswith("inspect-")]
    assert len(mine) == THREADS
    assert not any(thread.is_alive() for thread in mine)


async def test_the_wait_and_the_computation_are_timed(extractor: Extractor, clock: Clock) -> None:
    def pass_time() -> None:
        clock.now += 3

    extractor.on_compute = pass_time
    async with busy_threads(extractor, max_batch=1, max_delay=0) as (_batcher, held):
        clock.now += 7
        extractor.reading.open()
        results = await asyncio.wait_for(asyncio.gather(*held), SECONDS)
    assert sorted(result.queue_seconds for result in results) == [7, 10, 13]
    assert [result.compute_seconds for result in results] == [3, 3, 3]
