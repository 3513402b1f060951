"""Verdicts with a known false-alarm rate: what they promise, by example, by property, and by simulation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from feddymem.calibration import Limit, Normals
from feddymem.sketch import STEP, ScoreSketch

SCORE = st.floats(0, 1e6, width=32)
RATE = st.floats(0.001, 0.999) | st.sampled_from([1 - 1e-6, 1 - 1e-9, 1 - 1e-12])
SITES = st.lists(st.lists(SCORE, max_size=30), min_size=1, max_size=4).filter(any)


def limit(sites: Sequence[Sequence[float] | NDArray[np.float64]], rate: float, site: int = 0) -> Limit:
    """That of a site, by its place."""
    found = normals(sites).limit(str(site), rate)
    assert found is not None
    return found


def normals(sites: Sequence[Sequence[float] | NDArray[np.float64]]) -> Normals:
    return Normals({str(number): ScoreSketch.of(scores) for number, scores in enumerate(sites)})


def neighbours(value: float) -> list[float]:
    """The float32 values around one, and itself."""
    own = np.float32(value)
    return [float(np.nextafter(own, np.float32(-np.inf))), float(own), float(np.nextafter(own, np.float32(np.inf)))]


@given(SITES, RATE, SCORE)
def test_the_verdict_by_threshold_is_the_verdict_by_p_value(
    sites: list[list[float]], rate: float, score: float
) -> None:
    found = limit(sites, rate)
    at = found.reference[np.searchsorted(found.reference, found.threshold, side="right") - 1]
    for value in (score, *neighbours(found.threshold), *neighbours(float(at)), *neighbours(found.threshold * STEP)):
        p = found.p_value(value)
        assert 0 < p <= 1
        assert (value >= found.threshold) == (p <= found.rate + 1e-9)


@given(SITES, RATE)
def test_the_rate_is_at_most_the_one_wanted_or_the_least_that_so_many_images_can_guarantee(
    sites: list[list[float]], rate: float
) -> None:
    found = limit(sites, rate)
    assert found.rate <= max(rate, 1 / (found.images + 1)) + 1e-9
    assert found.rate + 1 / (found.images + 1) > rate  # and no lower than needed
    assert len(found.reference) == found.images
    assert float(np.float32(found.threshold)) == found.threshold


@given(SITES, RATE, RATE)
def test_who_allows_more_false_alarms_has_no_higher_threshold(sites: list[list[float]], one: float, two: float) -> None:
    """Where both rest on the same images."""
    strict, lax = (limit(sites, rate) for rate in sorted((one, two)))
    if strict.basis == lax.basis:
        assert lax.threshold <= strict.threshold
        assert strict.rate <= lax.rate


@given(SITES, RATE, SCORE, SCORE)
def test_a_higher_score_has_no_higher_p_value_and_no_lower_place_on_the_scale(
    sites: list[list[float]], rate: float, one: float, two: float
) -> None:
    low, high = sorted((one, two))
    found = limit(sites, rate)
    assert found.p_value(high) <= found.p_value(low)
    assert 0 <= found.normalised(low) <= found.normalised(high) <= 1


@given(SITES, RATE)
def test_the_threshold_is_the_middle_of_the_scale(sites: list[list[float]], rate: float) -> None:
    found = limit(sites, rate)
    below, at, _ = neighbours(found.threshold)
    assert found.normalised(below) < 0.5 == found.normalised(at)
    assert found.normalised(found.low) == pytest.approx(0)
    assert found.normalised(found.full) == pytest.approx(1)


@given(st.lists(SCORE, min_size=1, max_size=60), RATE)
def test_the_p_value_counts_the_image_itself(scores: list[float], rate: float) -> None:
    found = limit([scores], rate)
    assert found.p_value(0) == 1
    assert found.p_value(1e9) == 1 / (len(scores) + 1)
    assert found.p_value(float(found.reference[-1])) >= 2 / (len(scores) + 1)


def test_a_site_with_enough_images_rests_on_its_own() -> None:
    own, other = np.linspace(1, 2, 19), np.linspace(50, 60, 40)
    found = limit([own, other], 0.05)
    assert (found.basis, found.images, found.rate) == ("site", 19, 0.05)
    assert 2 < found.threshold < 2 * STEP * (1 + 1e-6)


def test_a_site_with_too_few_rests_on_all_of_which_each_counts_in_units_of_its_site() -> None:
    own, other = np.linspace(1, 2, 18), np.linspace(10, 20, 18)
    found = limit([own, other], 0.05)
    assert (found.basis, found.images) == ("federation", 36)
    assert found.rate == pytest.approx(1 / 37)
    assert 2 < found.threshold < 2.3
    tenfold = limit([other, own], 0.05)
    assert tenfold.threshold == pytest.approx(10 * found.threshold, rel=0.02)
    assert tenfold.low == pytest.approx(10 * found.low, rel=0.02)


def test_the_mean_of_a_site_s_few_images_is_as_uncertain_as_so_few_make_it() -> None:
    found = limit([np.linspace(1, 2, 4), np.linspace(10, 20, 12), np.linspace(30, 50, 12)], 0.02)
    assert (found.basis, found.images) == ("federation", 28)
    assert found.scale_error == pytest.approx(found.reference.std() / 2)


def test_a_site_with_one_image_or_none_takes_those_of_all_as_they_are() -> None:
    for own in ([1.0], []):
        found = limit([own, np.linspace(10, 20, 40)], 0.05)
        assert (found.basis, found.images) == ("federation", 40 + len(own))
        assert found.threshold > 19


def test_a_site_that_is_not_known_takes_those_of_all() -> None:
    found = normals([[1, 2, 3]]).limit("unknown", 0.25)
    assert found is not None
    assert (found.basis, found.images, found.rate) == ("federation", 3, 0.25)


def test_alone_a_site_with_few_images_rests_on_them_and_says_what_they_can_guarantee() -> None:
    for sites in ([[1.0, 2, 3]], [[1.0, 2, 3], []]):
        found = limit(sites, 0.05)
        assert (found.basis, found.images, found.rate) == ("site", 3, 0.25)
        assert found.threshold > 3


def test_without_held_out_images_there_is_no_limit() -> None:
    for rate in (0.05, 1 - 1e-9):
        assert normals([]).limit("0", rate) is None
        assert normals([[], []]).limit("0", rate) is None


@pytest.mark.parametrize(("own", "images"), [([], 3), ([2.0], 1)])
def test_at_a_rate_near_1_nearly_all_of_what_there_is_counts(own: list[float], images: int) -> None:
    """1e-9 below 1 is within the rounding of a rate."""
    found = limit([own, [1.0, 3, 5]], 1 - 1e-9)
    assert (found.images, found.rate) == (images, images / (images + 1))


def test_one_image() -> None:
    found = limit([[2.0]], 0.05)
    assert (found.images, found.rate, found.basis) == (1, 0.5, "site")
    assert (found.p_value(1.9), found.p_value(2.1)) == (1, 0.5)
    assert found.normalised(2.1) > 0.5 > found.normalised(1.9)


@pytest.mark.parametrize("score", [0.0, 1e-6, 3.0, 1e6])
def test_all_images_alike(score: float) -> None:
    found = limit([[score] * 40], 0.05)
    assert found.p_value(score) == 1
    assert found.normalised(score) < 0.5
    assert found.p_value(max(1e-3, score * 1.01)) == 1 / 41
    assert found.normalised(max(1e-3, score * 1.01)) > 0.5


def test_defects_among_the_normal_images_hide_defects_and_raise_no_alarm() -> None:
    rng = np.random.default_rng(0)
    normal, defect = rng.normal(10, 1, 36), rng.normal(30, 1, 36)
    some = limit([np.append(normal, defect[:4])], 0.05)
    assert (defect >= some.threshold).mean() < 0.5
    every = limit([defect], 0.05)
    assert not (normal >= every.threshold).any()


def test_a_site_cannot_make_the_limit_of_others_infinite() -> None:
    found = limit([np.linspace(1, 2, 6), [0, 1e300]], 0.05)
    assert np.isfinite([found.threshold, found.full, found.p_value(1.5), found.normalised(1.5)]).all()


def draw(kind: str, rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Scores of normal images of a site: even, skewed, or with a heavy tail."""
    if kind == "even":
        return np.exp(rng.normal(0, 0.1, size))
    return np.exp(rng.normal(0, 0.5, size)) if kind == "skewed" else 10 + np.abs(rng.standard_t(3, size))


@pytest.mark.parametrize("kind", ["even", "skewed", "heavy tail"])
@pytest.mark.parametrize(("sites", "images"), [(1, 6), (1, 12), (1, 19), (1, 72), (6, 6), (6, 12), (2, 5), (3, 2)])
def test_normal_images_are_called_anomalous_at_the_rate_that_is_guaranteed(kind: str, sites: int, images: int) -> None:
    """Of sites that differ by a factor: at most the rate, and not far below it where a site has a few images."""
    rng = np.random.default_rng(images)
    rates = []
    for _ in range(600):
        factors = np.exp(rng.normal(0, 0.3, sites))
        found = limit([factor * draw(kind, rng, images) for factor in factors], 0.05)
        rates.append((factors[0] * draw(kind, rng, 100) >= found.threshold).mean())
    assert found.basis == ("site" if sites == 1 or images >= 19 else "federation")
    error = float(np.std(rates)) / len(rates) ** 0.5
    assert np.mean(rates) <= found.rate + 3 * error
    assert np.mean(rates) >= 0.6 * found.rate - 3 * error
