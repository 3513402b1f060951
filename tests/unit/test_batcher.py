"""Batches: filled, fair, made into results beside the event loop, and free of what nobody waits for any more."""

from __future__ import annotations

import asyncio
import gc
import re
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
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
LONG = 2.0 * SECONDS
"""A delay that no test may have; not for ever, or a test that fails would not end."""
THREADS = 3
HELD = [100, 101, 102]
"""Images that `busy_threads` are held at."""


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
        self.reading_of: dict[int, Gate] = {}
        self.read_images: list[int] = []
        self.batches: list[list[int]] = []
        self.threads: list[tuple[str, str]] = []
        self.fails_to_read: set[int] = set()
        self.fails = False
        self.on_compute: Callable[[], None] = lambda: None

    def read(self, image: EncodedImage | RawImage, max_pixels: int) -> PreparedImage:
        self.threads.append(("read", threading.current_thread().name))
        self.reading.pass_through()
        if not image.data:
            raise ImageError("image is empty")
        number = int(bytes(image.data))
        if number in self.reading_of:
            self.reading_of[number].pass_through()
        if number in self.fails_to_read:
            raise ImageError("image is broken")
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


def as_it_is(scored: Scored) -> Scored:
    return scored


class Finish:
    """Makes nothing of a score, at a gate."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.threads: list[str] = []

    def __call__(self, scored: Scored) -> Scored:
        self.threads.append(threading.current_thread().name)
        self.gate.pass_through()
        return scored


@asynccontextmanager
async def started(
    *extractors: Extractor, max_batch: int = 4, at_once: int = 1, max_delay: float = LONG, queue_size: int = 64
) -> AsyncIterator[Batcher]:
    batcher = Batcher(max_batch, at_once, max_delay, queue_size, max_pixels=99)
    batcher.start()
    try:
        yield batcher
    finally:
        for extractor in extractors:
            for gate in (extractor.reading, extractor.computing, *extractor.reading_of.values()):
                gate.open()
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


@pytest.fixture(autouse=True)
def _as_on_a_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher_module, "workers", lambda: THREADS)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(batcher_module, "time", clock)
    return clock


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


class Bound:
    """How many there are of something, at most."""

    def __init__(self) -> None:
        self._lock, self._now, self.most = threading.Lock(), 0, 0

    def change(self, by: int) -> None:
        with self._lock:
            self._now += by
            self.most = max(self.most, self._now)


class Unsteady(Extractor):
    """Takes a while for everything, one time longer than the other."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._chance = np.random.default_rng(seed)
        self.decoded, self.computations = Bound(), Bound()

    def dawdle(self, scored: Scored | None = None) -> Any:
        for _ in range(int(self._chance.exponential(300))):
            pass
        return scored

    def read(self, image: EncodedImage | RawImage, max_pixels: int) -> PreparedImage:
        self.dawdle()
        prepared = super().read(image, max_pixels)
        self.decoded.change(1)
        return prepared

    def __call__(self, pixels: Tensor) -> Tensor:
        self.decoded.change(-len(pixels))
        self.computations.change(1)
        self.dawdle()
        features = super().__call__(pixels)
        self.computations.change(-1)
        return features


@pytest.fixture
def _frequent_switches() -> Iterator[None]:
    seconds = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(seconds)


@pytest.mark.usefixtures("_frequent_switches")
@pytest.mark.parametrize(("at_once", "max_delay"), [(1, 0.0), (1, LONG), (2, 0.0), (2, 0.001), (3, 0.001)])
@pytest.mark.parametrize("max_batch", [1, 2, 5])
async def test_nothing_that_is_decoded_is_left_lying(max_batch: int, at_once: int, max_delay: float) -> None:
    """Many small waves, for what is left lying is found by the next image: only the last of a wave could be forgotten.

    Nor does a batch wait for images that will not come, where it is the only one.
    """
    chance = np.random.default_rng(max_batch)
    extractor = Unsteady(seed=max_batch)
    async with started(extractor, max_batch=max_batch, at_once=at_once, max_delay=max_delay) as batcher:
        begin = 0
        for _ in range(150):
            tasks: list[Task] = []
            wave = range(begin, begin + int(chance.choice((1, 2, 3, 4, 7, 15))))
            begin = wave.stop
            for number in wave:
                inspection = batcher.inspect(active(extractor), image(number), extractor.dawdle, str(number % 3))
                tasks += await begun([inspection])
                for _ in range(int(chance.choice((0, 0, 1, 5)))):
                    await asyncio.sleep(0)  # the event loop's turn, not time
            assert await scores(tasks) == list(wave)
    computed = [number for batch in extractor.batches for number in batch]
    assert len(computed) == len(set(computed)) == len(extractor.read_images)
    assert max(len(batch) for batch in extractor.batches) <= max_batch
    assert extractor.computations.most <= at_once
    # What lies decoded, what the decoding threads hold, and what is taken for the next batches.
    assert extractor.decoded.most <= max(1, max_batch - THREADS) + (THREADS - at_once) + at_once * max_batch


@pytest.mark.usefixtures("_frequent_switches")
@pytest.mark.parametrize("at_once", [1, 2])
async def test_each_of_many_callers_gets_its_own_result_whoever_leaves_or_fails(at_once: int) -> None:
    extractor, chance = Unsteady(seed=1), np.random.default_rng(1)

    def refuse(scored: Scored) -> Scored:
        raise ValueError(str(scored.height))

    async def call(batcher: Batcher, caller: int) -> int:
        done = 0
        for number in range(1000 * caller, 1000 * caller + 60):
            kind = chance.choice(("whole", "whole", "broken", "refused", "gone"))
            data = EncodedImage(b"") if kind == "broken" else image(number)
            finish = refuse if kind == "refused" else extractor.dawdle
            task = asyncio.create_task(batcher.inspect(active(extractor), data, finish, str(caller)))
            if kind == "gone":
                for _ in range(chance.integers(40)):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
            elif kind == "whole":
                assert await scores([task]) == [number]
            else:
                expected, text = (ImageError, "image is empty") if kind == "broken" else (ValueError, f"^{number}$")
                with pytest.raises(expected, match=text):
                    await asyncio.wait_for(task, SECONDS)
            done += 1
        return done

    async with started(extractor, max_batch=4, at_once=at_once, max_delay=0.0005) as batcher:
        assert await asyncio.gather(*(call(batcher, caller) for caller in range(12))) == [60] * 12


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


@asynccontextmanager
async def busy_threads(extractor: Extractor, **options: Any) -> AsyncIterator[tuple[Batcher, list[Task]]]:
    """A batcher whose threads have begun with the images `HELD` and are held there."""
    extractor.reading.close()
    async with started(extractor, **options) as batcher:
        held: list[Task] = []
        for number in HELD:  # the next only when the one before is out of the queue, which may be small
            held += await begun([batcher.inspect(active(extractor), image(number), as_it_is)])
            await extractor.reading.come(len(held))
        yield batcher, held


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


async def test_room_is_told_of_when_an_inspection_is_done(extractor: Extractor) -> None:
    async with busy_threads(extractor) as (batcher, held):
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
    async with busy_threads(extractor, max_batch=1, max_delay=0) as (_batcher, held):
        clock.now += 7
        extractor.reading.open()
        results = await asyncio.wait_for(asyncio.gather(*held), SECONDS)
    assert sorted(result.queue_seconds for result in results) == [7, 10, 13]
    assert [result.compute_seconds for result in results] == [3, 3, 3]
