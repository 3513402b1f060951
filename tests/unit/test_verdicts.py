"""Verdicts: by a release's calibration, or by somebody's own threshold."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import numpy as np
import pytest

from feddymem.calibration import Calibration, SiteCalibration, site_key
from feddymem.sketch import ScoreSketch
from feddymem.verdicts import ReleaseLimits, judge

RATE = 0.1


def site(*scores: float) -> SiteCalibration:
    return SiteCalibration(ScoreSketch.of(scores), ScoreSketch.of(2 * score for score in scores))


def limits(**sites: SiteCalibration) -> ReleaseLimits:
    keyed = {site_key("parts", name): each for name, each in sites.items()}
    return ReleaseLimits("parts", Calibration.of(keyed, RATE))


MANY = site(*np.linspace(10, 20, 60))


def test_an_image_is_anomalous_from_the_threshold_on_and_then_only_is_its_p_value_within_the_rate() -> None:
    found = limits(north=MANY).of("north")
    assert found is not None
    below = float(np.nextafter(np.float32(found.scores.threshold), np.float32(0)))
    for score, anomalous in ((found.scores.threshold, True), (below, False), (0.0, False), (1e9, True)):
        judgement = judge(score, found.scores)
        assert judgement is not None
        assert judgement.anomalous is anomalous
        assert judgement.p_value is not None
        assert (judgement.p_value <= RATE) == anomalous
        assert judgement.normalised is not None
        assert (judgement.normalised >= 0.5) == anomalous
        assert judgement.limit is found.scores
        assert judgement.threshold == found.scores.threshold


def test_a_threshold_of_ones_own_wins_and_guarantees_nothing() -> None:
    found = limits(north=MANY).of("north")
    assert found is not None
    judgement = judge(15.0, found.scores, threshold=15.0)
    assert judgement is not None
    assert (judgement.anomalous, judgement.threshold, judgement.limit) == (True, 15.0, None)
    assert judgement.normalised == 0.5
    assert judgement.p_value == found.scores.p_value(15.0)


@pytest.mark.parametrize("threshold", [0.0, float("inf")])
def test_a_threshold_at_the_end_of_the_numbers_has_a_scale_all_the_same(threshold: float) -> None:
    found = limits(north=MANY).of("north")
    assert found is not None
    judgement = judge(15.0, found.scores, threshold)
    assert judgement is not None
    assert judgement.normalised == (1.0 if threshold == 0 else 0.0)


def test_without_a_calibration_only_ones_own_threshold_gives_a_verdict() -> None:
    assert judge(15.0, None) is None
    judgement = judge(15.0, None, threshold=16.0)
    assert judgement is not None
    assert (judgement.anomalous, judgement.p_value, judgement.normalised, judgement.limit) == (False, None, None, None)


def test_nobody_who_held_images_out_gives_no_limits() -> None:
    assert limits().of("north") is None
    assert limits(north=SiteCalibration()).of("north") is None


def test_a_site_without_images_is_not_known_and_is_judged_by_all_sites() -> None:
    found = limits(north=MANY, south=SiteCalibration())
    assert found.knows("north")
    assert not found.knows("south")
    assert not found.knows("")
    of_south, of_nobody = found.of("south"), found.of("somebody")
    assert of_south is of_nobody
    assert of_south is not None
    assert (of_south.scores.basis, of_south.scores.images) == ("federation", 60)


def test_one_image_and_equal_images_have_a_threshold_above_them() -> None:
    for values in ([12.0], [12.0] * 30):
        found = limits(north=site(*values)).of("north")
        assert found is not None
        judgement = judge(12.0, found.scores)
        assert judgement is not None
        assert not judgement.anomalous
        assert judgement.p_value == 1.0
        assert found.scores.rate == pytest.approx(max(RATE, 1 / (len(values) + 1)), abs=0.04)
        above = judge(13.0, found.scores)
        assert above is not None
        assert above.anomalous
        scale = found.heat_scale
        assert 0 < scale.first < found.peaks.threshold < scale.last


def test_another_rate_has_another_threshold_and_the_limits_of_many_rates_take_little_room() -> None:
    found = limits(north=MANY)
    strict, lax = found.of("north", 0.02), found.of("north", 0.3)
    assert strict is not None
    assert lax is not None
    assert strict.scores.threshold > lax.scores.threshold
    assert found.of("north", RATE) is found.of("north")
    for number in range(1, 2_000):
        found.of("north", number / 2_000)
    assert found._find.cache_info().currsize <= 256


def test_sites_whose_images_stand_for_others_share_them() -> None:
    found = limits(north=site(10, 11, 12), south=site(*np.linspace(100, 120, 40)))
    north = found.of("north")
    assert north is not None
    assert north.scores.basis == "federation"
    assert 11.5 < north.scores.threshold < 20
    strict = found.of("north", 0.03)
    assert strict is not None
    assert strict.scores.reference is north.scores.reference


def test_limits_of_a_release_go_with_it_without_a_garbage_collection() -> None:
    gc.disable()
    try:
        found = limits(north=MANY)
        found.of("north")
        gone = weakref.ref(found)
        del found
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("rate", "images", "highest"), [(0.05, 1_000_000, 0.05), (0.05, 72, 0.151)])
def test_the_highest_rate_to_be_expected_has_room_for_few_images(rate: float, images: int, highest: float) -> None:
    found = limits(north=site(*np.linspace(10, 20, min(images, 999)))).of("north", rate)
    assert found is not None
    limit = dataclasses.replace(found.scores, rate=rate, images=images)
    assert limit.highest_rate(100 if images < 1_000 else 1_000_000) == pytest.approx(highest, abs=0.002)
