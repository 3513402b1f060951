"""Scoring: distances to a crafted memory, smooth anomaly maps, and heatmaps on a scale of their own."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from feddymem.backbone import FeatureExtractor
from feddymem.generator import MemoryGenerator
from feddymem.images import Pixels, decode
from feddymem.maps import HeatScale, Region, anomaly_map, heatmap_png, regions
from feddymem.memory import MemoryBank
from feddymem.scoring import Scorer, of_one_origin
from feddymem.search import screen_by_torch
from tests.feature_spaces import SPACE

GRID, CHANNELS = 4, 2
GRIDS = hnp.arrays(np.float32, (6, 6), elements=st.floats(0, 10, width=16))


def first_colours(pixels: torch.Tensor) -> torch.Tensor:
    """Features that are the first two colours."""
    return functional.avg_pool2d(pixels[:, :CHANNELS], 8).flatten(2).transpose(1, 2)


def small_extractor() -> FeatureExtractor:
    space = dataclasses.replace(
        SPACE, reductions=(8,), layers=(2,), pooling=1, context_weight=0.0, border_weight=1.0, channels=CHANNELS
    )
    return FeatureExtractor(space, first_colours, screen_by_torch, torch.device("cpu"))


def heatmap(pixels: NDArray[np.float32], typical_distance: float) -> Pixels:
    return decode(heatmap_png(pixels, HeatScale.of_memory(typical_distance)))


def memory(*items: tuple[float, ...], spread: float = 0.5) -> MemoryBank:
    ones = np.ones(len(items), np.float32)
    return MemoryBank(items=np.array(items, np.float32), weights=ones[:, None], spreads=spread * ones)


def scorer(*items: tuple[float, ...], generator: MemoryGenerator | None = None) -> Scorer:
    return Scorer(small_extractor(), memory(*items), generator)


def test_a_patch_scores_its_distance_to_the_nearest_item() -> None:
    features = torch.zeros(1, GRID * GRID, CHANNELS)
    features[0, 6] = torch.tensor([3.0, 4.0])
    features[0, 15] = torch.tensor([9.0, 0.0])
    (inspection,) = scorer((0, 0), (10, 0)).inspect_features(features)
    expected = np.zeros((GRID, GRID), np.float32)
    expected[1, 2], expected[3, 3] = 5, 1
    np.testing.assert_allclose(inspection.distances, expected, atol=1e-6)
    assert inspection.distances.dtype == np.float32


def test_the_score_is_the_mean_of_the_five_largest_distances() -> None:
    features = torch.zeros(1, GRID * GRID, CHANNELS)
    features[0, [1, 4, 7, 9, 12, 14], 0] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    (inspection,) = scorer((0, 0)).inspect_features(features)
    assert inspection.score == pytest.approx(4)


def test_what_the_memory_holds_scores_zero() -> None:
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(8, 1)[None]
    (inspection,) = scorer((1, 2), (3, 4)).inspect_features(features)
    assert inspection.score == 0


def test_images_score_the_same_alone_and_in_a_batch() -> None:
    features = torch.randn(5, GRID * GRID, CHANNELS, generator=torch.Generator().manual_seed(0))
    chosen = scorer((0, 0), (1, 1))
    together = chosen.inspect_features(features)
    for index, inspection in enumerate(together):
        (alone,) = chosen.inspect_features(features[index : index + 1])
        assert alone.score == pytest.approx(inspection.score, rel=1e-5)
        np.testing.assert_allclose(alone.distances, inspection.distances, rtol=1e-5, atol=1e-6)


def of_two_sites(*items: tuple[float, ...], sites: list[list[int]]) -> Scorer:
    """A scorer of items that each come from the sites (0, 1 or both) named."""
    weights = np.array([[site in mine for site in (0, 1)] for mine in sites], np.float32)
    bank = MemoryBank(np.array(items, np.float32), weights, np.zeros(len(items), np.float32))
    return Scorer(small_extractor(), bank, None)


def test_an_item_of_a_site_that_is_nothing_like_the_image_does_not_hide_a_defect() -> None:
    """The image is of the first site; its last patch looks like a part that only the second site has."""
    features = torch.zeros(1, GRID * GRID, CHANNELS)
    features[0, 15] = torch.tensor([30.0, 0.0])
    items = ((0, 0), (30, 0), (20, 20))
    (apart,) = of_two_sites(*items, sites=[[0], [1], [1]]).inspect_features(features)
    (alike,) = of_two_sites(*items, sites=[[0, 1], [1], [1]]).inspect_features(features)
    assert apart.distances[3, 3] == pytest.approx(30)
    assert alike.distances[3, 3] == pytest.approx(0, abs=1e-3)


def test_an_image_may_be_explained_by_several_sites_that_are_alike() -> None:
    """Each site has seen a part of what the image shows, one of them more than the other."""
    features = torch.zeros(1, GRID * GRID, CHANNELS)
    features[0, :12, 0], features[0, 12:, 1] = 10, 10
    (inspection,) = of_two_sites((10, 0), (0, 10), sites=[[0], [1]]).inspect_features(features)
    np.testing.assert_allclose(inspection.distances, 0, atol=1e-2)


def test_origins_without_items_do_not_matter() -> None:
    features = torch.randn(3, GRID * GRID, CHANNELS, generator=torch.Generator().manual_seed(0))
    plain = scorer((0, 0), (1, 1)).inspect_features(features)
    placed = Scorer(small_extractor(), memory((0, 0), (1, 1)).placed(1, 3), None).inspect_features(features)
    assert [inspection.score for inspection in placed] == [inspection.score for inspection in plain]


SQUARED = hnp.arrays(np.float32, (3, 2, 10), elements=st.floats(0, 100, width=16))


@given(SQUARED)
def test_the_distances_are_those_of_the_equation(squared: NDArray[np.float32]) -> None:
    """As docs/method.md has it, in plain numpy; 3 of 10 patches are the largest 30 %."""

    def evidence(values: NDArray[np.float64]) -> float:
        return float(np.sort(values)[-3:].mean())

    for image, got in enumerate(of_one_origin(torch.from_numpy(squared)).numpy()):
        values = squared[:, image].astype(np.float64)
        each, together = [evidence(origin) for origin in values], evidence(values.min(0))
        prices = [8 * max(0, mine - min(each) - 1.5 * (min(each) - together)) for mine in each]
        np.testing.assert_allclose(got, (values + np.array(prices)[:, None]).min(0), rtol=1e-4, atol=1e-3)


@given(SQUARED)
def test_a_price_is_paid_only_for_origins_that_explain_the_image_worse(squared: NDArray[np.float32]) -> None:
    """Never nearer than the nearest item of all, never farther than the nearest of the best origin."""
    values = torch.from_numpy(squared)
    got = of_one_origin(values)
    best = values.topk(3, dim=2).values.mean(2).argmin(0)
    assert (got >= values.amin(0)).all()
    for image, origin in enumerate(best.tolist()):
        assert (got[image] <= values[origin, image] + 1e-4).all()


@given(SQUARED)
def test_the_order_of_origins_does_not_matter(squared: NDArray[np.float32]) -> None:
    values = torch.from_numpy(squared)
    torch.testing.assert_close(of_one_origin(values.flip(0)), of_one_origin(values))


@given(SQUARED)
def test_images_have_origins_of_their_own(squared: NDArray[np.float32]) -> None:
    values = torch.from_numpy(squared)
    alone = torch.cat([of_one_origin(values[:, image : image + 1]) for image in range(values.shape[1])])
    torch.testing.assert_close(of_one_origin(values), alone)


@given(hnp.arrays(np.float32, (1, 2, 10), elements=st.floats(0, 100, width=16)))
def test_one_origin_costs_nothing(squared: NDArray[np.float32]) -> None:
    torch.testing.assert_close(of_one_origin(torch.from_numpy(squared)), torch.from_numpy(squared[0]), rtol=0, atol=0)


def test_images_are_scored_by_their_features() -> None:
    images = torch.zeros(2, 3, 8 * GRID, 8 * GRID)
    images[1, 0, :8, 24:] = 7
    good, defect = scorer((0, 0)).inspect(images)
    assert good.score == 0
    assert np.argwhere(defect.distances > 0).tolist() == [[0, 3]]
    assert defect.distances[0, 3] == pytest.approx(7)
    assert defect.score == pytest.approx(7 / 5)


def test_features_pass_through_the_sites_generator() -> None:
    generator = MemoryGenerator(CHANNELS, GRID).requires_grad_(False)
    generator.outer.bias.copy_(torch.tensor([3.0, 4.0]))
    (inspection,) = scorer((0, 0), generator=generator).inspect_features(torch.zeros(1, GRID * GRID, CHANNELS))
    np.testing.assert_allclose(inspection.distances, 5, rtol=1e-6)


def test_an_untrained_generator_changes_nothing() -> None:
    features = torch.randn(2, GRID * GRID, CHANNELS, generator=torch.Generator().manual_seed(0))
    without = scorer((0, 0)).inspect_features(features)
    with_one = scorer((0, 0), generator=MemoryGenerator(CHANNELS, GRID)).inspect_features(features)
    assert [inspection.score for inspection in without] == [inspection.score for inspection in with_one]


def test_a_memory_of_other_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="items have 3 channels, the feature space has 2"):
        scorer((0, 0, 0))


def test_the_scorer_knows_the_typical_distance_of_its_memory() -> None:
    assert scorer((0, 0), (1, 1)).typical_distance == pytest.approx(0.5)


@pytest.mark.parametrize("size", [(6, 6), (48, 48), (50, 37), (224, 300), (3, 3), (1, 1)])
def test_an_anomaly_map_has_the_size_wanted(size: tuple[int, int]) -> None:
    pixels = anomaly_map(np.random.default_rng(0).random((6, 6), np.float32), size)
    assert pixels.shape == size
    assert pixels.dtype == np.float32


@pytest.mark.parametrize("grid", [1, 2, 28])
def test_an_even_grid_gives_an_even_map_up_to_the_border(grid: int) -> None:
    pixels = anomaly_map(np.full((grid, grid), 3.5, np.float32), (8 * grid, 8 * grid + 5))
    np.testing.assert_allclose(pixels, 3.5, rtol=1e-6)


@given(GRIDS, st.integers(0, 5), st.integers(0, 5), st.floats(0, 5))
def test_a_larger_distance_never_lowers_the_map(
    distances: NDArray[np.float32], row: int, column: int, more: float
) -> None:
    larger = distances.copy()
    larger[row, column] += more
    assert (anomaly_map(larger, (48, 48)) >= anomaly_map(distances, (48, 48)) - 1e-5).all()


@given(GRIDS)
def test_a_map_stays_between_the_least_and_the_largest_distance(distances: NDArray[np.float32]) -> None:
    pixels = anomaly_map(distances, (48, 48))
    assert pixels.min() >= distances.min() - 1e-4
    assert pixels.max() <= distances.max() + 1e-4


@given(GRIDS)
def test_a_map_has_no_seams_between_patches(distances: NDArray[np.float32]) -> None:
    """From pixel to pixel it changes by no more than its share of the step between two patches."""
    pixels = anomaly_map(distances, (48, 48))
    for axis in (0, 1):
        steepest = np.abs(np.diff(distances, axis=axis)).max()
        assert np.abs(np.diff(pixels, axis=axis)).max() <= steepest / 8 + 1e-4


def test_a_map_peaks_where_the_distance_does() -> None:
    distances = np.zeros((6, 6), np.float32)
    distances[1, 4] = 5
    row, column = divmod(int(anomaly_map(distances, (48, 60)).argmax()), 60)
    assert (row // 8, column // 10) == (1, 4)


def test_a_map_leaves_the_distances_as_they_are() -> None:
    distances = np.random.default_rng(0).random((6, 6), np.float32)
    before = distances.copy()
    anomaly_map(distances, (48, 48))
    np.testing.assert_array_equal(distances, before)


def test_a_heatmap_is_not_stretched_to_the_image() -> None:
    """A normal image stays cold, and a defect elsewhere does not change the colour of a pixel."""
    calm = np.array([[0.1, 0.5, 1.0]], np.float32)
    with_defect = np.array([[0.1, 0.5, 1.0, 40.0]], np.float32)
    np.testing.assert_array_equal(heatmap(calm, 1.0), heatmap(with_defect, 1.0)[:, :3])
    assert not np.array_equal(heatmap(calm, 1.0), heatmap(2 * calm, 1.0))


def test_a_heatmap_is_in_units_of_the_typical_distance() -> None:
    pixels = np.linspace(0, 6, 50, dtype=np.float32)[None]
    np.testing.assert_array_equal(heatmap(pixels, 1.0), heatmap(8 * pixels, 8.0))


def test_a_heatmap_ends_at_its_full_scale() -> None:
    colours = heatmap(np.array([[-1, 0, 3.9, 4, 1000]], np.float32), 1.0)[0]
    assert colours[0].tolist() == colours[1].tolist()
    assert colours[3].tolist() == colours[4].tolist()
    assert colours[2].tolist() != colours[3].tolist()


def test_a_heatmap_is_red_where_it_is_hot_and_blue_where_it_is_cold() -> None:
    cold, hot = heatmap(np.array([[0.5, 3.6]], np.float32), 1.0)[0].astype(int)
    assert cold[2] > cold[0] + 50
    assert hot[0] > hot[2] + 50


def test_a_heatmap_has_the_size_of_the_map() -> None:
    colours = heatmap(np.zeros((5, 9), np.float32), 1.0)
    assert colours.shape == (5, 9, 3)
    assert colours.dtype == np.uint8


@pytest.mark.parametrize("value", [0.0, 1e-3, 1.0, 1e4])
def test_a_memory_without_spread_gives_a_heatmap_too(value: float) -> None:
    """As without memory-reduce: its items are patches, whose distance to themselves is zero."""
    assert heatmap(np.full((3, 3), value, np.float32), 0.0).shape == (3, 3, 3)


def pixel_map(*rows: str) -> NDArray[np.float32]:
    """A map of digits; a dot is 0."""
    return np.array([[float(value.replace(".", "0")) for value in row] for row in rows], np.float32)


def test_regions_are_boxes_with_the_largest_peak_first() -> None:
    pixels = pixel_map(
        "33......",
        "3....5..",
        "....55..",
        "........",
        "9.....34",
    )
    assert regions(pixels, 3, (5, 8)) == (
        Region(top=4, left=0, height=1, width=1, area=1, peak=9),
        Region(top=1, left=4, height=2, width=2, area=3, peak=5),
        Region(top=4, left=6, height=1, width=2, area=2, peak=4),
        Region(top=0, left=0, height=2, width=2, area=3, peak=3),
    )


def test_a_region_reaches_the_threshold_and_does_not_have_to_pass_it() -> None:
    assert regions(pixel_map("234"), 3, (1, 3)) == (Region(top=0, left=1, height=1, width=2, area=2, peak=4),)


def test_pixels_that_touch_at_their_corners_are_one_region() -> None:
    pixels = pixel_map("5...", ".6..", "...7", "....")
    assert regions(pixels, 5, (4, 4)) == (
        Region(top=2, left=3, height=1, width=1, area=1, peak=7),
        Region(top=0, left=0, height=2, width=2, area=2, peak=6),
    )


def test_the_peak_is_the_regions_own_and_not_that_of_its_box() -> None:
    pixels = pixel_map("55555", "5...5", "5.9.5", "5...5", "55555")
    assert regions(pixels, 5, (5, 5)) == (
        Region(top=2, left=2, height=1, width=1, area=1, peak=9),
        Region(top=0, left=0, height=5, width=5, area=16, peak=5),
    )


def test_a_normal_map_has_no_regions() -> None:
    assert regions(np.full((8, 8), 2.9, np.float32), 3, (80, 80)) == ()


def test_regions_are_in_pixels_of_the_image() -> None:
    pixels = np.zeros((4, 4), np.float32)
    pixels[1:3, 2] = 5
    assert regions(pixels, 5, (40, 20)) == (Region(top=10, left=10, height=20, width=5, area=100, peak=5),)
    assert regions(pixels, 5, (2, 2)) == (Region(top=0, left=1, height=2, width=1, area=0, peak=5),)
    # Where pixels of the map end within one of the image, all of that is in the box.
    assert regions(pixels, 5, (10, 6)) == (Region(top=2, left=3, height=6, width=2, area=8, peak=5),)


@given(st.sampled_from([1, 28, 56, 224]), st.integers(1, 9000), st.integers(1, 9000))
def test_a_region_of_the_whole_map_is_the_whole_image(side: int, height: int, width: int) -> None:
    assert regions(np.ones((side, side), np.float32), 0.5, (height, width)) == (
        Region(top=0, left=0, height=height, width=width, area=height * width, peak=1),
    )


@pytest.mark.parametrize(("height", "width"), [(29, 123), (58, 450)])
def test_a_region_does_not_reach_out_of_the_image(height: int, width: int) -> None:
    """Sizes at which (size / 28) * 28 is more than the size."""
    (region,) = regions(np.ones((28, 28), np.float32), 1, (height, width))
    assert (region.height, region.width) == (height, width)


@given(hnp.arrays(np.float32, (7, 5), elements=st.sampled_from([0, 1, 2])), st.integers(1, 90), st.integers(1, 90))
def test_regions_lie_in_the_image_and_cover_what_is_anomalous(
    pixels: NDArray[np.float32], height: int, width: int
) -> None:
    found = regions(pixels, 1, (height, width))
    covered = np.zeros((height, width), np.bool_)
    for region in found:
        assert 0 <= region.top < region.top + region.height <= height
        assert 0 <= region.left < region.left + region.width <= width
        covered[region.top : region.top + region.height, region.left : region.left + region.width] = True
    for row, column in np.argwhere(pixels >= 1):
        assert covered[int((row + 0.5) * height / 7), int((column + 0.5) * width / 5)]
    assert [region.peak for region in found] == sorted((region.peak for region in found), reverse=True)


def test_a_heatmap_is_a_png_of_256_colours() -> None:
    with Image.open(io.BytesIO(heatmap_png(np.zeros((5, 9), np.float32), HeatScale(0, 1)))) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "P", (9, 5))
        palette = image.getpalette()
    assert palette is not None
    assert len({tuple(palette[at : at + 3]) for at in range(0, len(palette), 3)}) > 200
