"""What is known of many scores without the scores: counts on a fixed grid (ours)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STEP = 1.005
"""A level of the grid is this many times the one below it: what is told of a score is at most 0.5 % above it."""
MIN_LEVEL, MAX_LEVEL = -4_000, 4_000
"""Lowest and highest level, 2e-9 and 5e8: far beyond what the distances of any feature space are."""


_GRID = STEP ** np.arange(MIN_LEVEL, MAX_LEVEL + 1, dtype=np.float64)
"""What scores of each level count as."""


class InvalidSketchError(ValueError):
    """A sketch holds what no scores make."""


@dataclass(frozen=True)
class ScoreSketch:
    """How many scores lie on each level of a grid. Those of several sites merge without any further error.

    A score of level `l` is in (STEP^(l-1), STEP^l] and counts as STEP^l. Rounding up is on the safe side wherever it is
    asked how many scores are at least as high as another one: a sketch never says fewer. Below the lowest level scores
    count as it, and above the highest as that one.

    Attributes:
        levels: ascending, each between MIN_LEVEL and MAX_LEVEL.
        counts: scores of each level; at least 1.

    Raises:
        InvalidSketchError: levels that do not ascend or are off the grid, or counts that are not theirs.
    """

    levels: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.levels) != len(self.counts):
            raise InvalidSketchError(f"a sketch has {len(self.levels)} levels and {len(self.counts)} counts")
        if any(low >= high for low, high in zip(self.levels, self.levels[1:], strict=False)):
            raise InvalidSketchError("the levels of a sketch ascend; those given do not")
        if self.levels and not MIN_LEVEL <= self.levels[0] <= self.levels[-1] <= MAX_LEVEL:
            raise InvalidSketchError(
                f"levels are from {self.levels[0]} to {self.levels[-1]}; expected {MIN_LEVEL} to {MAX_LEVEL}"
            )
        if any(count < 1 for count in self.counts):
            raise InvalidSketchError(
                f"smallest count is {min(self.counts)}; a level that is named has at least 1 score"
            )

    @staticmethod
    def of(scores: Iterable[float]) -> ScoreSketch:
        """The sketch of scores, each finite and at least 0."""
        counts = sorted(Counter(map(level_of, scores)).items())
        return ScoreSketch(tuple(level for level, _ in counts), tuple(count for _, count in counts))

    def __len__(self) -> int:
        """Number of scores."""
        return sum(self.counts)

    @property
    def scores(self) -> NDArray[np.float64]:
        """(n,) float64, ascending: the scores, each rounded up to its level."""
        return np.repeat(_GRID[np.array(self.levels, np.int64) - MIN_LEVEL], np.array(self.counts, np.int64))


NO_SCORES = ScoreSketch()


def level_of(score: float) -> int:
    """The level of a score, finite and at least 0.

    Raises:
        InvalidSketchError: it is not.
    """
    if not (math.isfinite(score) and score >= 0):
        raise InvalidSketchError(f"score is {score}; expected a finite number of at least 0")
    return MIN_LEVEL + min(int(np.searchsorted(_GRID, score)), MAX_LEVEL - MIN_LEVEL)
