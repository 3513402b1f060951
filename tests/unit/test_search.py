"""The search finds the nearest item of every origin, as a comparison with all items in float64 does."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from feddymem import search
from feddymem.openvino_runtime import OpenVINOScreen, openvino
from feddymem.search import BLOCK, NearestItems, Screen, screen_by_torch

Points = NDArray[np.float32]
Origins = NDArray[np.bool_]
Squared = NDArray[np.float64]

SCREENS: dict[str, Screen] = {}
CHOSEN_TYPE = search.screen_dtype


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str, autouse=True)
def screen_type(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """What the first look is computed in, whatever this machine would choose."""
    with mock.patch.object(search, "screen_dtype", return_value=request.param):
        yield request.param


@pytest.fixture(params=["torch", "openvino"], autouse=True)
def screen(request: pytest.FixtureRequest, screen_type: torch.dtype) -> Iterator[Screen]:
    """What computes the first look."""
    if (request.param, screen_type) == ("openvino", torch.bfloat16):
        capabilities = openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in capabilities:
            pytest.skip("this processor does not compute in bfloat16")
    computed = screen_by_torch if request.param == "torch" else OpenVINOScreen(screen_type)
    with mock.patch.dict(SCREENS, {"": computed}):
        yield computed


def by_comparison(patches: Points, items: Points, origins: Origins) -> Squared:
    """(origins that have items, n): squared distances to the nearest, in float64."""
    nearest = []
    for mine in origins.T[origins.any(0)]:
        own = items[mine].astype(np.float64)
        nearest.append([((own - patch) ** 2).sum(1).min() for patch in patches.astype(np.float64)])
    return np.array(nearest).reshape(-1, len(patches))


def by_search(patches: Points, items: Points, origins: Origins) -> NDArray[np.float32]:
    found = NearestItems(torch.from_numpy(items), torch.from_numpy(origins), SCREENS[""])(torch.from_numpy(patches))
    return np.asarray(found.numpy())


def assert_nearest(patches: Points, items: Points, origins: Origins) -> None:
    """Up to what float32 rounds in the sum of the squared differences."""
    np.testing.assert_allclose(
        by_search(patches, items, origins), by_comparison(patches, items, origins), rtol=1e-5, atol=1e-36
    )


def of_all(items: Points) -> Origins:
    return np.ones((len(items), 1), np.bool_)


def some_origins(rng: np.random.Generator, items: int, count: int) -> Origins:
    """Each item has one origin at least, and some have many."""
    origins = rng.random((items, count)) < rng.choice([0.0, 0.1, 0.6])
    origins[np.arange(items), rng.integers(0, count, items)] = True
    return np.asarray(origins)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Points, Points, Origins]:
    """Patches, items and origins of all scales: spread out, far from zero, close together, the same, zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    channels, items, count = draw(st.integers(1, 200)), draw(st.integers(1, 200)), draw(st.integers(1, 70))
    scale = draw(st.sampled_from([1e-12, 1e-3, 1.0, 30.0, 1e6, 1e12]))
    offset = draw(st.sampled_from([0.0, 1.0, 100.0, 1e4]))
    of_each = scale * rng.choice([0.0, 1.0, offset], channels) * rng.normal(size=channels)
    spread = scale * draw(st.sampled_from([0.0, 1e-2, 1.0]))
    values = (of_each + spread * rng.normal(size=(items, channels))).astype(np.float32)
    patches = (of_each + spread * rng.normal(size=(12, channels))).astype(np.float32)
    if draw(st.booleans()):
        values = values[rng.integers(0, items, items)]  # some several times, under origins of their own
    if draw(st.booleans()):
        patches[:4] = values[rng.integers(0, items, 4)]
    if draw(st.booleans()):
        patches[4:6], values[: items // 3] = 0, 0
    return patches, values, some_origins(rng, items, count)


@given(cases())
def test_the_nearest_item_of_every_origin_is_found(case: tuple[Points, Points, Origins]) -> None:
    assert_nearest(*case)


def near(patch: Points, count: int, distance: float, step: float, rng: np.random.Generator) -> Points:
    """Items around a patch whose distances grow from one to the next by less than a screen can tell apart."""
    directions = rng.normal(size=(count, len(patch)))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    distances = distance * (1 + step * rng.permutation(count))
    return (patch + distances[:, None] * directions).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("step", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("distance", [1e-3, 0.1, 3.0, 40.0])
@pytest.mark.parametrize("offset", [0.0, 5.0, 1000.0])
def test_of_items_that_are_almost_as_near_the_nearest_is_found(
    offset: float, distance: float, step: float, seed: int
) -> None:
    """Rounded to the screen's type, another one is nearer, or they are the same."""
    rng = np.random.default_rng(seed)
    patches = (offset + rng.normal(size=(5, 158))).astype(np.float32)
    items = np.concatenate([near(patch, 60, distance, step, rng) for patch in patches])
    assert_nearest(patches, items, some_origins(rng, len(items), 3))


def test_rounding_that_moves_an_item_away_does_not_hide_it() -> None:
    """To bfloat16, 256 to 258 is one step: items are moved by up to 1, and the nearest looks farther than others."""
    items = np.array([[256.9], [257.1], [259.5], [255.0]], np.float32)
    patches = np.linspace(255, 260, 101, dtype=np.float32)[:, None]
    assert_nearest(patches, items, of_all(items))


def test_rounding_that_moves_a_patch_does_not_hide_its_nearest_item() -> None:
    """In bfloat16 the items are what they are, and the patch has 256, which makes the first item the nearer one."""
    items = np.array([[256, 3.46875], [260, 0]], np.float32)
    assert_nearest(np.array([[256.99, 0]], np.float32), items, of_all(items))


def test_sums_that_cancel_do_not_hide_the_nearest_item() -> None:
    """Squared lengths of 1e8, squared distances of less than what float32 can tell apart there."""
    rng = np.random.default_rng(0)
    patches = (1000 + 0.05 * rng.normal(size=(60, 150))).astype(np.float32)
    items = (1000 + 0.05 * rng.normal(size=(150, 150))).astype(np.float32)
    assert_nearest(patches, items, some_origins(rng, len(items), 2))


def test_an_item_that_is_the_patch_has_distance_zero() -> None:
    items = (100 * np.random.default_rng(0).normal(size=(70, 33))).astype(np.float32)
    assert not by_search(items[:40], items, of_all(items)).any()


def test_where_all_is_zero_all_distances_are() -> None:
    zeros = np.zeros((40, 7), np.float32)
    assert not by_search(zeros[:5], zeros, np.ones((40, 3), np.bool_)).any()


def test_an_item_is_found_beside_one_that_is_far_longer() -> None:
    """What rounding can do to a sum is bounded by the longest of all items."""
    items = np.array([[1e6, 1e6], [1.0, 0.0], [1.0, 0.25]], np.float32)
    assert_nearest(np.array([[1, 0.1], [1, 0.2], [9e5, 1e6]], np.float32), items, of_all(items))


def test_an_origin_without_items_is_left_out() -> None:
    rng = np.random.default_rng(0)
    patches, items = (rng.normal(size=(count, 4)).astype(np.float32) for count in (9, 50))
    origins = np.zeros((50, 5), np.bool_)
    origins[:20, 1] = origins[10:, 4] = True
    assert by_search(patches, items, origins).shape == (2, 9)
    assert_nearest(patches, items, origins)


def test_items_of_other_origins_do_not_count() -> None:
    """Nor do the copies of the first item that fill up the last block of the second origin."""
    items = np.concatenate([np.zeros((1, 3)), np.full((20, 3), 10)]).astype(np.float32)
    origins = np.zeros((21, 2), np.bool_)
    origins[0, 0] = origins[1:, 1] = True
    assert by_search(np.zeros((1, 3), np.float32), items, origins).tolist() == [[0], [300]]


@pytest.mark.parametrize("step", [16, 48, 4096])
@pytest.mark.parametrize("patches_at_once", [1, 7, 1000])
def test_patches_and_items_may_be_looked_at_in_parts(step: int, patches_at_once: int, screen_type: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    patches, items = (rng.normal(size=(count, 9)).astype(np.float32) for count in (50, 130))
    origins = some_origins(rng, 130, 5)
    rows = len(search._in_blocks(origins).items)
    held = patches_at_once * rows * torch.finfo(screen_type).bits // 8
    with mock.patch.object(search, "_STEP", step), mock.patch.object(search, "_SCREEN_BYTES", held):
        assert_nearest(patches, items, origins)


def test_no_more_is_held_at_once_than_allowed(screen: Screen, screen_type: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    patches, items = (rng.normal(size=(count, 9)).astype(np.float32) for count in (50, 128))
    nearest = NearestItems(torch.from_numpy(items), torch.from_numpy(of_all(items)), screen)
    allowed = 128 * 7 * torch.finfo(screen_type).bits // 8
    held: list[int] = []

    def noted(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bits, least = screened(query)
        held.append(bits.nbytes)
        return bits, least

    screened = nearest._screened
    with mock.patch.object(nearest, "_screened", noted), mock.patch.object(search, "_SCREEN_BYTES", allowed):
        nearest(torch.from_numpy(patches))
    assert held == [allowed] * 7 + [allowed // 7]


def test_a_patch_has_the_same_distances_alone_and_among_others() -> None:
    rng = np.random.default_rng(0)
    patches, items = ((20 * rng.normal(size=(count, 158))).astype(np.float32) for count in (90, 400))
    items[:200] = items[200:] + 1e-3 * rng.normal(size=(200, 158)).astype(np.float32)
    patches[:40] = items[:40] + 1e-2 * rng.normal(size=(40, 158)).astype(np.float32)
    origins = some_origins(rng, 400, 3)
    together = by_search(patches, items, origins)
    for size in (1, 7, 89):
        parts = [by_search(some, items, origins) for some in np.split(patches, range(size, len(patches), size))]
        np.testing.assert_array_equal(np.concatenate(parts, 1), together)


@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(1, 70))
def test_every_item_is_in_the_blocks_of_its_origins_and_in_no_others(seed: int, items: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = some_origins(rng, 1 + items // 20, count)  # so that some items have the same origins
    origins = kinds[rng.integers(0, len(kinds), items)]
    blocks = search._in_blocks(origins)
    origins_of_row = np.repeat(blocks.origins, np.array(blocks.sizes) * BLOCK, axis=0)
    assert len(origins_of_row) == len(blocks.items)
    for mine, rows in zip(origins.T, origins_of_row.T, strict=True):
        held = blocks.items[rows]
        assert sorted(held[held >= 0].tolist()) == np.flatnonzero(mine).tolist()


def test_items_of_the_same_origins_are_held_once() -> None:
    blocks = search._in_blocks(np.ones((64, 70), np.bool_))
    assert sorted(blocks.items.tolist()) == list(range(64))


@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [({}, torch.float32), ({"avx512_f": True, "amx_bf16": False}, torch.float32)]
    + [({name: True}, torch.bfloat16) for name in ("avx512_bf16", "amx_bf16", "bf16")],
)
def test_the_screen_is_in_bfloat16_where_the_processor_computes_with_it(
    capabilities: dict[str, bool], chosen: torch.dtype
) -> None:
    with mock.patch("torch.cpu.get_capabilities", return_value=capabilities):
        assert CHOSEN_TYPE(torch.device("cpu")) == chosen
        assert CHOSEN_TYPE(torch.device("cuda")) == torch.bfloat16
