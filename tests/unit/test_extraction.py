"""Extraction: features of every readable file in order, and a word about every other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import torch

from feddymem import extraction
from feddymem.backbone import FeatureExtractor
from feddymem.datasets import DatasetError
from feddymem.extraction import extract, features_of
from feddymem.images import decode_file
from feddymem.threads import team, workers


def images(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [folder / f"{number:03}.png" for number in range(count)]
    for path in paths:
        assert cv2.imwrite(str(path), rng.integers(0, 256, (30, 40, 3)).astype(np.uint8))
    return paths


def broken(folder: Path, name: str = "broken.png") -> Path:
    path = folder / name
    path.write_bytes(b"\x89PNG\r\n\x1a\n and then nothing of the kind")
    return path


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_features_come_in_the_order_of_the_files(tmp_path: Path, small: FeatureExtractor, batch_size: int) -> None:
    paths = images(tmp_path, 7)
    found = extract(paths, small, tmp_path / "patches", batch_size)
    expected = small(torch.stack([small.prepare(decode_file(path)) for path in paths]))
    assert (found.patches.images, found.skipped) == (7, ())
    torch.testing.assert_close(torch.cat(list(found.patches.blocks())), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("place", [0, 3, 6])
def test_an_unreadable_file_is_skipped_counted_and_named(tmp_path: Path, small: FeatureExtractor, place: int) -> None:
    good = images(tmp_path, 6)
    paths = [*good[:place], broken(tmp_path), *good[place:]]
    found = extract(paths, small, tmp_path / "patches", batch_size=4)
    assert found.patches.images == 6
    assert len(found.skipped) == 1
    assert str(tmp_path / "broken.png") in found.skipped[0]
    assert "is not a readable JPEG, PNG, BMP or TIFF" in found.skipped[0]
    alone = extract(good, small, tmp_path / "others", batch_size=4)
    torch.testing.assert_close(
        torch.cat(list(found.patches.blocks())), torch.cat(list(alone.patches.blocks())), rtol=2e-3, atol=2e-3
    )


def test_missing_and_oversized_files_are_skipped_with_their_reason(tmp_path: Path, small: FeatureExtractor) -> None:
    large = tmp_path / "large.png"
    assert cv2.imwrite(str(large), np.zeros((100, 100), np.uint8))
    paths = [tmp_path / "missing.png", *images(tmp_path, 1), large]
    missing, oversized = extract(paths, small, tmp_path / "patches", max_pixels=2_000).skipped
    assert "missing.png" in missing
    assert "No such file" in missing
    assert "large.png: image is 100 x 100 = 10000 pixels; at most 2000 are allowed" in oversized


def test_if_no_file_can_be_read_the_first_reason_is_told(tmp_path: Path, small: FeatureExtractor) -> None:
    paths = [broken(tmp_path, "one.png"), broken(tmp_path, "two.png")]
    with pytest.raises(DatasetError, match=r"none of the 2 images could be read; the first: .*one\.png: "):
        extract(paths, small, tmp_path / "patches")


def test_no_files_at_all_are_refused(tmp_path: Path, small: FeatureExtractor) -> None:
    with pytest.raises(DatasetError):
        extract([], small, tmp_path / "patches")


def test_files_are_decoded_and_computed_by_as_many_threads_as_leave_no_core_idle(
    tmp_path: Path, small: FeatureExtractor
) -> None:
    with team(8), mock.patch.object(extraction, "ThreadPoolExecutor", wraps=ThreadPoolExecutor) as pool:
        extract(images(tmp_path, 1), small, tmp_path / "patches")
    assert pool.call_args.args == (6,)


def test_files_are_not_read_far_ahead_of_who_takes_their_features(tmp_path: Path, small: FeatureExtractor) -> None:
    paths = images(tmp_path, 1) * 200
    with mock.patch.object(small, "read_file", wraps=small.read_file) as read:
        features = features_of(paths, small, 1)
        next(features)
        features.close()
    assert read.call_count <= 2 * workers() + 1


def test_progress_counts_skipped_files_too(tmp_path: Path, small: FeatureExtractor) -> None:
    paths, told = [broken(tmp_path), *images(tmp_path, 5)], list[tuple[str, int, int]]()
    extract(paths, small, tmp_path / "patches", batch_size=2, progress=lambda *step: told.append(step))
    assert told == [("features", 2, 6), ("features", 4, 6), ("features", 6, 6)]


def test_an_earlier_file_of_features_is_replaced(tmp_path: Path, small: FeatureExtractor) -> None:
    paths = images(tmp_path, 3)
    extract(paths, small, tmp_path / "patches")
    found = extract(paths[:1], small, tmp_path / "patches")
    assert sum(len(block) for block in found.patches.blocks()) == 1
