"""Batches: filled, fair, computed beside the event loop, and free of what nobody waits for any more."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc
import numpy as np
import pytest
import torch
from torch import Tensor

from feddymem.backbone import PreparedImage
from feddymem.image_data import EncodedImage, RawImage
from feddymem.images import ImageError
from feddymem.scoring import Inspection, Scorer
from services.inference import batcher as batcher_module
from services.inference.batcher import Batcher, Scored
from services.inference.registry import Active
from services.runtime.errors import Refusal

SECONDS = 30
"""A test that waits longer has failed."""
LONG = 1000.0
"""A delay that no test may have."""


class Gate:
    """Open, or closed for threads that come; tells how many have come."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open, self._come = True, 0

    def close(self) -> None:
        with self._changed:
            self._open = False

    def open(self) -> None:
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def pass_through(self) -> None:
        with self._changed:
            self._come += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._open, SECONDS)

    async def come(self, count: int) -> None:
        """Waits until so many have come."""

        def wait() -> bool:
            with self._changed:
                return self._changed.wait_for(lambda: self._come >= count, SECONDS)

        assert await asyncio.to_thread(wait)


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Extractor:
    """Reads images whose bytes are a number; its features are that number times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.reading, self.computing = Gate(), Gate()
        self.read_images: list[int] = []
        self.batches: list[list[int]] = []
        self.threads: list[tuple[str, str]] = []
        self.fails = False
        self.on_compute: Callable[[], None] = lambda: None

    def read(self, image: EncodedImage | RawImage, max_pixels: int) -> PreparedImage:
        self.threads.append(("read", threading.current_thread().name))
        self.reading.pass_through()
        if not image.data:
            raise ImageError("image is empty")
        number = int(bytes(image.data))
        self.read_images.append(number)
        return PreparedImage(torch.full((3, 2, 2), float(number)), height=number, width=max_pixels)

    def __call__(self, pixels: Tensor) -> Tensor:
        self.threads.append(("compute", threading.current_thread().name))
        self.batches.append([int(image[0, 0, 0]) for image in pixels])
        self.computing.pass_through()
        self.on_compute()
        if self.fails:
            raise RuntimeError("out of memory")
        return self.factor * pixels.flatten(1)[:, :1]


class FakeScorer:
    """The score is the feature plus a number of its own."""

    def __init__(self, extractor: Extractor, more: float = 0.0) -> None:
        self.extractor, self.more = extractor, more

    def inspect_features(self, features: Tensor) -> list[Inspection]:
        return [Inspection(float(row[0]) + self.more, np.zeros((1, 1), np.float32)) for row in features]


def active(extractor: Extractor, more: float = 0.0) -> Active:
    return Active("parts", "", 1, cast(Scorer, FakeScorer(extractor, more)))


def image(number: int) -> EncodedImage:
    return EncodedImage(str(number).encode())


@asynccontextmanager
async def started(
    *extractors: Extractor, max_batch: int = 4, max_delay: float = LONG, queue_size: int = 64
) -> AsyncIterator[Batcher]:
    batcher = Batcher(max_batch, max_delay, queue_size, max_pixels=99)
    batcher.start()
    try:
        yield batcher
    finally:
        for extractor in extractors:
            extractor.reading.open()
            extractor.computing.open()
        await asyncio.to_thread(batcher.stop)


Task = asyncio.Task[Scored]


async def begun(inspections: list[Coroutine[Any, Any, Scored]]) -> list[Task]:
    """Inspections, each of which has come to the queue before the next begins."""
    tasks = []
    for inspection in inspections:
        tasks.append(asyncio.create_task(inspection))
        await asyncio.sleep(0)
    return tasks


async def scores(tasks: list[Task]) -> list[float]:
    return [scored.inspection.score for scored in await asyncio.wait_for(asyncio.gather(*tasks), SECONDS)]


async def refusal(task: Task) -> Refusal:
    with pytest.raises(Refusal) as caught:
        await asyncio.wait_for(task, SECONDS)
    return caught.value


@pytest.fixture
def extractor() -> Extractor:
    return Extractor()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(batcher_module, "time", clock)
    return clock


async def test_an_image_alone_waits_for_nobody(extractor: Extractor) -> None:
    async with started(extractor) as batcher:
        for number in (1, 2):
            scored = await asyncio.wait_for(batcher.inspect(active(extractor), image(number)), SECONDS)
            assert (scored.inspection.score, scored.height, scored.width) == (number, number, 99)
    assert extractor.batches == [[1], [2]]


async def test_batches_are_filled_and_the_last_does_not_wait_for_what_is_done(extractor: Extractor) -> None:
    """While one image is computed, nine come."""
    extractor.computing.close()
    async with started(extractor, max_batch=4) as batcher:
        first = await begun([batcher.inspect(active(extractor), image(0))])
        await extractor.computing.come(1)
        others = await begun([batcher.inspect(active(extractor), image(number)) for number in range(1, 10)])
        extractor.computing.open()
        assert await scores(first + others) == list(range(10))
    assert [len(batch) for batch in extractor.batches] == [1, 4, 4, 1]
    assert sorted(number for batch in extractor.batches for number in batch) == list(range(10))


async def test_a_batch_waits_no_longer_than_the_delay(extractor: Extractor) -> None:
    """The second image is being decoded all the time that the first is computed."""
    async with started(extractor, max_delay=0.001) as batcher:
        extractor.computing.close()
        first = await begun([batcher.inspect(active(extractor), image(0))])
        await extractor.computing.come(1)
        extractor.reading.close()
        second = await begun([batcher.inspect(active(extractor), image(1))])
        await extractor.reading.come(2)
        extractor.computing.open()
        assert await scores(first) == [0]
        extractor.reading.open()
        assert await scores(second) == [1]


async def test_the_event_loop_neither_decodes_nor_computes(extractor: Extractor) -> None:
    async with started(extractor) as batcher:
        await scores(await begun([batcher.inspect(active(extractor), image(number)) for number in range(20)]))
    assert {name for kind, name in extractor.threads if kind == "read"} <= {"decode-0", "decode-1"}
    assert {name for kind, name in extractor.threads if kind == "compute"} == {"compute"}


async def test_images_of_several_federations_and_backbones_get_their_own_scores(extractor: Extractor) -> None:
    other = Extractor(factor=-1)
    actives = [active(extractor), active(other, 0.25), active(extractor, 0.5)]
    extractor.computing.close()
    async with started(extractor, other, max_batch=16) as batcher:
        first = await begun([batcher.inspect(actives[0], image(0))])
        await extractor.computing.come(1)
        others = await begun([batcher.inspect(actives[number % 3], image(number)) for number in range(1, 14)])
        extractor.computing.open()
        expected = [(number, 0.25 - number, number + 0.5)[number % 3] for number in range(14)]
        assert await scores(first + others) == expected
    assert [len(batch) for batch in extractor.batches] == [1, 8]
    assert [len(batch) for batch in other.batches] == [5]


@asynccontextmanager
async def busy_decoders(extractor: Extractor, **options: Any) -> AsyncIterator[tuple[Batcher, list[Task]]]:
    """A batcher whose decoders have begun with the images 100 and 101 and are held there."""
    extractor.reading.close()
    async with started(extractor, **options) as batcher:
        held: list[Task] = []
        for number in (100, 101):  # the second only when the first is out of the queue, which may be small
            held += await begun([batcher.inspect(active(extractor), image(number))])
            await extractor.reading.come(len(held))
        yield batcher, held


async def test_what_waited_too_long_is_refused_and_not_decoded(extractor: Extractor, clock: Clock) -> None:
    async with busy_decoders(extractor) as (batcher, held):
        late, patient = await begun(
            [batcher.inspect(active(extractor), image(number), "", left) for number, left in ((1, 5.0), (2, 5.1))]
        )
        clock.now += 5
        extractor.reading.open()
        refused = await refusal(late)
        assert await scores([*held, patient]) == [100, 101, 2]
    assert refused.status is grpc.StatusCode.DEADLINE_EXCEEDED
    assert sorted(extractor.read_images) == [2, 100, 101]


async def test_what_expired_after_it_was_decoded_is_not_computed(extractor: Extractor, clock: Clock) -> None:
    extractor.computing.close()
    async with started(extractor) as batcher:
        first = await begun([batcher.inspect(active(extractor), image(0))])
        await extractor.computing.come(1)
        [late] = await begun([batcher.inspect(active(extractor), image(1), "", 5.0)])
        [after] = await begun([batcher.inspect(active(extractor), image(2))])
        await extractor.reading.come(3)
        clock.now += 5
        extractor.computing.open()
        assert (await refusal(late)).status is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await scores([*first, after]) == [0, 2]
    assert sorted(number for batch in extractor.batches for number in batch) == [0, 2]


async def test_what_nobody_waits_for_any_more_is_not_decoded(extractor: Extractor) -> None:
    async with busy_decoders(extractor) as (batcher, held):
        [gone, stays] = await begun([batcher.inspect(active(extractor), image(number)) for number in (1, 2)])
        gone.cancel()
        await asyncio.wait([gone])
        extractor.reading.open()
        assert await scores([*held, stays]) == [100, 101, 2]
    assert gone.cancelled()
    assert sorted(extractor.read_images) == [2, 100, 101]


async def test_what_nobody_waits_for_any_more_is_not_computed(extractor: Extractor) -> None:
    async with busy_decoders(extractor) as (_batcher, [gone, stays]):
        gone.cancel()
        await asyncio.wait([gone])
        extractor.reading.open()
        assert await scores([stays]) == [101]
    assert sorted(extractor.read_images) == [100, 101]
    assert extractor.batches == [[101]]


async def test_the_place_of_who_leaves_is_free_at_once(extractor: Extractor) -> None:
    async with busy_decoders(extractor, queue_size=1) as (batcher, held):
        [gone] = await begun([batcher.inspect(active(extractor), image(1))])
        gone.cancel()
        await asyncio.wait([gone])
        [stays] = await begun([batcher.inspect(active(extractor), image(2))])
        extractor.reading.open()
        assert await scores([*held, stays]) == [100, 101, 2]


async def test_who_leaves_while_it_is_computed_disturbs_nobody(extractor: Extractor) -> None:
    extractor.computing.close()
    async with started(extractor) as batcher:
        [gone] = await begun([batcher.inspect(active(extractor), image(0))])
        await extractor.computing.come(1)
        gone.cancel()
        await asyncio.wait([gone])
        [stays] = await begun([batcher.inspect(active(extractor), image(1))])
        extractor.computing.open()
        assert await scores([stays]) == [1]


async def test_a_full_queue_refuses_with_a_hint(extractor: Extractor) -> None:
    async with busy_decoders(extractor, queue_size=2) as (batcher, held):
        waiting = await begun([batcher.inspect(active(extractor), image(number), "a") for number in (1, 2)])
        [refused] = await begun([batcher.inspect(active(extractor), image(3), "a")])
        answer = await refusal(refused)
        extractor.reading.open()
        assert await scores(held + waiting) == [100, 101, 1, 2]
    assert answer.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert re.fullmatch(
        r"2 inspections are waiting, as many as are allowed; try again in \d+\.\d\d seconds", answer.text
    )


async def test_a_caller_with_little_in_a_full_queue_takes_the_place_of_one_with_much(extractor: Extractor) -> None:
    async with busy_decoders(extractor, queue_size=2) as (batcher, held):
        first, newest = await begun([batcher.inspect(active(extractor), image(number), "a") for number in (1, 2)])
        [other] = await begun([batcher.inspect(active(extractor), image(3), "b")])
        assert (await refusal(newest)).status is grpc.StatusCode.RESOURCE_EXHAUSTED
        extractor.reading.open()
        assert await scores([*held, first, other]) == [100, 101, 1, 3]


async def test_what_would_wait_longer_than_it_may_is_refused_at_once(extractor: Extractor, clock: Clock) -> None:
    """Images take 10 seconds; of what is new a tenth goes into the mean that the wait is told from."""

    def pass_time() -> None:
        clock.now += 10

    extractor.on_compute = pass_time
    async with started(extractor, max_batch=1, max_delay=0) as batcher:
        await scores(await begun([batcher.inspect(active(extractor), image(0))]))
        extractor.reading.close()
        held = await begun([batcher.inspect(active(extractor), image(number)) for number in (100, 101)])
        await extractor.reading.come(3)
        waiting = await begun([batcher.inspect(active(extractor), image(number), "a") for number in (1, 2, 3)])
        hasty, other, patient = await begun(
            [
                batcher.inspect(active(extractor), image(4), "a", 2.9),
                batcher.inspect(active(extractor), image(5), "b", 1.1),
                batcher.inspect(active(extractor), image(6), "a", 1e6),
            ]
        )
        answer = await refusal(hasty)
        assert answer.status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert answer.text.startswith("images wait for about 3.000 seconds, longer than the 2.900 left; try again in ")
        assert not other.done()  # of another caller, and served before most
        extractor.reading.open()
        assert await scores([*held, *waiting, patient]) == [100, 101, 1, 2, 3, 6]
        assert (await refusal(other)).status is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 4 not in extractor.read_images


async def test_an_image_that_cannot_be_decoded_fails_alone(extractor: Extractor) -> None:
    async with busy_decoders(extractor) as (batcher, held):
        broken, whole = await begun([batcher.inspect(active(extractor), i) for i in (EncodedImage(b""), image(1))])
        extractor.reading.open()
        with pytest.raises(ImageError, match="image is empty"):
            await asyncio.wait_for(broken, SECONDS)
        assert await scores([*held, whole]) == [100, 101, 1]


async def test_an_error_of_the_computation_reaches_all_of_the_batch_and_no_others(extractor: Extractor) -> None:
    extractor.computing.close()
    async with started(extractor, max_batch=4) as batcher:
        first = await begun([batcher.inspect(active(extractor), image(0))])
        await extractor.computing.come(1)
        batch = await begun([batcher.inspect(active(extractor), image(number)) for number in range(1, 5)])
        await extractor.reading.come(5)
        extractor.fails = True
        extractor.computing.open()
        for task in first + batch:
            with pytest.raises(RuntimeError, match="out of memory"):
                await asyncio.wait_for(task, SECONDS)
        extractor.fails = False
        assert await scores(await begun([batcher.inspect(active(extractor), image(9))])) == [9]
    assert [len(b) for b in extractor.batches] == [1, 4, 1]


async def test_stopping_finishes_what_is_accepted(extractor: Extractor) -> None:
    before = set(threading.enumerate())
    async with busy_decoders(extractor) as (batcher, held):
        waiting = await begun([batcher.inspect(active(extractor), image(number)) for number in range(10)])
        threads = set(threading.enumerate()) - before
    assert await scores(held + waiting) == [100, 101, *range(10)]
    mine = [thread for thread in threads if thread.name.startswith(("decode", "compute"))]
    assert len(mine) == 3
    assert not any(thread.is_alive() for thread in mine)


async def test_room_is_told_of_when_an_inspection_is_done(extractor: Extractor) -> None:
    async with busy_decoders(extractor) as (batcher, held):
        waiting = asyncio.create_task(batcher.room(None))
        await asyncio.sleep(0)
        assert not waiting.done()
        extractor.reading.open()
        await asyncio.wait_for(waiting, SECONDS)
        await scores(held)


async def test_the_wait_and_the_computation_are_timed(extractor: Extractor, clock: Clock) -> None:
    def pass_time() -> None:
        clock.now += 3

    extractor.on_compute = pass_time
    async with busy_decoders(extractor, max_batch=1, max_delay=0) as (_batcher, held):
        clock.now += 7
        extractor.reading.open()
        results = await asyncio.wait_for(asyncio.gather(*held), SECONDS)
    assert sorted(result.queue_seconds for result in results) == [7, 10]
    assert [result.compute_seconds for result in results] == [3, 3]
