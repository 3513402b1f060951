"""The memory bank: what it refuses, and its typical distance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from feddymem.memory import InvalidBankError, MemoryBank


def parts(count: int = 3, channels: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "items": rng.normal(size=(count, channels)).astype(np.float32),
        "weights": np.arange(1, count + 1, dtype=np.float32)[:, None],
        "spreads": np.linspace(0, 1, count, dtype=np.float32),
    }


def with_value(name: str, index: int | tuple[int, int], value: float) -> dict[str, Any]:
    arrays = parts()
    arrays[name][index] = value
    return arrays


def test_a_good_bank_is_accepted() -> None:
    bank = MemoryBank(**parts(count=3, channels=4))
    assert (len(bank), bank.channels) == (3, 4)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (12,), (3, 2, 2), ()])
def test_items_that_are_no_table_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidBankError, match=r"items have shape \(.*expected \(n, channels\)"):
        MemoryBank(**(parts() | {"items": np.zeros(shape, np.float32)}))


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), (0,), ()])
def test_spreads_that_are_not_one_for_each_item_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidBankError, match=r"spreads have shape .*expected \(3,\), one for each item"):
        MemoryBank(**(parts() | {"spreads": np.ones(shape, np.float32)}))


@pytest.mark.parametrize("shape", [(2, 1), (4, 1), (3,), (3, 0), (3, 1, 1), (0,), ()])
def test_weights_that_are_not_a_row_for_each_item_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidBankError, match=r"weights have shape .*expected \(3, origins\), a row for each item"):
        MemoryBank(**(parts() | {"weights": np.ones(shape, np.float32)}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "index"), [("items", (1, 2)), ("weights", (0, 0)), ("spreads", 2)])
def test_a_value_that_is_not_finite_is_refused(name: str, index: int | tuple[int, int], value: float) -> None:
    with pytest.raises(InvalidBankError, match=f"1 values of {name} are NaN or infinite"):
        MemoryBank(**with_value(name, index, value))


@pytest.mark.parametrize("value", [0.999, -1])
def test_a_weight_below_one_patch_is_refused(value: float) -> None:
    with pytest.raises(InvalidBankError, match=f"smallest weight is {value:g}"):
        MemoryBank(**with_value("weights", (1, 0), value))


def test_an_item_that_no_patch_is_behind_is_refused() -> None:
    with pytest.raises(InvalidBankError, match="1 of 3 items have no weight"):
        MemoryBank(**with_value("weights", (1, 0), 0))


def test_a_weight_may_be_zero_where_another_origin_has_patches_behind_the_item() -> None:
    bank = MemoryBank(**(parts() | {"weights": np.array([[2, 0], [0, 1], [3, 4]], np.float32)}))
    assert bank.origins == 2
    assert bank.patches.tolist() == [2, 1, 7]


def test_a_bank_can_be_placed_among_origins_and_is_not_changed_itself() -> None:
    bank = MemoryBank(**parts())
    assert bank.placed(1, 3).weights.tolist() == [[0, 1, 0], [0, 2, 0], [0, 3, 0]]
    assert bank.placed(1, 3).placed(0, 4).weights.tolist() == [[0, 1, 0, 0], [0, 2, 0, 0], [0, 3, 0, 0]]
    assert bank.origins == 1


def test_a_negative_spread_is_refused() -> None:
    with pytest.raises(InvalidBankError, match=r"smallest spread is -0\.5"):
        MemoryBank(**with_value("spreads", 1, -0.5))


def test_the_typical_distance_is_that_of_the_patches_behind_the_items() -> None:
    weights, spreads = np.array([1, 3], np.float32), np.array([2, 4], np.float32)
    bank = MemoryBank(items=np.zeros((2, 1), np.float32), weights=weights[:, None], spreads=spreads)
    assert bank.typical_distance == pytest.approx(math.sqrt((1 * 4 + 3 * 16) / 4))


def test_the_typical_distance_of_items_without_spread_is_zero() -> None:
    assert MemoryBank(**(parts() | {"spreads": np.zeros(3, np.float32)})).typical_distance == 0


def test_large_weights_do_not_cost_the_typical_distance_its_precision() -> None:
    weights, spreads = np.full(5, 2**24, np.float32), np.full(5, 0.1, np.float32)
    bank = MemoryBank(items=np.zeros((5, 1), np.float32), weights=weights[:, None], spreads=spreads)
    assert bank.typical_distance == pytest.approx(0.1, rel=1e-6)


def test_concatenated_banks_keep_items_weights_and_spreads_in_order() -> None:
    first, second = MemoryBank(**parts(3)), MemoryBank(**parts(2))
    joined = MemoryBank.concatenate([first, second])
    np.testing.assert_array_equal(joined.items, np.concatenate([first.items, second.items]))
    assert joined.weights.tolist() == [[1], [2], [3], [1], [2]]
    assert joined.spreads.tolist() == [0, 0.5, 1, 0, 1]


def test_some_of_the_items_keep_their_weights_and_spreads() -> None:
    some = MemoryBank(**parts(3)).only(np.array([True, False, True]))
    np.testing.assert_array_equal(some.items, parts(3)["items"][[0, 2]])
    assert some.weights.tolist() == [[1], [3]]
    assert some.spreads.tolist() == [0, 1]


def test_origins_are_taken_away_with_the_items_that_nobody_else_has() -> None:
    weights = np.array([[2, 0, 0], [0, 3, 0], [0, 4, 1]], np.float32)
    bank = MemoryBank(np.arange(6, dtype=np.float32).reshape(3, 2), weights, np.ones(3, np.float32))
    left = bank.without([1, 7])
    assert left is not None
    np.testing.assert_array_equal(left.items, bank.items[[0, 2]])
    np.testing.assert_array_equal(left.weights, [[2, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(bank.weights, weights)
    assert bank.without([0, 1, 2]) is None
