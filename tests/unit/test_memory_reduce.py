"""Memory-reduce: coverage as by the plain greedy loop, honest averages of cells, in blocks of any size."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from feddymem import memory_reduce, patches
from feddymem.memory import MemoryBank
from feddymem.memory_reduce import greedy_cover, reduce, sample
from feddymem.patches import PatchArray

Points = NDArray[np.floating]

# Small whole numbers: many ties and duplicates, and every distance exact.
WHOLE_POINTS = st.tuples(st.integers(1, 24), st.integers(1, 3)).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=st.integers(-3, 3).map(float))
)


def squared_distances(a: Points, b: Points) -> NDArray[np.float64]:
    return np.asarray(((a[:, None].astype(np.float64) - b[None].astype(np.float64)) ** 2).sum(-1))


def plain_greedy(points: Points, count: int, base: Points | None = None) -> list[int]:
    """The loop that greedy_cover promises to agree with."""
    picks: list[int] = []
    if base is None:
        picks.append(int(squared_distances(points, points.mean(0, keepdims=True))[:, 0].argmin()))
    while len(picks) < min(count, len(points)):
        covered = points[picks] if base is None else np.concatenate([base, points[picks]])
        distances = squared_distances(points, covered).min(1)
        if distances.max() <= 0:
            break
        picks.append(int(distances.argmax()))
    return picks


def assert_is_greedy(points: Points, picks: list[int], count: int, base: Points | None) -> None:
    """Every pick is a farthest point; which one of several equally far is left open."""
    start = 0
    if base is None:
        to_mean = squared_distances(points, points.mean(0, keepdims=True))[:, 0]
        assert to_mean[picks[0]] <= to_mean.min() + 1e-4
        start = 1
    for number in range(start, len(picks) + 1):
        covered = points[picks[:number]] if base is None else np.concatenate([base, points[picks[:number]]])
        distances = squared_distances(points, covered).min(1)
        if number == len(picks):
            assert number == min(count, len(points)) or distances.max() == 0
        else:
            assert distances[picks[number]] == distances.max() > 0


def images(count: int, patches_per_image: int = 16, channels: int = 6, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, patches_per_image, channels)).astype(np.float32)


def in_blocks_of(count: int, features: NDArray[np.float32]) -> mock._patch[int]:
    return mock.patch.object(patches, "BLOCK_BYTES", count * features[0].size * 4)


def bank_of(items: Points) -> MemoryBank:
    ones = np.ones(len(items), np.float32)
    return MemoryBank(items=items.astype(np.float32), weights=ones[:, None], spreads=0 * ones)


def radius(features: Points, items: Points) -> float:
    """Distance of the worst covered patch to its nearest item."""
    flat = features.reshape(-1, features.shape[-1])
    return float(np.sqrt(squared_distances(flat, items).min(1).max()))


@given(points=WHOLE_POINTS, count=st.integers(1, 27), frontier=st.integers(1, 5), with_base=st.booleans())
def test_greedy_cover_always_picks_a_farthest_point(points: Points, count: int, frontier: int, with_base: bool) -> None:
    base = points[::3] + 1 if with_base else None
    with mock.patch.object(memory_reduce, "_FRONTIER", frontier):
        picks = greedy_cover(
            torch.from_numpy(points), count, None if base is None else torch.from_numpy(np.ascontiguousarray(base))
        )
    assert_is_greedy(points, [int(pick) for pick in picks], count, base)


@given(st.integers(0, 10_000), st.integers(3, 120), st.integers(1, 40), st.integers(1, 9), st.booleans())
def test_greedy_cover_picks_what_the_plain_loop_picks(
    seed: int, number: int, count: int, frontier: int, with_base: bool
) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(number, 3)).astype(np.float32)
    base = rng.normal(size=(4, 3)).astype(np.float32) if with_base else None
    with mock.patch.object(memory_reduce, "_FRONTIER", frontier):
        picks = greedy_cover(torch.from_numpy(points), count, None if base is None else torch.from_numpy(base))
    assert picks.tolist() == plain_greedy(points, count, base)


@pytest.mark.parametrize("with_base", [False, True])
def test_greedy_cover_picks_what_the_plain_loop_picks_among_more_points_than_the_frontier(with_base: bool) -> None:
    rng = np.random.default_rng(1)
    points = (rng.normal(size=(1200, 8)) * rng.gamma(1, 1, (1200, 1))).astype(np.float32)
    base = rng.normal(size=(20, 8)).astype(np.float32) if with_base else None
    picks = greedy_cover(torch.from_numpy(points), 80, None if base is None else torch.from_numpy(base))
    assert picks.tolist() == plain_greedy(points, 80, base)


def test_greedy_cover_of_duplicates_picks_each_place_once() -> None:
    places = np.random.default_rng(0).integers(-9, 9, (7, 4)).astype(np.float32)
    picks = greedy_cover(torch.from_numpy(np.tile(places, (30, 1))), 50)
    assert sorted(int(pick) % 7 for pick in picks) == list(range(7))


def test_greedy_cover_picks_nothing_where_the_base_has_every_point() -> None:
    points = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    picks = greedy_cover(points, 2, base=points)
    assert (picks.tolist(), picks.dtype) == ([], torch.int64)


def test_items_are_the_averages_of_their_cells_with_weight_and_spread() -> None:
    features = images(8)
    flat = features.reshape(-1, 6).astype(np.float64)
    seeds = flat[plain_greedy(features.reshape(-1, 6), 20)]
    cells = squared_distances(flat, seeds).argmin(1)
    bank = reduce(PatchArray(features), 20)
    assert len(bank) == 20
    for number in range(20):
        members = flat[cells == number]
        np.testing.assert_allclose(bank.items[number], members.mean(0), rtol=1e-4, atol=1e-5)
        assert bank.patches[number] == len(members)
        spread = np.sqrt(((members - members.mean(0)) ** 2).sum(1).mean())
        assert bank.spreads[number] == pytest.approx(spread, rel=1e-4, abs=1e-5)


def test_spreads_keep_their_precision_far_from_the_origin() -> None:
    features = images(8) * 0.01
    near, far = reduce(PatchArray(features), 1), reduce(PatchArray(features + np.float32(64)), 1)
    np.testing.assert_allclose(far.spreads, near.spreads, rtol=1e-3)


@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 40), st.integers(1, 10))
def test_weights_add_up_to_the_number_of_patches_in_blocks_of_any_size(
    seed: int, number: int, count: int, per_block: int
) -> None:
    features = images(number, patches_per_image=4, channels=3, seed=seed)
    with in_blocks_of(per_block, features):
        bank = reduce(PatchArray(features), count)
    assert bank.weights.sum() == number * 4
    assert len(bank) == min(count, number * 4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("per_block", [1, 3])
def test_many_blocks_cover_the_patches_nearly_as_well_as_one(per_block: int, seed: int) -> None:
    features = images(30, seed=seed)
    one = reduce(PatchArray(features), 40)
    with in_blocks_of(per_block, features):
        many = reduce(PatchArray(features), 40)
    assert radius(features, many.items) <= 3 * radius(features, one.items)


@pytest.mark.parametrize("place", [0, 13, 29])
@pytest.mark.parametrize("per_block", [1, 4, 100])
def test_a_rare_patch_keeps_an_item_of_its_own(per_block: int, place: int) -> None:
    features = images(30)
    features[place, 3] = 50
    with in_blocks_of(per_block, features):
        bank = reduce(PatchArray(features), 10)
    rare = (bank.items == 50).all(1)
    assert bank.patches[rare].tolist() == [1]


@pytest.mark.parametrize("per_block", [1, 2, 100])
def test_fewer_items_come_back_where_there_are_fewer_distinct_patches(per_block: int) -> None:
    places = np.random.default_rng(0).normal(3, 1, (9, 152)).astype(np.float32)
    features = places[np.random.default_rng(1).permutation(np.arange(16 * 9)) % 9].reshape(9, 16, 152)
    with in_blocks_of(per_block, features):
        bank = reduce(PatchArray(features), 60)
    assert len(bank) == 9
    assert bank.patches.tolist() == [16] * 9
    assert radius(features, bank.items) == pytest.approx(0, abs=1e-4)
    np.testing.assert_allclose(bank.spreads, 0, atol=1e-4)


def test_as_many_items_as_patches_keep_every_patch() -> None:
    features = images(3)
    bank = reduce(PatchArray(features), 48)
    assert (len(bank), bank.weights.max(), bank.spreads.max()) == (48, 1, 0)


def test_the_bank_holds_what_the_known_memory_lacks() -> None:
    rng = np.random.default_rng(0)
    old, new = rng.normal(0, 0.01, (10, 16, 6)), rng.normal(9, 1, (10, 16, 6))
    features = np.concatenate([old, new]).astype(np.float32)
    bank = reduce(PatchArray(features), 12, known=bank_of(old[0]))
    assert bank.items.min() > 3
    assert bank.weights.sum() == 160


def test_patches_nearest_to_a_known_item_are_left_to_it() -> None:
    features = images(10)
    known = bank_of(images(1, seed=5)[0])
    bank = reduce(PatchArray(features), 15, known=known)
    flat = features.reshape(-1, 6)
    picks = plain_greedy(flat, 15, known.items)
    cells = squared_distances(flat, np.concatenate([flat[picks], known.items])).argmin(1)
    np.testing.assert_array_equal(bank.patches, np.bincount(cells, minlength=31)[:15])
    np.testing.assert_allclose(bank.items[4], flat[cells == 4].mean(0), rtol=1e-4, atol=1e-5)


def test_every_round_covers_more() -> None:
    features = images(30)
    memory = reduce(PatchArray(features), 20)
    radii = [radius(features, memory.items)]
    for _ in range(3):
        memory = MemoryBank.concatenate([memory, reduce(PatchArray(features), 20, known=memory)])
        radii.append(radius(features, memory.items))
    assert radii == sorted(radii, reverse=True)
    assert radii[-1] < 0.9 * radii[0]


def test_patches_pass_through_the_transform() -> None:
    features = images(5)
    plain = reduce(PatchArray(features), 10)
    doubled = reduce(PatchArray(features), 10, transform=lambda block: 2 * block)
    np.testing.assert_allclose(doubled.items, 2 * plain.items, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(doubled.weights, plain.weights)


def test_the_transform_sees_whole_images() -> None:
    shapes: list[tuple[int, ...]] = []

    def transform(block: Tensor) -> Tensor:
        shapes.append(tuple(block.shape))
        return block

    features = images(5)
    with in_blocks_of(2, features):
        reduce(PatchArray(features), 10, transform=transform)
    assert shapes == 2 * [(2, 16, 6), (2, 16, 6), (1, 16, 6)]


def test_the_bank_is_the_same_for_the_same_arguments() -> None:
    features, known = images(12), bank_of(images(1, seed=5)[0])
    with in_blocks_of(5, features):
        first, second = (reduce(PatchArray(features), 10, known=known) for _ in range(2))
    np.testing.assert_array_equal(first.items, second.items)
    np.testing.assert_array_equal(first.weights, second.weights)
    np.testing.assert_array_equal(first.spreads, second.spreads)


@pytest.mark.parametrize("with_known", [False, True])
def test_a_block_is_let_go_before_the_next_is_read(with_known: bool) -> None:
    held: list[weakref.ref[Points]] = []

    def block() -> Tensor:
        values = images(2, seed=len(held))
        held.append(weakref.ref(values))
        return torch.from_numpy(values)

    def blocks() -> Iterator[Tensor]:
        for _ in range(4):
            assert not [ref for ref in held if ref() is not None]
            yield block()

    source = mock.Mock(images=8, patches_per_image=16, channels=6, blocks=blocks)
    reduce(source, 10, known=bank_of(images(1, seed=9)[0]) if with_known else None)
    assert len(held) == 2 * 4


def test_progress_is_told_of_every_block_of_both_passes() -> None:
    features, told = images(5), list[tuple[str, int, int]]()
    with in_blocks_of(2, features):
        reduce(PatchArray(features), 10, progress=lambda *step: told.append(step))
    assert told == [(what, done, 5) for what in ("seeds", "averages") for done in (2, 4, 5)]


@pytest.mark.parametrize("per_block", [1, 4, 100])
def test_a_sample_is_made_of_patches_that_stand_for_all(per_block: int) -> None:
    features = images(10)
    with in_blocks_of(per_block, features):
        bank = sample(PatchArray(features), 30, seed=3)
    assert len(bank) == 30
    assert len(np.unique(bank.items, axis=0)) == 30
    assert radius(bank.items[None], features.reshape(-1, 6)) == 0
    assert bank.weights.sum() == pytest.approx(160)
    assert not bank.spreads.any()


def test_a_sample_follows_its_seed() -> None:
    source = PatchArray(images(10))
    np.testing.assert_array_equal(sample(source, 30, seed=3).items, sample(source, 30, seed=3).items)
    assert not np.array_equal(sample(source, 30, seed=3).items, sample(source, 30, seed=4).items)


def test_a_sample_of_more_than_there_is_keeps_every_patch() -> None:
    features = images(2)
    bank = sample(PatchArray(features), 100, seed=0)
    np.testing.assert_array_equal(bank.items, features.reshape(-1, 6))
    assert bank.patches.tolist() == [1] * 32


def test_a_sample_passes_through_the_transform() -> None:
    features = images(4)
    plain = sample(PatchArray(features), 9, seed=1)
    doubled = sample(PatchArray(features), 9, seed=1, transform=lambda block: 2 * block)
    np.testing.assert_array_equal(doubled.items, 2 * plain.items)
