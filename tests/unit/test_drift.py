"""Drift: found soon when scores shift, and hardly ever while they do not."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from feddymem import drift
from feddymem.calibration import Limit, Normals
from feddymem.drift import DEFECTS, QUIET_IMAGES, DriftTest
from feddymem.sketch import STEP, ScoreSketch, level_of

RATE = 0.05
NEVER = 10**6
Scores = NDArray[np.float64]


def limit(*sites: Iterable[float]) -> Limit:
    """For images of the first of these sites."""
    found = Normals({str(number): ScoreSketch.of(scores) for number, scores in enumerate(sites)}).limit("0", RATE)
    assert found is not None
    return found


def scores(rng: np.random.Generator, images: int, shift: float = 0, defects: float = 0) -> Scores:
    """Log-normal scores with a coefficient of variation of 0.1, shifted by so many standard deviations."""
    normal = rng.normal(size=images) + shift
    return 40 * np.exp(0.1 * np.where(rng.random(images) < defects, 5.0, normal))


def found_after(test: DriftTest, stream: Iterable[float]) -> int:
    """Images until drift is found."""
    for number, score in enumerate(stream, 1):
        test.add(float(score))
        if test.found:
            return number
    return NEVER


def median_until_found(held_out: int, before: int, shift: float, repeats: int = 21) -> float:
    rng = np.random.default_rng(held_out + before)
    found = []
    for _ in range(repeats):
        test = DriftTest(limit(scores(rng, held_out)))
        assert found_after(test, scores(rng, before)) == NEVER
        found.append(found_after(test, scores(rng, 300, shift)))
    return statistics.median(found)


FIFTH, QUARTER, THIRD, HALF = 0.82, 1.0, 1.2, 1.65
"""Shifts, in standard deviations, that bring the alarm rate from 5 % to these shares."""


@pytest.mark.parametrize(
    ("held_out", "before", "shift"),
    [(72, 0, THIRD), (72, 0, HALF), (72, 200, QUARTER), (300, 0, QUARTER), (300, 500, FIFTH), (1000, 0, FIFTH)],
)
def test_a_shift_that_brings_the_alarm_rate_above_a_fifth_is_found_within_50_images(
    held_out: int, before: int, shift: float
) -> None:
    assert median_until_found(held_out, before, shift) <= 50


def test_scores_that_fall_are_found_too() -> None:
    assert median_until_found(72, 0, -HALF) <= 50


@pytest.mark.parametrize("held_out", [12, 72])
@pytest.mark.parametrize("defects", [0.0, DEFECTS])
def test_while_nothing_changes_drift_is_hardly_ever_found(held_out: int, defects: float) -> None:
    """At 10,000 images a false alarm in the mean, ten streams of 2,000 may have two; here they have none."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        test = DriftTest(limit(scores(rng, held_out)))
        assert found_after(test, scores(rng, 2_000, defects=defects)) == NEVER


def test_so_few_images_of_several_sites_together_do_not_make_their_differences_drift() -> None:
    """Six sites of which each has its own level and twelve images: held against all of them, through their means."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        levels = rng.uniform(0.5, 2, 6)
        known = limit(*(level * scores(rng, 12) for level in levels))
        assert (known.basis, known.images) == ("federation", 72)
        assert found_after(DriftTest(known), levels[0] * scores(rng, 1_000)) == NEVER
        assert found_after(DriftTest(known), levels[0] * scores(rng, 100, 2.5)) <= 50


def test_the_error_of_the_mean_of_a_site_s_few_images_is_no_drift() -> None:
    """Four images of its own, held against five other sites' through their mean, which is often off by 5 %."""
    found = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        known = limit(scores(rng, 4), *(scores(rng, 12) for _ in range(5)))
        assert (known.basis, known.images) == ("federation", 64)
        found += found_after(DriftTest(known), scores(rng, 300)) != NEVER
    assert found <= 3


