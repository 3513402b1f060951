"""What the batcher shows of inspections: how many wait, and how long each part of them takes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from feddymem.backbone import PreparedImage
from feddymem.image_data import EncodedImage, RawImage
from feddymem.images import ImageError
from services.inference.batcher import Batcher
from services.inference.job import Scored
from services.runtime.errors import Refusal
from tests.samples import growth, total
from tests.unit.batcher.fakes import (
    HELD,
    SECONDS,
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

READING, COMPUTING, FINISHING, ELSEWHERE, LONG_AGO = 2.0, 10.0, 5.0, 100.0, 10_000.0


class Times:
    """How often, and for how long in all, parts of inspections have taken since."""

    def __init__(self) -> None:
        self._before = {part: self._now(part) for part in ("duration", "queue", "decode", "compute", "encode")}

    def _now(self, part: str) -> tuple[float, float]:
        name = f"inspection_{part}_seconds"
        return total(f"{name}_count"), total(f"{name}_sum")

    def of(self, part: str) -> tuple[float, float]:
        (count, seconds), (count_before, before) = self._now(part), self._before[part]
        return count - count_before, round(seconds - before, 6)


class Slow(Extractor):
    """Each step takes a time of its own."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.on_compute = lambda: self.passes(COMPUTING)

    def passes(self, seconds: float) -> None:
        self.clock.now += seconds

    def read(self, image: EncodedImage | RawImage, max_pixels: int) -> PreparedImage:
        self.passes(READING)
        return super().read(image, max_pixels)

    def finish(self, scored: Scored) -> Scored:
        self.passes(FINISHING)
        return scored


def inspection(batcher: Batcher, extractor: Slow, number: int = 1) -> Coroutine[Any, Any, Scored]:
    return batcher.inspect(active(extractor), image(number), extractor.finish)


async def test_the_parts_of_an_inspection_are_timed_each_for_itself(clock: Clock) -> None:
    extractor, times = Slow(clock), Times()
    async with started(extractor) as batcher:
        for count in (1, 2):
            scored = await asyncio.wait_for(inspection(batcher, extractor), SECONDS)
            assert (scored.queue_seconds, scored.compute_seconds) == (READING, COMPUTING)
            assert times.of("queue") == (count, 0)
            assert times.of("decode") == (count, count * READING)
            assert times.of("compute") == (count, count * COMPUTING)
            assert times.of("encode")[0] == count
            assert times.of("duration") == (count, count * (READING + COMPUTING + FINISHING))


async def test_the_queue_is_what_an_image_waits_for_its_decoding_and_then_for_its_computation(clock: Clock) -> None:
    extractor, times = Slow(clock), Times()
    extractor.computing.close()
    async with started(extractor, max_batch=1, max_delay=0) as batcher:
        first = await begun([batcher.inspect(active(extractor), image(0), as_it_is)])
        await extractor.computing.come(1)
        second = await begun([inspection(batcher, extractor)])
        await extractor.reading.come(2)
        while times.of("decode")[0] < 2:  # noqa: ASYNC110 - there is no event for a metric
            await asyncio.sleep(0)
        extractor.passes(ELSEWHERE)
        extractor.computing.open()
        await scores([*first, *second])
    assert times.of("queue") == (2, ELSEWHERE + COMPUTING)


async def test_what_waits_to_be_decoded_is_in_the_queue_and_what_is_held_there_is_decoded(clock: Clock) -> None:
    extractor, times = Slow(clock), Times()
    async with busy_threads(extractor) as (batcher, held):
        queued = await begun([inspection(batcher, extractor)])
        extractor.passes(LONG_AGO)
        extractor.reading.open()
        assert await scores([*held, *queued]) == [*HELD, 1]
    for part, images in (("queue", 1), ("decode", len(HELD))):
        count, seconds = times.of(part)
        assert count == len(HELD) + 1
        assert images <= seconds / LONG_AGO < images + 0.5  # the rest is what the others take meanwhile


async def test_a_batch_is_timed_once_whatever_its_images(clock: Clock) -> None:
    extractor, times = Slow(clock), Times()
    names = "inspection_batch_images_count", "inspection_batch_images_sum"
    more = growth(*names)
    async with busy_threads(extractor) as (_batcher, held):
        extractor.reading.open()
        assert await scores(held) == HELD
        batches = len(extractor.batches)
    assert more() == [batches, len(HELD)]
    assert times.of("compute") == (batches, batches * COMPUTING)


async def test_what_has_no_result_has_no_duration(clock: Clock) -> None:
    extractor, times = Slow(clock), Times()
    extractor.fails_to_read = {7}
    async with started(extractor) as batcher:
        with pytest.raises(ImageError):
            await asyncio.wait_for(inspection(batcher, extractor, 7), SECONDS)
        with pytest.raises(Refusal):
            await batcher.inspect(active(extractor), image(1), as_it_is, seconds_left=0.0)
    for part in ("duration", "decode", "queue", "compute", "encode"):
        assert times.of(part) == (0, 0)


async def test_those_that_wait_are_shown_until_they_are_answered(extractor: Extractor) -> None:
    before = total("inspections_waiting")

    def waiting() -> tuple[float, int]:
        return total("inspections_waiting") - before, batcher.queue_length

    async with busy_threads(extractor, queue_size=2) as (batcher, held):
        assert waiting() == (3, 0)
        queued = await begun([batcher.inspect(active(extractor), image(number), as_it_is) for number in (1, 2)])
        assert waiting() == (5, 2)
        [refused] = await begun([batcher.inspect(active(extractor), image(3), as_it_is)])
        await refusal(refused)
        assert waiting() == (5, 2)
        for gone, left in ((queued[0], (4, 1)), (held[0], (3, 1))):  # one in the queue, one that is being decoded
            gone.cancel()
            await asyncio.wait([gone])
            assert waiting() == left
        extractor.reading.open()
        assert await scores([*held[1:], queued[1]]) == [*HELD[1:], 2]
        assert waiting() == (0, 0)
