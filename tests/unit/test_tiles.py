"""Tiles: they cover the image, their seams do not show, and their number does not decide the memory needed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage import data
from torch import Tensor
from torch.nn import functional

from feddymem.backbone import FeatureExtractor, load_extractor
from feddymem.tiles import tile_starts, tiled

STEP, REDUCTION = 16, 8


@st.composite
def layouts(draw: st.DrawFn, most: int = 60) -> tuple[int, int, int, int]:
    """Size, tile, overlap and step in pixels, as `load_extractor` lets them through."""
    step = draw(st.sampled_from([8, 14, 16, 32]))
    tile = draw(st.integers(2, min(20, most)))
    size, overlap = draw(st.integers(tile, most)), draw(st.integers(0, tile - 1))
    return size * step, tile * step, overlap * step, step


def pointwise(images: Tensor) -> Tensor:
    """A network of which a patch sees its own pixels only."""
    means = functional.avg_pool2d(images, REDUCTION)
    return torch.cat([means, means.square(), means.sum(1, keepdim=True).sin()], 1)


class Constants:
    """A network that gives every tile another constant, whatever is on it."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.calls: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.calls.append(len(images))
        side = images.shape[-1] // REDUCTION
        return torch.rand(len(images), 1, 1, 1, generator=self.random).expand(-1, 1, side, side)


@given(layouts())
def test_tiles_reach_from_the_first_pixel_to_the_last_without_a_gap(layout: tuple[int, int, int, int]) -> None:
    size, tile, overlap, step = layout
    starts = tile_starts(size, tile, overlap, step)
    assert (starts[0], starts[-1]) == (0, size - tile)
    assert all(start % step == 0 for start in starts)
    assert all(first < second for first, second in pairwise(starts))
    assert all(first + tile - second >= overlap for first, second in pairwise(starts))
    assert {pixel for start in starts for pixel in range(start, start + tile)} == set(range(size))


@given(layouts())
def test_there_are_no_more_tiles_than_needed(layout: tuple[int, int, int, int]) -> None:
    size, tile, overlap, step = layout
    fewer = len(tile_starts(size, tile, overlap, step)) - 1
    assert fewer == 0 or fewer * tile - (fewer - 1) * overlap < size


@pytest.mark.parametrize("overlap", [0, 16, 208])
def test_an_image_of_the_size_of_a_tile_is_one_tile(overlap: int) -> None:
    assert tile_starts(224, 224, overlap, STEP) == [0]
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tiled(pointwise, images, 224, overlap, STEP, REDUCTION), pointwise(images))


@given(layouts(most=12), st.integers(0, 2**31))
def test_tiles_of_a_pointwise_network_give_the_map_of_the_whole_image(
    layout: tuple[int, int, int, int], seed: int
) -> None:
    size, tile, overlap = (side // layout[3] * STEP for side in layout[:3])
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    expected = pointwise(images)
    got = tiled(pointwise, images, tile, overlap, STEP, REDUCTION)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "tile", "overlap"), [(448, 224, 64), (448, 224, 96), (512, 224, 160), (512, 128, 32)])
def test_the_end_of_a_tile_leaves_no_step(size: int, tile: int, overlap: int) -> None:
    """Tiles differ by up to 1; over their overlap, one becomes the other in steps that are even where two meet."""
    for seed in range(5):
        stitched = tiled(Constants(seed), torch.zeros(1, 3, size, size), tile, overlap, STEP, REDUCTION)
        steps = torch.cat([stitched.diff(dim=2).flatten(), stitched.diff(dim=3).flatten()])
        assert float(stitched.max() - stitched.min()) > 0.5
        assert float(steps.abs().max()) <= 1.5 * REDUCTION / overlap


