"""Many images and threads that switch all the time: nothing is left lying, mixed up or computed too often."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from feddymem.backbone import PreparedImage
from feddymem.image_data import EncodedImage, RawImage
from feddymem.images import ImageError
from services.inference.batcher import Batcher
from services.inference.job import Scored
from tests.unit.batcher.fakes import LONG, SECONDS, THREADS, Extractor, Task, active, begun, image, scores, started


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
