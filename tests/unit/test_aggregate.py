"""Aggregation: banks that fit are kept, banks that do not are merged without losing a patch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from feddymem.aggregate import Aggregation, aggregate
from feddymem.memory import MemoryBank
from feddymem.memory_reduce import greedy_cover


def bank(count: int, channels: int = 5, seed: int = 0, shift: float = 0, origins: int = 1) -> MemoryBank:
    rng = np.random.default_rng(seed)
    return MemoryBank(
        items=rng.normal(shift, 1, (count, channels)).astype(np.float32),
        weights=rng.integers(1, 50, (count, origins)).astype(np.float32),
        spreads=rng.gamma(2, 0.1, count).astype(np.float32),
    )


def squared_distances(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(((a[:, None].astype(np.float64) - b[None].astype(np.float64)) ** 2).sum(-1))


def assert_same(a: Aggregation, b: Aggregation) -> None:
    for name in ("items", "weights", "spreads"):
        np.testing.assert_array_equal(getattr(a.memory, name), getattr(b.memory, name))
    assert (a.iterations, a.inertia) == (b.iterations, b.inertia)


@pytest.mark.parametrize("count", [7, 8, 1000])
def test_items_that_all_fit_are_kept_as_they_are(count: int) -> None:
    banks = [bank(4, seed=1), bank(3, seed=2)]
    merged = aggregate(banks, count)
    whole = MemoryBank.concatenate(banks)
    np.testing.assert_array_equal(merged.memory.items, whole.items)
    np.testing.assert_array_equal(merged.memory.weights, whole.weights)
    np.testing.assert_array_equal(merged.memory.spreads, whole.spreads)
    assert (merged.iterations, merged.inertia) == (0, 0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 60), st.integers(0, 100))
def test_no_patch_is_lost_and_the_memory_is_bounded(sizes: list[int], count: int, seed: int) -> None:
    banks = [bank(size, seed=seed + number) for number, size in enumerate(sizes)]
    merged = aggregate(banks, count, seed).memory
    assert len(merged) <= count
    assert merged.weights.sum() == sum(each.weights.sum() for each in banks)


@pytest.mark.parametrize("origins", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 10, 59])
def test_weights_spreads_and_inertia_are_those_of_the_items_behind_each(count: int, origins: int) -> None:
    pool = MemoryBank.concatenate([bank(30, seed=1, origins=origins), bank(30, seed=2, shift=4, origins=origins)])
    merged = aggregate([pool], count)
    squared = squared_distances(pool.items, merged.memory.items)
    cells = squared.argmin(1)
    for number in range(len(merged.memory)):
        mine = cells == number
        weights = pool.patches[mine]
        assert merged.memory.weights[number].tolist() == pool.weights[mine].sum(0).tolist()
        scatter = pool.spreads[mine].astype(np.float64) ** 2 + squared[mine, number]
        assert merged.memory.spreads[number] == pytest.approx(
            np.sqrt((weights * scatter).sum() / weights.sum()), rel=1e-3
        )
    assert merged.inertia == pytest.approx(squared.min(1).sum(), rel=1e-3, abs=1e-4)


def test_the_items_are_those_of_k_means() -> None:
    """At its fixed point each item is the mean of the bank items behind it."""
    centres = np.array([[0, 0], [50, 0], [0, 50], [50, 50]], np.float32)
    noise = np.random.default_rng(0).normal(size=(4, 25, 2)).astype(np.float32)
    items = (centres[:, None] + noise).reshape(-1, 2)
    ones = np.ones(100, np.float32)
    merged = aggregate([MemoryBank(items=items, weights=ones[:, None], spreads=0 * ones)], 4)
    means = items.reshape(4, 25, 2).mean(1)
    np.testing.assert_allclose(squared_distances(merged.memory.items, means).min(0), 0, atol=1e-5)
    assert merged.memory.patches.tolist() == [25] * 4
    assert merged.iterations > 0


def test_items_move_from_coverage_seeds_until_they_are_the_means_of_their_cells() -> None:
    pool = bank(60, channels=2, seed=1)
    places = pool.items[greedy_cover(torch.from_numpy(pool.items), 5).numpy()]
    moves = 0
    while True:
        cells = squared_distances(pool.items, places).argmin(1)
        means = np.stack([pool.items[cells == number].mean(0) for number in range(5)])
        if np.allclose(means, places):
            break
        places, moves = means, moves + 1
    assert moves > 3
    np.testing.assert_allclose(aggregate([pool], 5).memory.items, places, rtol=1e-4, atol=1e-4)


def test_sites_far_apart_all_keep_items() -> None:
    """A site of few patches is not drowned by one of many."""
    large, small = bank(200, seed=1), bank(5, seed=2, shift=40)
    merged = aggregate([large, small], 20).memory
    assert squared_distances(small.items, merged.items).min(1).max() < 40


def test_the_typical_distance_grows_by_what_merging_moves() -> None:
    banks = [bank(50, seed=1), bank(50, seed=2)]
    whole, merged = MemoryBank.concatenate(banks), aggregate(banks, 10).memory
    moved = np.average(squared_distances(whole.items, merged.items).min(1), weights=whole.patches)
    assert merged.typical_distance**2 == pytest.approx(whole.typical_distance**2 + moved, rel=1e-3)


@pytest.mark.parametrize("count", [5, 9, 60])
def test_duplicates_are_merged(count: int) -> None:
    places = np.array([[0, 0], [9, 0], [0, 9], [9, 9], [4, 4]], np.float32)
    ones = np.ones(100, np.float32)
    pool = MemoryBank(items=np.tile(places, (20, 1)), weights=ones[:, None], spreads=0 * ones)
    merged = aggregate([pool], count).memory
    assert sorted(map(tuple, merged.items.tolist())) == sorted(map(tuple, places.tolist()))
    assert merged.patches.tolist() == [20] * 5
    assert not merged.spreads.any()


def test_the_result_is_the_same_for_the_same_arguments() -> None:
    banks = [bank(60, seed=1), bank(60, seed=2)]
    assert_same(aggregate(banks, 25, seed=7), aggregate(banks, 25, seed=7))


@pytest.mark.parametrize("seed", [0, 2**31, 2**63 - 1])
def test_any_seed_of_a_method_will_do(seed: int) -> None:
    assert len(aggregate([bank(60)], 25, seed).memory) <= 25


def test_banks_are_not_changed() -> None:
    mine, copy = bank(60), bank(60)
    aggregate([mine], 10)
    for name in ("items", "weights", "spreads"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(copy, name))


def test_no_banks_are_refused() -> None:
    with pytest.raises(ValueError, match="no banks to aggregate"):
        aggregate([], 10)


@pytest.mark.parametrize("count", [1, 1000])
def test_banks_of_different_channels_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=r"different numbers of channels: \[4, 5\]"):
        aggregate([bank(3, channels=5), bank(3, channels=4)], count)


def test_banks_of_different_origins_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different numbers of origins: \[1, 2\]"):
        aggregate([bank(3), bank(3, origins=2)], 10)


@pytest.mark.parametrize("weights", [[[9], [1], [1]], [[1, 8], [1, 0], [1, 0]]])
def test_weighted_items_pull_the_merged_item_towards_the_heavier(weights: list[list[float]]) -> None:
    bank = MemoryBank(
        items=np.array([[0.0], [1.0], [9.0]], np.float32),
        weights=np.array(weights, np.float32),
        spreads=np.zeros(3, np.float32),
    )
    plain, weighted = (sorted(aggregate([bank], 2, weighted=w).memory.items[:, 0].tolist()) for w in (False, True))
    assert plain == pytest.approx([0.5, 9.0])
    assert weighted == pytest.approx([0.1, 9.0])


def owned(memory: MemoryBank, origin: int) -> int:
    """Items that one origin is alone behind."""
    return int(((memory.weights[:, origin] > 0) & (np.count_nonzero(memory.weights, axis=1) == 1)).sum())


def test_merging_one_origin_s_items_first_counts_in_iterations_and_inertia() -> None:
    crowd, others = bank(100).placed(0, 3), [bank(3, seed=origin).placed(origin, 3) for origin in (1, 2)]
    merged = aggregate([crowd, *others], 30)
    assert owned(merged.memory, 0) == 20
    assert merged.iterations > 0
    moved = squared_distances(crowd.items, merged.memory.items[merged.memory.weights[:, 0] > 0]).min(1).sum()
    assert merged.inertia == pytest.approx(moved, rel=1e-3)


@given(
    st.integers(3, 6),
    st.integers(10, 30),
    st.lists(st.tuples(st.integers(1, 90), st.sampled_from([0, 1, 100, 60_000])), min_size=1, max_size=4),
    st.integers(1, 2**20),
)
def test_whatever_a_site_uploads_it_has_at_most_two_equal_shares_of_a_full_memory(
    origins: int, count: int, uploads: list[tuple[int, float]], weight: int
) -> None:
    """Round after round, with any number of items, however far apart."""
    memory = [bank(15, seed=origin).placed(origin, origins) for origin in range(1, origins)]
    for number, (items, size) in enumerate(uploads):
        upload = bank(items, seed=100 + number)
        upload = MemoryBank(size * upload.items, weight * upload.weights, upload.spreads).placed(0, origins)
        full = sum(map(len, [*memory, upload])) > count
        total = sum(each.weights.sum(0, dtype=np.float64) for each in [*memory, upload])
        memory = [aggregate([*memory, upload], count).memory]
        assert len(memory[0]) <= count
        assert not full or owned(memory[0], 0) <= np.ceil(2 * count / origins)
        np.testing.assert_allclose(memory[0].weights.sum(0), total, rtol=1e-5)


def test_a_site_does_not_take_the_places_of_the_others() -> None:
    """Noise is farther from everything than what honest sites have, so that coverage seeds would all be noise."""
    honest = [bank(60, seed=origin).placed(origin, 4) for origin in range(1, 4)]
    noise = MemoryBank(
        np.random.default_rng(0).normal(0, 1000, (500, 5)).astype(np.float32),
        np.ones((500, 1), np.float32),
        np.zeros(500, np.float32),
    ).placed(0, 4)
    merged = aggregate([*honest, noise], 100).memory
    alone = aggregate(honest, 50).memory
    assert owned(merged, 0) == 50
    pool = MemoryBank.concatenate(honest).items
    assert squared_distances(pool, merged.items).min(1).max() <= 2 * squared_distances(pool, alone.items).min(1).max()


@pytest.mark.parametrize(("origins", "items"), [(1, 120), (2, 110), (4, 50)])
def test_sites_within_their_shares_are_merged_as_if_there_were_no_bound(origins: int, items: int) -> None:
    banks = [bank(items, seed=origin).placed(origin, origins) for origin in range(origins)]
    single = [MemoryBank(each.items, each.patches.astype(np.float32)[:, None], each.spreads) for each in banks]
    merged, plain = aggregate(banks, 100).memory, aggregate(single, 100).memory
    np.testing.assert_array_equal(merged.items, plain.items)
    np.testing.assert_array_equal(merged.spreads, plain.spreads)
