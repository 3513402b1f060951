"""Pauses between attempts: random below a bound that doubles, is bounded itself, and starts small after a good time."""

from __future__ import annotations

import pytest

from services.inference.settings import InferenceSettings
from services.runtime.backoff import FIRST_RETRY_SECONDS, Backoff


class Clock:
    """Stands for time and chance: the pauses that were asked for, of which each takes its longest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.bounds = 0.0, list[tuple[float, float]]()
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        monkeypatch.setattr("asyncio.sleep", self.sleep)
        monkeypatch.setattr("random.uniform", self.uniform)

    async def sleep(self, seconds: float) -> None:
        self.now += seconds

    def uniform(self, low: float, high: float) -> float:
        self.bounds.append((low, high))
        return high


def settings(retry_seconds: float) -> InferenceSettings:
    return InferenceSettings(aggregator="127.0.0.1:1", retry_seconds=retry_seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def test_bounds_double_up_to_the_longest(clock: Clock) -> None:
    pauses = Backoff(settings(3))
    for _ in range(5):
        await pauses.pause()
    assert clock.bounds == [(0, FIRST_RETRY_SECONDS), (0, 1), (0, 2), (0, 3), (0, 3)]


async def test_a_short_longest_pause_bounds_the_first_too(clock: Clock) -> None:
    pauses = Backoff(settings(0.2))
    await pauses.pause()
    await pauses.pause()
    assert clock.bounds == [(0, 0.2), (0, 0.2)]


async def test_bounds_start_small_only_after_a_good_time(clock: Clock) -> None:
    pauses = Backoff(settings(10))
    for _ in range(3):
        await pauses.pause()
    clock.now += 9  # connected, and broken again
    await pauses.pause()
    clock.now += 11
    await pauses.pause()
    assert [high for _, high in clock.bounds] == [0.5, 1, 2, 4, 0.5]