def test_a_patch_counts_most_in_the_tile_that_has_it_furthest_inside() -> None:
    """A plain mean of the tiles would be 7.5 in the middle of their overlap, and 6 where it begins."""

    def from_the_edge(images: Tensor) -> Tensor:
        place = torch.arange(images.shape[-1] // REDUCTION).float()
        return torch.minimum(place, place.flip(0)).expand(len(images), 1, len(place), -1)

    stitched = tiled(from_the_edge, torch.zeros(1, 3, 320, 320), 224, 128, STEP, REDUCTION)[0, 0]
    assert float(stitched[:, 12:28].min()) > 7.5
    assert float(stitched[:, [12, 27]].min()) > 11


@pytest.mark.parametrize(("size", "tiles"), [(224, 1), (448, 9), (1024, 36)])
def test_the_network_sees_at_most_8_tiles_at_a_time(size: int, tiles: int) -> None:
    network = Constants(0)
    tiled(network, torch.zeros(2, 3, size, size), 224, 64, STEP, REDUCTION)
    assert sum(network.calls) == 2 * tiles
    assert max(network.calls) <= 8


def test_an_image_is_the_same_alone_and_with_others() -> None:
    images = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    together = tiled(pointwise, images, 64, 32, STEP, REDUCTION)
    for image, expected in zip(images, together, strict=True):
        torch.testing.assert_close(tiled(pointwise, image[None], 64, 32, STEP, REDUCTION)[0], expected)


@pytest.fixture(scope="module")
def tile_by_tile() -> FeatureExtractor:
    return load_extractor(input_size=448, tile_size=224, tile_overlap=96, device="cpu")


@pytest.mark.parametrize("name", ["coffee", "chelsea"])
def test_features_of_tiles_are_close_to_those_of_the_whole_image(name: str, tile_by_tile: FeatureExtractor) -> None:
    """Measured on three photographs: a difference of 0.07 of a feature's length in the median, 0.18 at most."""
    whole = load_extractor(input_size=448, device="cpu")
    image = whole.prepare(getattr(data, name)())[None]
    expected, got = whole(image)[0], tile_by_tile(image)[0]
    assert got.shape == expected.shape == (56 * 56, 152)
    differences = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(differences.median()) < 0.1
    assert float(differences.max()) < 0.25


def test_tiles_make_another_feature_space(tile_by_tile: FeatureExtractor) -> None:
    space = tile_by_tile.feature_space
    assert (space.input_size, space.tile_size, space.tile_overlap, space.grid) == (448, 224, 96, 56)
    others = [load_extractor(input_size=448, tile_size=s, tile_overlap=96, device="cpu") for s in (None, 256)]
    assert len({space.fingerprint, *(other.feature_space.fingerprint for other in others)}) == 3


@pytest.mark.parametrize("tile_size", [64, 65, 224])
def test_tiles_at_least_as_large_as_the_image_are_the_whole_image(tile_size: int, small: FeatureExtractor) -> None:
    other = load_extractor(input_size=64, tile_size=tile_size, tile_overlap=5, device="cpu")
    assert other.feature_space.fingerprint == small.feature_space.fingerprint


@pytest.mark.parametrize("tile_size", [-32, 0, 16, 225])
def test_a_bad_tile_size_is_refused(tile_size: int) -> None:
    with pytest.raises(ValueError, match=f"tile_size is {tile_size}; it must be a multiple of 16, at least 32"):
        load_extractor(input_size=448, tile_size=tile_size, device="cpu")


@pytest.mark.parametrize("overlap", [-16, 224, 240])
def test_a_bad_overlap_of_tiles_is_refused(overlap: int) -> None:
    with pytest.raises(
        ValueError, match=f"tile_overlap is {overlap}; it must be at least 0 and less than tile_size, 224"
    ):
        load_extractor(input_size=448, tile_size=224, tile_overlap=overlap, device="cpu")


@pytest.mark.parametrize(("overlap", "used"), [(0, 0), (33, 48), (64, 64)])
def test_the_overlap_is_rounded_up_to_the_coarsest_patch(overlap: int, used: int) -> None:
    extractor = load_extractor(input_size=448, tile_size=224, tile_overlap=overlap, device="cpu")
    assert extractor.feature_space.tile_overlap == used
