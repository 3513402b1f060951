"""Which images a site holds out, and how they are scored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feddymem.backbone import FeatureExtractor
from feddymem.calibration import SiteCalibration
from feddymem.feature_cache import CachedPatches, FeatureCache
from feddymem.federation import federate
from feddymem.hold_out import LEAST, MOST, RUN, calibrate, held_out
from feddymem.images import decode_file
from feddymem.maps import anomaly_map
from feddymem.method import Method
from feddymem.scoring import Scorer
from feddymem.sketch import ScoreSketch


def images(count: int) -> dict[str, int]:
    """Numbers of images that came one after another."""
    return {hashlib.sha256(str(number).encode()).hexdigest(): number for number in range(count)}


def runs(numbers: Iterable[int]) -> int:
    """How many of the numbers follow on none of them."""
    present = set(numbers)
    return sum(number - 1 not in present for number in present)


SHARE = st.floats(0.01, 0.5)
COUNT = st.integers(0, 300)


@given(COUNT, SHARE, st.integers(0, 3))
def test_a_share_is_held_out_and_the_bank_keeps_half_at_least(count: int, share: float, seed: int) -> None:
    chosen = held_out(images(count), share, seed)
    assert chosen <= images(count).keys()
    assert len(chosen) <= count / 2
    assert len(chosen) == count // 2 or len(chosen) >= LEAST
    assert len(chosen) in {count // 2, LEAST} or -1e-6 <= len(chosen) - share * count < 1


@pytest.mark.parametrize(
    ("count", "want"), [(0, 0), (1, 0), (2, 1), (8, 4), (10, 5), (32, 7), (60, 12), (107, 22), (6_000, MOST)]
)
def test_a_fifth_is_held_out(count: int, want: int) -> None:
    assert len(held_out(images(count), 0.2, 0)) == want


@given(COUNT)
def test_without_a_share_none_is_held_out(count: int) -> None:
    assert held_out(images(count), 0, 0) == frozenset()


@given(COUNT, SHARE, st.integers(0, 3))
def test_what_came_one_after_another_is_on_one_side(count: int, share: float, seed: int) -> None:
    arrivals = images(count)
    chosen = held_out(arrivals, share, seed)
    assert (
        runs(arrivals[image] for image in chosen) <= len(chosen) // RUN + 3
    )  # the first and the last run, and the last one chosen, may be cut


@given(st.integers(90, 300), st.integers(0, 3))
def test_runs_are_spread_evenly(count: int, seed: int) -> None:
    arrivals = images(count)
    numbers = {arrivals[image] for image in held_out(arrivals, 0.2, seed)}
    for start in range(count - 14 * RUN):
        assert RUN < len(numbers & set(range(start, start + 14 * RUN))) < 5 * RUN


@given(st.permutations(sorted(images(40).items())), st.integers(0, 3))
def test_sites_with_the_same_numbers_hold_the_same_ones_out(order: list[tuple[str, int]], seed: int) -> None:
    mine, theirs = images(40), {f"theirs {number}": number for _, number in order}
    held = {theirs[image] for image in held_out(theirs, 0.2, seed)}
    assert {mine[image] for image in held_out(mine, 0.2, seed)} == held


def test_the_seed_varies_the_choice() -> None:
    assert len({held_out(images(60), 0.2, seed) for seed in range(20)}) > 10


@pytest.mark.parametrize(("count", "more"), [(60, 90), (60, 61), (12, 42)])
def test_most_images_stay_on_their_side_when_others_come(count: int, more: int) -> None:
    switched = [
        len((held_out(images(more), 0.2, seed) - held_out(images(count), 0.2, seed)) & images(count).keys())
        for seed in range(50)
    ]
    assert np.mean(switched) <= 1.2
    assert max(switched) <= RUN


def test_most_images_stay_on_their_side_when_old_ones_go() -> None:
    arrivals = images(90)
    left = {image: number for image, number in arrivals.items() if number >= 30}
    switched = [len(held_out(left, 0.2, seed) - held_out(arrivals, 0.2, seed)) for seed in range(50)]
    assert np.mean(switched) <= 1.2


@pytest.fixture
def cache(tmp_path: Path, small: FeatureExtractor) -> FeatureCache:
    return FeatureCache(tmp_path / "cache", small)


def write(folder: Path, count: int, alike: bool = False) -> list[Path]:
    found = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(found):
        pixels = np.random.default_rng(0 if alike else number).integers(60, 140, (64, 64)).astype(np.uint8)
        assert cv2.imwrite(str(path), cv2.GaussianBlur(pixels, (0, 0), 2))
    return found


def test_patches_are_split_in_the_order_of_their_files(tmp_path: Path, cache: FeatureCache) -> None:
    paths = write(tmp_path, 12)
    bank, held = CachedPatches(cache, paths).split(0.25, 3)
    assert held is not None
    numbers = {hashlib.sha256(path.read_bytes()).hexdigest(): number for number, path in enumerate(paths)}
    assert {hashlib.sha256(path.read_bytes()).hexdigest() for path in held.paths} == held_out(numbers, 0.25, 3)
    assert sorted((*bank.paths, *held.paths)) == sorted(paths)
    assert (bank.images, held.images) == (7, 5)
    assert sum(len(block) for block in held.blocks()) == 5


def test_all_images_are_of_the_bank_where_none_is_held_out(tmp_path: Path, cache: FeatureCache) -> None:
    paths = write(tmp_path, 3)
    for share, these in ((0.0, paths), (0.2, paths[:1])):
        bank, held = CachedPatches(cache, these).split(share, 0)
        assert (bank.paths, held) == (tuple(these), None)


def test_equal_images_are_on_one_side(tmp_path: Path, cache: FeatureCache) -> None:
    bank, held = CachedPatches(cache, write(tmp_path, 6, alike=True)).split(0.2, 0)
    assert (bank.images, held) == (6, None)


def test_held_out_images_are_scored_as_the_inference_service_does(
    tmp_path: Path, cache: FeatureCache, small: FeatureExtractor
) -> None:
    bank, held = CachedPatches(cache, write(tmp_path, 12)).split(0.4, 0)
    assert held is not None
    method = Method(bank_items=64, memory_items=128)
    scorer = Scorer(small, federate({"north": bank}, method).memory, None)
    seen: list[tuple[str, int, int]] = []
    got = calibrate(scorer, held, lambda *step: seen.append(step))
    assert seen[-1] == ("calibration", 5, 5)
    for sketch, want in zip(
        (got.scores, got.peaks), zip(*(one(scorer, path) for path in held.paths), strict=True), strict=True
    ):
        assert len(sketch) == 5
        np.testing.assert_allclose(sketch.scores, ScoreSketch.of(want).scores, rtol=0.006)  # a level at most
    learned = calibrate(scorer, bank)
    assert learned.scores.scores.max() < got.scores.scores.min()  # which is why images are held out


def one(scorer: Scorer, path: Path) -> tuple[float, float]:
    """An image's score and the peak of its map, by itself."""
    inspection = scorer.inspect(scorer.extractor.prepare(decode_file(path))[None])[0]
    return inspection.score, float(anomaly_map(inspection.distances, (64, 64)).max())


def test_nothing_held_out_is_no_calibration(small: FeatureExtractor, tmp_path: Path, cache: FeatureCache) -> None:
    memory = federate({"north": CachedPatches(cache, write(tmp_path, 3))}, Method(bank_items=8, memory_items=8)).memory
    assert calibrate(Scorer(small, memory, None), None) == SiteCalibration()
