"""Values of a bank against the images that it is said to be made from."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feddymem.local_update import local_update
from feddymem.memory import MemoryBank
from feddymem.method import Method
from feddymem.patches import PatchArray
from services.aggregator.banks import check_values
from services.runtime.errors import Refusal
from tests.feature_spaces import SPACE


def bank(weights: np.ndarray[tuple[int], np.dtype[np.float32]]) -> MemoryBank:
    items = len(weights)
    return MemoryBank(np.ones((items, 2), np.float32), weights[:, None], np.zeros(items, np.float32))


@given(images=st.integers(1, 10**6), items=st.integers(1, 5000))
def test_what_an_honest_site_sends_is_taken(images: int, items: int) -> None:
    """Patches shared out evenly, as by `sample`, are rounded in the same direction each."""
    total = images * SPACE.patches
    items = min(items, total)
    check_values(bank(np.full(items, total / items, np.float32)), images, SPACE)


@given(images=st.integers(1, 10**6), more=st.floats(1.001, 1e6), items=st.integers(1, 100))
def test_more_patches_than_the_images_have_are_refused(images: int, more: float, items: int) -> None:
    total = more * images * SPACE.patches + items
    with pytest.raises(Refusal, match=f"{images} images have {images * SPACE.patches} patches"):
        check_values(bank(np.full(items, total / items, np.float32)), images, SPACE)


@pytest.mark.parametrize("name", ["items", "spreads"])
def test_values_that_do_not_fit_a_release_are_refused(name: str) -> None:
    honest = bank(np.ones(4, np.float32))
    values = np.array(getattr(honest, name))
    values.flat[2] = 60_001
    with pytest.raises(Refusal, match="float16"):
        check_values(dataclasses.replace(honest, **{name: values}), 1, SPACE)


def test_a_bank_of_the_method_is_taken() -> None:
    source = PatchArray(np.random.default_rng(0).normal(size=(3, SPACE.patches, 8)).astype(np.float32))
    for memory_reduce in (True, False):
        made = local_update(source, None, None, Method(memory_reduce=memory_reduce, bank_items=7), 1).bank
        check_values(made, 3, SPACE)
