"""What is done of a score when the result is out: by the way, and not while others wait."""

from __future__ import annotations

import asyncio
import threading

import torch

from services.inference.job import Scored
from tests.unit.batcher.fakes import SECONDS, Extractor, active, as_it_is, begun, busy_threads, image, scores, started


class Noted:
    """Notes what is to be done afterwards, and lets a test wait for it."""

    def __init__(self) -> None:
        self.seen: list[Scored | None] = []
        self._changed = threading.Condition()

    def __call__(self, scored: Scored | None) -> None:
        with self._changed:
            self.seen.append(scored)
            self._changed.notify_all()

    async def wait(self, count: int) -> list[Scored | None]:
        def come() -> bool:
            with self._changed:
                return self._changed.wait_for(lambda: len(self.seen) >= count, SECONDS)

        assert await asyncio.to_thread(come)
        return self.seen


async def test_it_has_the_score_and_its_own_features() -> None:
    extractor, noted = Extractor(factor=2.0), Noted()
    async with started(extractor) as batcher:
        for number in (7, 8):
            await asyncio.wait_for(
                batcher.inspect(active(extractor), image(number), as_it_is, afterwards=noted), SECONDS
            )
            *_, scored = await noted.wait(number - 6)
            assert scored is not None
            assert scored.inspection.score == 2 * number
            assert scored.features is not None
            assert torch.equal(scored.features, torch.full((1, 1), 2.0 * number))


async def test_features_are_kept_for_nobody_who_does_not_ask() -> None:
    extractor = Extractor()
    async with started(extractor) as batcher:
        scored = await asyncio.wait_for(batcher.inspect(active(extractor), image(7), as_it_is), SECONDS)
        assert scored.features is None


async def test_it_is_left_out_while_other_images_wait() -> None:
    extractor, noted = Extractor(), Noted()
    async with busy_threads(extractor, max_batch=1) as (batcher, held):
        tasks = await begun(
            [batcher.inspect(active(extractor), image(n), as_it_is, afterwards=noted) for n in range(20)]
        )
        extractor.reading.open()
        assert await scores(tasks) == [float(number) for number in range(20)]
        await scores(held)
        seen = await noted.wait(20)
    assert None in seen
    assert len(seen) == 20


async def test_a_result_does_not_wait_for_it() -> None:
    extractor, gate = Extractor(), threading.Event()

    def hold(_scored: Scored | None) -> None:
        assert gate.wait(SECONDS)

    async with started(extractor) as batcher:
        try:
            scored = await asyncio.wait_for(
                batcher.inspect(active(extractor), image(3), as_it_is, afterwards=hold), SECONDS
            )
            assert scored.inspection.score == 3
        finally:
            gate.set()
