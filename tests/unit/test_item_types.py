"""Types of items: little is lost in 8 bits or half floats, and a federation in one process loses just as much."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from feddymem.item_types import as_received, quantise
from feddymem.memory import FloatArray, InvalidBankError, MemoryBank
from feddymem.method import ItemType
from services.runtime.arrays import BANK_ARRAYS, bank_from_wire, bank_to_wire

MODERATE = st.floats(-60_000, 60_000, width=32)
ITEMS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=MODERATE)
TYPES = pytest.mark.parametrize("item_type", ["uint8", "float16"])


def bank(items: FloatArray) -> MemoryBank:
    weights = np.arange(1, len(items) + 1, dtype=np.float32)
    return MemoryBank(items=items, weights=weights[:, None], spreads=weights / np.float32(7))


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=6), elements=MODERATE))
def test_8_bits_are_within_half_a_step_of_each_channel(values: FloatArray) -> None:
    quantised = quantise(values)
    assert quantised.steps.shape == quantised.values.shape == values.shape
    assert quantised.steps.dtype == np.uint8
    assert quantised.values.dtype == np.float32
    channels = values.reshape(-1, values.shape[-1]).astype(np.float64)
    half_steps = (channels.max(0) - channels.min(0)) / 510
    rounding = 8 * np.finfo(np.float32).eps * np.abs(channels).max(0) + 1e-40
    assert (np.abs(quantised.values.astype(np.float64) - values) <= half_steps + rounding).all()


@given(MODERATE, st.integers(1, 5))
def test_a_constant_channel_comes_back_exactly(value: float, rows: int) -> None:
    values = np.stack([np.full(rows, value), np.arange(rows)], 1).astype(np.float32)
    np.testing.assert_array_equal(quantise(values).values[:, 0], values[:, 0])


def test_the_ends_of_a_channel_are_its_first_and_last_step() -> None:
    quantised = quantise(np.array([[-1, 8], [1, 4], [0.5, 5]], np.float32))
    np.testing.assert_array_equal(quantised.steps, [[0, 255], [255, 0], [191, 64]])
    np.testing.assert_allclose(quantised.values[:2], [[-1, 8], [1, 4]], rtol=1e-6)


def test_a_channel_of_large_values_does_not_coarsen_another() -> None:
    values = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    alone = quantise(values).values[:, 1]
    values[:, 0] *= 1000
    np.testing.assert_array_equal(quantise(values).values[:, 1], alone)


@TYPES
@given(items=ITEMS)
def test_a_bank_is_as_if_it_had_gone_over_the_wire(item_type: ItemType, items: FloatArray) -> None:
    sent = bank(items)
    received = bank_from_wire((wire.manifest, wire.data) for wire in bank_to_wire(sent, item_type))
    for name in BANK_ARRAYS:
        np.testing.assert_array_equal(getattr(as_received(sent, item_type), name), getattr(received, name))


@TYPES
def test_a_bank_keeps_its_weights_and_spreads_and_is_not_changed_itself(item_type: ItemType) -> None:
    items = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    sent = bank(items.copy())
    received = as_received(sent, item_type)
    np.testing.assert_array_equal(received.weights, sent.weights)
    np.testing.assert_array_equal(received.spreads, sent.spreads)
    np.testing.assert_array_equal(sent.items, items)
    assert not np.array_equal(received.items, items)


@pytest.mark.parametrize("value", [65_520.0, -1e6, 3e38])
def test_a_value_beyond_float16_is_refused(value: float) -> None:
    with pytest.raises(InvalidBankError, match="1 values of items are NaN or infinite"):
        as_received(bank(np.array([[1, value]], np.float32)), "float16")


def test_a_value_beyond_float16_fits_into_8_bits() -> None:
    items = np.array([[1e6], [0]], np.float32)
    np.testing.assert_allclose(as_received(bank(items), "uint8").items, items, rtol=1e-6)
