"""Sketches of scores: they merge without error, round up by little, and refuse what no scores make."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from feddymem.sketch import MAX_LEVEL, MIN_LEVEL, NO_SCORES, STEP, InvalidSketchError, ScoreSketch

ON_GRID = st.floats(STEP**MIN_LEVEL, STEP**MAX_LEVEL)
SCORES = st.lists(st.floats(0, STEP**MAX_LEVEL))


@given(st.lists(SCORES))
def test_what_is_known_of_several_is_what_is_known_of_all_together(parts: list[list[float]]) -> None:
    together = ScoreSketch.of(score for part in parts for score in part)
    merged = np.sort(np.concatenate([*(ScoreSketch.of(part).scores for part in parts), np.zeros(0)]))
    np.testing.assert_array_equal(merged, together.scores)
    assert len(together) == sum(map(len, parts))


@given(ON_GRID)
@example(STEP**MIN_LEVEL)
@example(STEP**MAX_LEVEL)
@example(1.0)
def test_a_score_is_rounded_up_by_half_a_percent_at_most(score: float) -> None:
    (kept,) = ScoreSketch.of([score]).scores
    assert score <= kept <= score * STEP * (1 + 1e-15)


@given(st.integers(MIN_LEVEL, MAX_LEVEL))
def test_a_rounded_score_stays_as_it_is(level: int) -> None:
    sketch = ScoreSketch((level,), (1,))
    assert ScoreSketch.of(sketch.scores) == sketch


@given(SCORES, st.floats(0, STEP**MAX_LEVEL))
def test_a_sketch_never_says_of_fewer_scores_that_they_are_at_least_as_high(scores: list[float], value: float) -> None:
    kept = ScoreSketch.of(scores).scores
    assert (kept >= value).sum() >= (np.array(scores) >= value).sum()
    assert (np.diff(kept) >= 0).all()


def test_scores_off_the_grid_count_as_its_ends() -> None:
    assert ScoreSketch.of([0, 5e-324, 1e300]) == ScoreSketch((MIN_LEVEL, MAX_LEVEL), (2, 1))


def test_a_sketch_of_nothing_is_empty() -> None:
    assert ScoreSketch.of([]) == NO_SCORES
    assert (len(NO_SCORES), len(NO_SCORES.scores)) == (0, 0)


@pytest.mark.parametrize("score", [math.nan, math.inf, -1.0, -1e-300])
def test_what_is_no_score_is_refused(score: float) -> None:
    with pytest.raises(InvalidSketchError, match="finite number of at least 0"):
        ScoreSketch.of([1.0, score])


@pytest.mark.parametrize(
    ("levels", "counts", "told"),
    [
        ((1,), (), "1 levels and 0 counts"),
        ((2, 1), (1, 1), "ascend"),
        ((1, 1), (1, 1), "ascend"),
        ((MIN_LEVEL - 1,), (1,), "from -4001"),
        ((1, MAX_LEVEL + 1), (1, 1), "to 4001"),
        ((1,), (0,), "smallest count is 0"),
    ],
)
def test_what_no_scores_make_is_refused(levels: tuple[int, ...], counts: tuple[int, ...], told: str) -> None:
    with pytest.raises(InvalidSketchError, match=told):
        ScoreSketch(levels, counts)
