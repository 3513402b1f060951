"""Figures of detection quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage.measure import label as label_regions
from sklearn.metrics import f1_score, roc_auc_score

from feddymem.evaluation import LEVELS, Alarms, Detection, alarms, auroc, detect

LABELS = np.array([False, False, False, True, True])

Masks = list[NDArray[np.bool_]]
Maps = list[NDArray[np.float32]]
seeds = st.integers(0, 10_000)


def test_perfect_scores_give_one() -> None:
    assert auroc(LABELS, np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == 1


def test_scores_the_wrong_way_round_give_zero() -> None:
    assert auroc(LABELS, np.array([5.0, 4.0, 3.0, 2.0, 1.0])) == 0


def test_scores_that_say_nothing_give_a_half() -> None:
    assert auroc(LABELS, np.zeros(5)) == 0.5


def test_it_is_the_share_of_pairs_in_the_right_order_with_ties_counted_half() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.random(60) < 0.4, rng.integers(0, 12, 60).astype(np.float32)
    good, defect = scores[~labels][:, None], scores[labels][None]
    pairs = (defect > good).mean() + 0.5 * (defect == good).mean()
    assert auroc(labels, scores) == pytest.approx(pairs)


@pytest.mark.parametrize("label", [True, False])
def test_one_kind_of_image_alone_gives_nan(label: bool) -> None:
    assert math.isnan(auroc(np.full(4, label), np.arange(4.0)))


def drawn(seed: int, informative: float = 1.0, images: int = 6) -> tuple[Masks, Maps]:
    """Masks with a rectangle or two (none in every third), and noisy maps that are higher there; sizes differ."""
    rng = np.random.default_rng(seed)
    masks: Masks = []
    maps: Maps = []
    for number in range(images):
        height, width = rng.integers(12, 30, 2)
        mask = np.zeros((height, width), np.bool_)
        for _ in range(number % 3):
            row, column = rng.integers(0, height - 4), rng.integers(0, width - 4)
            mask[row : row + rng.integers(1, 5), column : column + rng.integers(1, 5)] = True
        masks.append(mask)
        maps.append((rng.normal(0, 1, mask.shape) + informative * mask).astype(np.float32))
    return masks, maps


def of_pixels(masks: Sequence[NDArray[np.bool_] | None], maps: Maps) -> Detection:
    labels = np.array([mask is None or bool(mask.any()) for mask in masks])
    return detect(labels, np.array([float(each.max()) for each in maps]), masks, maps)


def regions(masks: Masks, maps: Maps) -> Maps:
    """(pixels,) anomalies of each defect region."""
    found: Maps = []
    for mask, each in zip(masks, maps, strict=True):
        numbers = np.asarray(label_regions(mask, connectivity=2))
        found += [each[numbers == number] for number in range(1, numbers.max() + 1)]
    return found


def brute_aupro(masks: Masks, maps: Maps, limit: float = 0.3) -> float:
    """By its definition: one threshold after the other, one region after the other."""
    thresholds = np.unique(np.concatenate([each.ravel() for each in maps]))[::-1]
    normal = np.concatenate([each[~mask] for mask, each in zip(masks, maps, strict=True)])
    found = regions(masks, maps)
    x = np.array([0.0, *((normal >= threshold).mean() for threshold in thresholds)])
    y = np.array([0.0, *(np.mean([(region >= threshold).mean() for region in found]) for threshold in thresholds)])
    area = 0.0
    for left, right, low, high in zip(x[:-1], x[1:], y[:-1], y[1:], strict=True):
        if left < limit and right > left:
            end = min(right, limit)
            at_end = low + (high - low) * (end - left) / (right - left)
            area += (end - left) * (low + at_end) / 2
    return float(area / limit)


@given(seeds, st.sampled_from([0.0, 1.0, 3.0]), st.sampled_from([0, 1, 3]))
def test_pixel_figures_are_those_of_their_definitions(seed: int, informative: float, decimals: int) -> None:
    masks, maps = drawn(seed, informative)
    maps = [np.round(each, decimals) for each in maps]  # so that values are equal or farther apart than levels
    found = of_pixels(masks, maps)
    labels, values = (np.concatenate([each.ravel() for each in both]) for both in (masks, maps))
    assert found.pixel_auroc == pytest.approx(roc_auc_score(labels, values), abs=1e-9)
    assert found.aupro == pytest.approx(brute_aupro(masks, maps), abs=1e-9)


@given(seeds, st.sampled_from([0.0, 1.0, 3.0]))
def test_what_is_closer_than_a_level_moves_pixel_figures_by_its_share(seed: int, informative: float) -> None:
    masks, maps = drawn(seed, informative, images=3)
    maps[0][0, 0] = 3e3  # one pixel, far off, makes levels coarse for all others
    found = of_pixels(masks, maps)
    labels, values = (np.concatenate([each.ravel() for each in both]) for both in (masks, maps))
    normal, level = values[~labels], (values.max() - values.min()) / LEVELS

    def close(defect: NDArray[np.float32]) -> float:
        return float((np.abs(defect[:, None] - normal) <= level).mean())

    of_regions = float(np.mean([close(region) for region in regions(masks, maps)]))
    assert found.pixel_auroc == pytest.approx(roc_auc_score(labels, values), rel=0, abs=close(values[labels]) + 1e-9)
    assert found.aupro == pytest.approx(brute_aupro(masks, maps), rel=0, abs=of_regions / 0.3 + 1e-9)


@given(seeds, st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_scale_and_offset_do_not_matter(seed: int, scale: float, offset: float) -> None:
    masks, maps = drawn(seed)
    maps = [np.round(each, 2) for each in maps]
    changed = [(each * scale + offset * scale).astype(np.float32) for each in maps]
    assert astuple(of_pixels(masks, changed)) == pytest.approx(astuple(of_pixels(masks, maps)), abs=1e-4)


@given(seeds)
def test_a_perfect_map_gives_one(seed: int) -> None:
    masks, _ = drawn(seed)
    assert of_pixels(masks, [mask.astype(np.float32) for mask in masks]) == Detection(1, 1, 1, 1, 1)


def test_a_random_map_gives_a_half() -> None:
    masks, maps = drawn(0, informative=0, images=600)
    found = of_pixels(masks, maps)
    assert found.pixel_auroc == pytest.approx(0.5, abs=0.02)
    assert found.aupro == pytest.approx(0.15, abs=0.02)


def test_a_constant_map_says_nothing() -> None:
    masks, maps = drawn(0)
    found = of_pixels(masks, [np.full_like(each, 7) for each in maps])
    assert (found.image_auroc, found.pixel_auroc) == (0.5, 0.5)
    assert found.aupro == pytest.approx(0.15)


def test_small_regions_count_as_much_as_large_ones() -> None:
    mask = np.zeros((20, 20), np.bool_)
    mask[0, 0] = mask[1, 1] = True  # one region: they touch at a corner
    mask[5:15, 5:15] = True
    found = of_pixels([mask], [(mask & (np.indices(mask.shape).sum(0) < 5)).astype(np.float32)])
    # The small region is found at no false positive; the large one rises with all the rest.
    assert found.aupro == pytest.approx(0.5 + 0.5 * 0.15)


def test_what_is_found_at_the_limit_comes_too_late() -> None:
    anomalies = np.array([[10, 9, 8, 7.5, 7, 6, 5, 4, 3, 2, 1]], np.float32)
    assert of_pixels([anomalies == 7.5], [anomalies]).aupro == 0


def test_a_defect_without_mask_says_nothing_about_pixels() -> None:
    masks, maps = drawn(1)
    noise = np.full((9, 9), 99, np.float32)
    with_it, without = of_pixels([*masks, None], [*maps, noise]), of_pixels(masks, maps)
    assert (with_it.pixel_auroc, with_it.aupro) == (without.pixel_auroc, without.aupro)


def test_a_good_image_needs_no_mask() -> None:
    masks, maps = drawn(2)
    labels, scores = np.array([bool(mask.any()) for mask in masks]), np.arange(float(len(masks)))
    left_out = [mask if mask.any() else None for mask in masks]
    assert detect(labels, scores, left_out, maps) == detect(labels, scores, masks, maps)


@given(seeds)
def test_image_figures_are_those_of_their_definitions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, scores = np.array([True, False, *(rng.random(18) < 0.5)]), rng.integers(0, 9, 20).astype(np.float64)
    found = detect(labels, scores, [None] * 20, [np.zeros((2, 2), np.float32)] * 20)
    assert found.image_auroc == pytest.approx(roc_auc_score(labels, scores))
    assert found.image_f1_max == pytest.approx(max(f1_score(labels, scores >= score) for score in scores))
    steps = [(labels & (scores >= score)).sum() / (scores >= score).sum() for score in scores[labels]]
    assert found.image_ap == pytest.approx(np.mean(steps))


def test_what_cannot_be_said_is_nan() -> None:
    empty, flat = np.zeros((3, 3), np.bool_), np.zeros((3, 3), np.float32)
    two = np.array([0.0, 1.0])
    only_good = detect(np.array([False, False]), two, [empty, empty], [flat, flat])
    assert all(math.isnan(value) for value in astuple(only_good))
    no_masks = detect(np.array([False, True]), two, [None, None], [flat, flat])
    assert (no_masks.image_auroc, math.isnan(no_masks.pixel_auroc), math.isnan(no_masks.aupro)) == (1, True, True)
    no_normal_pixel = detect(np.array([True, True]), two, [~empty, ~empty], [flat, flat])
    assert all(math.isnan(value) for value in astuple(no_normal_pixel))
    no_image = detect(np.zeros(0, np.bool_), np.zeros(0), [], [])
    assert all(math.isnan(value) for value in astuple(no_image))


def test_what_does_not_fit_together_is_refused() -> None:
    flat, mask = np.zeros((3, 3), np.float32), np.zeros((3, 3), np.bool_)
    with pytest.raises(ValueError, match=r"1 labels, 2 scores, 1 masks and 1 maps; each image has one"):
        detect(np.array([True]), np.zeros(2), [mask], [flat])
    with pytest.raises(ValueError, match=r"mask of \(3, 3\) pixels for a map of \(3, 4\)"):
        detect(np.array([True]), np.zeros(1), [mask], [np.zeros((3, 4), np.float32)])
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"map of \(3, 3\) pixels has NaN or infinite values"):
            detect(np.array([True]), np.zeros(1), [mask], [np.full((3, 3), value, np.float32)])


def test_false_alarms_are_of_good_images_and_detections_of_defects() -> None:
    labels = np.array([False, False, False, False, True, True])
    assert alarms(labels, np.array([True, False, False, False, True, False])) == Alarms(0.25, 0.5)


def test_without_good_or_defect_images_their_rate_is_not_known() -> None:
    called = np.array([True, False])
    good, defect = (alarms(np.array([label] * 2), called) for label in (False, True))
    assert (good.false_alarm_rate, defect.detection_rate) == (0.5, 0.5)
    assert math.isnan(good.detection_rate)
    assert math.isnan(defect.false_alarm_rate)