def test_evidence_adds_up_from_image_to_image() -> None:
    known, rng = limit([10.0, 11, 12, 13, 14]), np.random.default_rng(0)
    for rising in (True, False):
        evidence, same = (drift._Evidence(known, 1.0, rising) for _ in range(2))
        value = 0.0
        for score in rng.uniform(9, 15, 30):
            rounded = STEP ** level_of(float(score))
            evidence.add(rounded, keep=True)
            value = (1 + value) * drift._bet(same.p_value(rounded, keep=True))
            assert evidence.value == pytest.approx(value)


def test_a_bet_is_fair_at_best_whatever_share_of_defects_there_is_up_to_the_one_allowed() -> None:
    p_values = (np.arange(100_000) + 0.5) / 100_000
    mean = float(np.mean([drift._bet(p) for p in p_values]))
    for share in (0.0, DEFECTS / 2, DEFECTS):
        assert (1 - share) * mean + share * drift._bet(0.0) <= 1 + 1e-4
    assert all(drift._bet(p) > 0 for p in (0.0, 0.5, 1.0))


@given(held_out=st.lists(st.floats(0, 1e6), min_size=1, max_size=30), stream=st.lists(st.floats(0, 1e6), max_size=30))
def test_p_values_are_ranks_among_all_images_seen_rounded_to_the_safe_side(
    held_out: list[float], stream: list[float]
) -> None:
    known, known_of = list(held_out), limit(held_out)
    rising, falling = (drift._Evidence(known_of, 1.0, rising=rising) for rising in (True, False))
    for score in stream:
        rounded = STEP ** level_of(score)
        at_least, at_most = (each.p_value(rounded, keep=True) for each in (rising, falling))
        known.append(score)
        assert at_least >= sum(each >= score for each in known) / len(known) - 1e-12
        assert at_most >= sum(each <= score for each in known) / len(known) - 1e-12
        assert at_least <= 1
        assert at_most <= 1


@pytest.mark.parametrize("value", [0.0, 1.0, 12.34, 1e-8, 1e8])
@pytest.mark.parametrize("sites", [1, 3])
@pytest.mark.parametrize("held_out", [1, 6, 300])
def test_equal_scores_are_no_drift_wherever_on_the_grid_they_lie(value: float, sites: int, held_out: int) -> None:
    test = DriftTest(limit(*[[value] * held_out] * sites))
    assert found_after(test, [value] * 1_000) == NEVER


def test_other_scores_than_the_equal_ones_held_out_are_drift() -> None:
    assert found_after(DriftTest(limit([10.0] * 60)), [10.2] * 50) <= 50


def test_drift_goes_on_while_there_is_evidence_and_ends_after_enough_images_without() -> None:
    rng = np.random.default_rng(0)
    test = DriftTest(limit(scores(rng, 72)))
    first = found_after(test, scores(rng, 300, HALF))
    for number, score in enumerate(scores(rng, 1_000, HALF), 1):
        test.add(float(score))
        assert test.found
        assert test.images_since == number
    calm = [number for number, score in enumerate(scores(rng, 1_000), 1) if _still(test, float(score))]
    assert first < 100
    assert QUIET_IMAGES - 50 <= len(calm) <= QUIET_IMAGES + 50
    assert (test.found, test.images_since) == (False, 0)
    assert found_after(test, scores(rng, 300, HALF)) < 100


def test_while_there_is_drift_images_are_compared_with_those_held_out_alone() -> None:
    rng = np.random.default_rng(0)
    test = DriftTest(limit(scores(rng, 72)))
    found_after(test, scores(rng, 100))
    assert test._rising._images == test._falling._images == 172
    found_after(test, scores(rng, 300, HALF))
    for score in scores(rng, 50, HALF):
        assert test.found
        for each in (test._rising, test._falling):
            assert each._images == each._counts.sum() == 72
        test.add(float(score))


def _still(test: DriftTest, score: float) -> bool:
    test.add(score)
    return test.found


def test_what_the_test_keeps_does_not_grow() -> None:
    rng = np.random.default_rng(0)
    test = DriftTest(limit(scores(rng, 72)))
    before = test._rising._counts.nbytes
    for score in scores(rng, 1_000):
        test.add(float(score))
    assert test._rising._counts.nbytes == before < 100_000
    assert all(math.isfinite(each.value) for each in (test._rising, test._falling))
