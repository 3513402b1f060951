"""Streams of patches: a file gives what an array gives, in blocks of bounded size, as often as wanted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from feddymem import patches
from feddymem.patches import PatchArray, PatchFile, PatchSource, images_per_block

PATCHES, CHANNELS = 9, 5
IMAGE_BYTES = PATCHES * CHANNELS * 4


def features(images: int) -> NDArray[np.float16]:
    return np.random.default_rng(images).normal(size=(images, PATCHES, CHANNELS)).astype(np.float16)


def written(path: Path, values: NDArray[np.float16], batch: int = 3) -> PatchFile:
    file = PatchFile(path, PATCHES, CHANNELS)
    for start in range(0, len(values), batch):
        file.append(values[start : start + batch])
    return file


@pytest.mark.parametrize("per_block", [1, 2, 3, 7, 100])
def test_a_file_gives_the_blocks_of_an_array(per_block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "BLOCK_BYTES", per_block * IMAGE_BYTES)
    values = features(7)
    array, file = PatchArray(values), written(tmp_path / "patches", values)
    assert (file.images, file.patches_per_image, file.channels) == (7, PATCHES, CHANNELS)
    assert (array.images, array.patches_per_image, array.channels) == (7, PATCHES, CHANNELS)
    for mine, theirs in zip(file.blocks(), array.blocks(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    np.testing.assert_array_equal(torch.cat(list(file.blocks())).numpy(), values.astype(np.float32))


@pytest.mark.parametrize("bytes_allowed", [IMAGE_BYTES, 2 * IMAGE_BYTES + 1, 5 * IMAGE_BYTES - 1])
def test_blocks_are_as_large_as_allowed_and_no_larger(
    bytes_allowed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "BLOCK_BYTES", bytes_allowed)
    sources: list[PatchSource] = [PatchArray(features(11)), written(tmp_path / "patches", features(11))]
    for source in sources:
        sizes = [block.numel() * block.element_size() for block in source.blocks()]
        assert max(sizes) <= bytes_allowed
        assert min(sizes[:-1]) + IMAGE_BYTES > bytes_allowed


def test_an_image_larger_than_a_block_comes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "BLOCK_BYTES", IMAGE_BYTES // 2)
    assert [len(block) for block in written(tmp_path / "patches", features(3)).blocks()] == [1, 1, 1]
    assert images_per_block(PATCHES, CHANNELS) == 1


def test_blocks_are_float32_and_can_be_read_again(tmp_path: Path) -> None:
    file = written(tmp_path / "patches", features(4))
    first, second = list(file.blocks()), list(file.blocks())
    assert [block.dtype for block in first] == [torch.float32]
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_file_can_be_read_before_more_is_appended(tmp_path: Path) -> None:
    values = features(5)
    file = written(tmp_path / "patches", values[:2])
    assert sum(len(block) for block in file.blocks()) == 2
    file.append(values[2:])
    np.testing.assert_array_equal(torch.cat(list(file.blocks())).numpy(), values.astype(np.float32))


def test_a_new_file_replaces_an_old_one(tmp_path: Path) -> None:
    written(tmp_path / "patches", features(4))
    file = PatchFile(tmp_path / "patches", PATCHES, CHANNELS)
    assert (file.images, list(file.blocks())) == (0, [])


def test_a_view_that_is_not_contiguous_is_written_in_order(tmp_path: Path) -> None:
    values = features(6)
    file = PatchFile(tmp_path / "patches", PATCHES, CHANNELS)
    file.append(values[::2])
    np.testing.assert_array_equal(torch.cat(list(file.blocks())).numpy(), values[::2].astype(np.float32))


@pytest.mark.parametrize("shape", [(2, PATCHES + 1, CHANNELS), (2, PATCHES, CHANNELS - 1), (PATCHES, CHANNELS)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected float16 of this file's shape"):
        PatchFile(tmp_path / "patches", PATCHES, CHANNELS).append(np.zeros(shape, np.float16))


def test_features_of_another_type_are_refused(tmp_path: Path) -> None:
    wrong = np.zeros((2, PATCHES, CHANNELS), np.float32)
    with pytest.raises(ValueError, match="features are float32"):
        PatchFile(tmp_path / "patches", PATCHES, CHANNELS).append(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_blocks_of_an_array_do_not_share_its_memory(dtype: type[np.floating]) -> None:
    values = features(3).astype(dtype)
    for block in PatchArray(values).blocks():
        block.zero_()
    np.testing.assert_array_equal(values, features(3))
