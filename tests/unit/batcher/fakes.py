"""What the tests of the batcher inspect with: images that are numbers, and gates that hold them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from feddymem.backbone import PreparedImage
from feddymem.image_data import EncodedImage, RawImage
from feddymem.images import ImageError
from feddymem.scoring import Inspection, Scorer
from services.inference.active import Active
from services.inference.batcher import Batcher
from services.inference.job import Scored
from services.inference.lines import Lines
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
    return Active("parts", "", 1, 0, cast(Scorer, FakeScorer(extractor, more)), Lines("parts", None))


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
