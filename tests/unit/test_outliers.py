"""Outlying banks: noise, duplicates and scaled banks are found, other products are not; weights are bounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from feddymem.memory import FloatArray, MemoryBank
from feddymem.outliers import FEWEST_ITEMS, bounded, outlying

CHANNELS = 24


def product(seed: int, count: int = 300, size: float = 1) -> MemoryBank:
    """A bank as of pictures: what is in one channel goes with what is in others. Each seed is a product of its own."""
    rng = np.random.default_rng(seed)
    what = rng.gamma(1, 1, (count, 4)) @ rng.normal(size=(4, CHANNELS))
    items = size * (rng.normal(0, 1, CHANNELS) + what + rng.normal(0, 0.05, what.shape))
    return bank(items, rng.gamma(2, 0.1 * size, count))


def bank(items: np.ndarray, spreads: np.ndarray | None = None) -> MemoryBank:
    ones = np.ones(len(items), np.float32)
    return MemoryBank(
        items.astype(np.float32), 5 * ones[:, None], 0 * ones if spreads is None else spreads.astype(np.float32)
    )


def honest(count: int = 5) -> dict[str, MemoryBank]:
    return {f"site{number}": product(number) for number in range(count)}


def noise(like: MemoryBank) -> MemoryBank:
    shape = like.items.shape
    return bank(np.random.default_rng(9).normal(like.items.mean(0), like.items.std(0), shape), like.spreads)


def shuffled(like: MemoryBank) -> MemoryBank:
    return dataclasses.replace(like, items=np.random.default_rng(9).permuted(like.items, axis=0))


def scaled(like: MemoryBank) -> MemoryBank:
    return dataclasses.replace(like, items=like.items * 10)


def one_scaled(like: MemoryBank) -> MemoryBank:
    items = like.items.copy()
    items[7] = like.items[np.abs(like.items).sum(1).argmax()] * 10
    return dataclasses.replace(like, items=items)


def widely_spread(like: MemoryBank) -> MemoryBank:
    return dataclasses.replace(like, spreads=like.spreads + 1000)


def duplicates(like: MemoryBank) -> MemoryBank:
    rng = np.random.default_rng(9)
    return dataclasses.replace(like, items=(like.items[:1] + rng.normal(0, 0.01, like.items.shape)).astype(np.float32))


def equal(like: MemoryBank) -> MemoryBank:
    return dataclasses.replace(like, items=np.repeat(like.items[:1], len(like), 0))


Attack = Callable[[MemoryBank], MemoryBank]
LONG, NEAR, NOISE = "its patches are up to", "from each other", "its items are noise"
ATTACKS = [
    (noise, NOISE),
    (shuffled, NOISE),
    (scaled, LONG),
    (one_scaled, LONG),
    (widely_spread, LONG),
    (duplicates, NEAR),
    (equal, NEAR),
]


@pytest.mark.parametrize("count", [1, 3, 10])
def test_sites_that_make_different_things_are_no_outliers(count: int) -> None:
    assert outlying(honest(count)) == ()


def test_a_site_that_makes_something_else_than_all_others_is_no_outlier() -> None:
    alike = {f"site{number}": bank(product(0).items + np.float32(0.01 * number)) for number in range(5)}
    assert outlying(alike | {"other": product(1, size=1.5)}) == ()


@pytest.mark.parametrize(("attack", "reason"), ATTACKS)
@pytest.mark.parametrize("count", [3, 6])
def test_one_poisoned_bank_is_outlying_and_no_other(attack: Attack, reason: str, count: int) -> None:
    banks = honest(count)
    banks["site1"] = attack(banks["site1"])
    (found,) = outlying(banks)
    assert found.site == "site1"
    assert reason in found.reason


def test_the_reason_has_the_figures_of_the_bank_and_of_a_usual_one() -> None:
    banks = {f"site{number}": bank(np.full((1, 4), length)) for number, length in enumerate([1, 1, 1, 8])}
    (found,) = outlying(banks)
    assert found.reason == (
        "its patches are up to 16 long, those of a usual site up to 2; outlying is more than 3 times as much"
    )


def test_duplicates_far_from_zero_are_found_too() -> None:
    """Squares of the distances are far below what float32 leaves of the squares of the items."""
    far = {site: dataclasses.replace(each, items=each.items + np.float32(300)) for site, each in honest().items()}
    assert outlying(far) == ()
    rng = np.random.default_rng(0)
    far["site1"] = bank(far["site1"].items[:1] + rng.normal(0, 0.01, (300, CHANNELS)))
    (found,) = outlying(far)
    assert NEAR in found.reason
    assert "its items are 0.06" in found.reason  # 0.01 √(2 · 24) = 0.069


@pytest.mark.parametrize("attack", [noise, scaled, duplicates])
def test_of_two_sites_none_is_judged(attack: Attack) -> None:
    assert outlying({"a": product(0), "b": attack(product(1))}) == ()


@pytest.mark.parametrize(("poisoned", "found"), [(2, 2), (3, 0), (4, 0)])
def test_a_minority_is_outlying_and_a_half_is_not(poisoned: int, found: int) -> None:
    banks = honest(6)
    for number in range(poisoned):
        banks[f"site{number}"] = noise(banks[f"site{number}"])
    assert len(outlying(banks)) == found


def test_trusted_sites_are_never_outlying() -> None:
    banks = honest(6) | {"noise": noise(product(7)), "scaled": scaled(product(8))}
    assert [each.site for each in outlying(banks)] == ["noise", "scaled"]
    assert [each.site for each in outlying(banks, trusted={"noise"})] == ["scaled"]
    assert outlying(banks, trusted=banks) == ()


def test_the_order_of_the_banks_does_not_matter() -> None:
    banks = honest() | {"noise": noise(product(7)), "duplicates": duplicates(product(8))}
    assert outlying(banks) == outlying(dict(reversed(banks.items())))


def test_of_few_items_only_their_size_is_judged() -> None:
    few = noise(product(7, FEWEST_ITEMS - 1))
    assert outlying(honest() | {"few": few}) == ()
    assert [each.site for each in outlying(honest() | {"few": scaled(few)})] == ["few"]
    assert [each.site for each in outlying(honest() | {"few": noise(product(7, FEWEST_ITEMS))})] == ["few"]


def test_sites_with_few_items_are_not_what_others_are_judged_by() -> None:
    few = {f"few{number}": noise(product(number, 9)) for number in range(5)}
    banks = few | honest(3) | {"noise": noise(product(7))}
    assert [each.site for each in outlying(banks)] == ["noise"]
    assert outlying(few | {"noise": noise(product(7))}) == ()


@pytest.mark.parametrize("honest_first", [True, False])
def test_of_many_items_it_does_not_matter_where_a_site_puts_those_that_are_duplicates(honest_first: bool) -> None:
    """Distances are those of 2048 items, drawn from all of them."""
    good, bad = product(7, 2048).items, duplicates(product(7, 8000)).items
    items = np.concatenate([good, bad] if honest_first else [bad, good])
    (found,) = outlying(honest() | {"many": bank(items)})
    assert NEAR in found.reason


def test_which_items_are_drawn_nobody_can_choose_who_does_not_choose_all_of_them() -> None:
    """They change with any bit of the bank, and are the same for the same bank."""
    many = duplicates(product(7, 3000))

    def told(bit: int) -> str:
        items = many.items.copy()
        items.view(np.uint32)[0, 0] ^= 1 << bit if bit else 0  # of so little that no distance changes
        (found,) = outlying(honest() | {"many": bank(items)})
        return found.reason

    assert told(0) == told(0)
    assert len({told(bit) for bit in range(4)}) > 1


@pytest.mark.parametrize("count", [1, 300, 3000])
def test_banks_that_are_all_equal_items_break_nothing(count: int) -> None:
    assert outlying({f"site{number}": bank(np.ones((count, 3))) for number in range(3)}) == ()


UPLOADS = hnp.arrays(
    np.float32,
    st.tuples(st.sampled_from([1, 63, 64, 90]), st.just(CHANNELS)),
    elements=st.floats(-60_000, 60_000, width=32),
)
WEIGHTS = st.floats(1, 2.0**60, width=32)


@given(UPLOADS, WEIGHTS, st.integers(2, 6))
def test_whatever_one_site_uploads_no_honest_one_is_outlying(items: FloatArray, weight: float, others: int) -> None:
    poisoned = dataclasses.replace(bank(items), weights=np.full((len(items), 1), weight, np.float32))
    assert {each.site for each in outlying(honest(others) | {"poisoned": poisoned})} <= {"poisoned"}


@given(st.lists(st.lists(WEIGHTS, min_size=1, max_size=5), min_size=3, max_size=7))
def test_no_bank_counts_for_more_than_all_together_at_the_median(weights: list[list[float]]) -> None:
    banks = {
        str(number): dataclasses.replace(bank(np.ones((len(each), 2))), weights=np.array(each, np.float32)[:, None])
        for number, each in enumerate(weights)
    }
    result = bounded(banks)
    most = len(banks) * np.median([each.patches.sum() for each in banks.values()])
    for site, each in result.items():
        assert each.patches.sum() <= most * (1 + 1e-6) + len(each)  # no weight falls below 1
        if banks[site].patches.sum() <= most:
            assert each is banks[site]


def test_bounded_weights_keep_their_ratios_and_their_zeros() -> None:
    heavy = MemoryBank(
        np.ones((2, 3), np.float32), np.array([[1e9, 0], [2e9, 3e9]], np.float32), np.zeros(2, np.float32)
    )
    banks = {"heavy": heavy} | {str(number): product(number) for number in range(3)}
    result = bounded(banks)["heavy"]
    np.testing.assert_allclose(result.weights, np.array([[1000, 0], [2000, 3000]]), rtol=1e-6)
    np.testing.assert_array_equal(result.items, heavy.items)


def test_of_two_sites_no_weights_are_bounded() -> None:
    heavy = dataclasses.replace(product(0), weights=np.full((300, 1), 1e9, np.float32))
    assert bounded({"heavy": heavy, "light": product(1)})["heavy"] is heavy
