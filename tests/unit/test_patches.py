"""Streams of patches: an array in blocks of bounded size, as often as wanted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from feddymem import patches
from feddymem.patches import PatchArray, images_per_block

PATCHES, CHANNELS = 9, 5
IMAGE_BYTES = PATCHES * CHANNELS * 4


def features(images: int) -> NDArray[np.float16]:
    return np.random.default_rng(images).normal(size=(images, PATCHES, CHANNELS)).astype(np.float16)


@pytest.mark.parametrize("per_block", [1, 2, 3, 7, 100])
def test_blocks_are_all_patches_in_order(per_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "BLOCK_BYTES", per_block * IMAGE_BYTES)
    values = features(7)
    array = PatchArray(values)
    assert (array.images, array.patches_per_image, array.channels) == (7, PATCHES, CHANNELS)
    for _ in range(2):
        np.testing.assert_array_equal(torch.cat(list(array.blocks())).numpy(), values.astype(np.float32))


@pytest.mark.parametrize("bytes_allowed", [IMAGE_BYTES, 2 * IMAGE_BYTES + 1, 5 * IMAGE_BYTES - 1])
def test_blocks_are_as_large_as_allowed_and_no_larger(bytes_allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "BLOCK_BYTES", bytes_allowed)
    sizes = [block.numel() * block.element_size() for block in PatchArray(features(11)).blocks()]
    assert max(sizes) <= bytes_allowed
    assert min(sizes[:-1]) + IMAGE_BYTES > bytes_allowed


def test_an_image_larger_than_a_block_comes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "BLOCK_BYTES", IMAGE_BYTES // 2)
    assert [len(block) for block in PatchArray(features(3)).blocks()] == [1, 1, 1]
    assert images_per_block(PATCHES, CHANNELS) == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_blocks_of_an_array_do_not_share_its_memory(dtype: type[np.floating]) -> None:
    values = features(3).astype(dtype)
    for block in PatchArray(values).blocks():
        block.zero_()
    np.testing.assert_array_equal(values, features(3))
