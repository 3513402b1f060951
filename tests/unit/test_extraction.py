"""Extraction: features of every readable file in order, and a word about every other; never the same work twice."""

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
from feddymem.extraction import features_of
from feddymem.feature_cache import Extraction, FeatureCache
from feddymem.images import MAX_PIXELS, ImageError, decode_file
from feddymem.progress import Progress, no_progress
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


def extract(
    paths: list[Path],
    extractor: FeatureExtractor,
    folder: Path,
    batch_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Progress = no_progress,
) -> Extraction:
    """As a process does that has just started."""
    return FeatureCache(folder, extractor, None, batch_size, max_pixels).extract(paths, progress)


def patches_of(found: Extraction) -> torch.Tensor:
    return torch.cat(list(found.patches.blocks()))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_features_come_in_the_order_of_the_files(tmp_path: Path, small: FeatureExtractor, batch_size: int) -> None:
    paths = images(tmp_path, 7)
    found = extract(paths, small, tmp_path / "patches", batch_size)
    expected = small(torch.stack([small.prepare(decode_file(path)) for path in paths]))
    assert (found.patches.images, found.skipped) == (7, ())
    torch.testing.assert_close(patches_of(found), expected, rtol=2e-3, atol=2e-3)


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
    torch.testing.assert_close(patches_of(found), patches_of(alone), rtol=2e-3, atol=2e-3)


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
    with mock.patch.object(small, "read", wraps=small.read) as read:
        features = features_of(paths, small, batch_size=1)
        next(features)
        features.close()
    assert read.call_count <= 2 * workers() + 1


def test_progress_counts_skipped_files_too(tmp_path: Path, small: FeatureExtractor) -> None:
    paths, told = [broken(tmp_path), *images(tmp_path, 5)], list[tuple[str, int, int]]()
    extract(paths, small, tmp_path / "patches", batch_size=2, progress=lambda *step: told.append(step))
    assert told == [("features", done, 6) for done in range(1, 7)]


def test_what_was_extracted_before_a_kill_is_not_extracted_again(tmp_path: Path, small: FeatureExtractor) -> None:
    paths = images(tmp_path, 7)

    def killed(_what: str, done: int, _total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(paths, small, tmp_path / "patches", batch_size=2, progress=killed)
    resumed = extract(paths, small, tmp_path / "patches", batch_size=2)
    assert resumed.extracted == 3
    fresh = extract(paths, small, tmp_path / "others", batch_size=2)
    assert torch.equal(patches_of(resumed), patches_of(fresh))


def test_a_change_of_the_folder_is_noticed_and_only_what_is_new_extracted(
    tmp_path: Path, small: FeatureExtractor
) -> None:
    paths = images(tmp_path, 6)
    cache = FeatureCache(tmp_path / "patches", small, None)
    assert cache.extract(paths[1:5]).extracted == 4
    content = paths[2].read_bytes()
    paths[2].write_bytes(paths[3].read_bytes())  # changed to what is known already
    assert cv2.imwrite(str(paths[4]), np.full((30, 40, 3), 9, np.uint8))  # changed to something new
    there = [path for path in paths if path != paths[1]]  # one removed, one added before and one behind
    found = cache.extract(there)
    cache.keep_only(found.patches.paths)
    assert (found.extracted, found.patches.images) == (3, 5)
    assert torch.equal(patches_of(found), patches_of(extract(there, small, tmp_path / "others")))
    assert len(list((tmp_path / "patches").rglob("*.features"))) == 4  # two images have one content
    paths[2].write_bytes(content)
    assert cache.extract(there).extracted == 1
    assert cache.extract(there).extracted == 0


def test_a_file_that_is_still_being_written_is_tried_again(tmp_path: Path, small: FeatureExtractor) -> None:
    paths = images(tmp_path, 2)
    content = paths[1].read_bytes()
    paths[1].write_bytes(content[: len(content) // 2])
    cache = FeatureCache(tmp_path / "patches", small, None)
    first = cache.extract(paths)
    assert (first.patches.images, len(first.skipped)) == (1, 1)
    paths[1].write_bytes(content)
    second = cache.extract(paths)
    assert (second.patches.images, second.extracted, second.skipped) == (2, 1, ())


def test_patches_stay_as_they_were_although_the_folder_changes(tmp_path: Path, small: FeatureExtractor) -> None:
    """The passes of one round see the same."""
    paths = images(tmp_path, 3)
    found = extract(paths, small, tmp_path / "patches")
    before = patches_of(found)
    paths[0].unlink()
    paths[1].write_bytes(paths[2].read_bytes())
    assert torch.equal(patches_of(found), before)


def test_a_damaged_entry_is_made_again_unless_its_image_has_changed(tmp_path: Path, small: FeatureExtractor) -> None:
    paths = images(tmp_path, 2)
    damaged: list[Path] = []

    def discard(path: Path) -> None:
        damaged.append(path)
        path.unlink()

    cache = FeatureCache(tmp_path / "patches", small, None, discard=discard)
    found = cache.extract(paths)
    before = patches_of(found)
    entries = list((tmp_path / "patches").rglob("*.features"))
    for entry in entries:
        entry.write_bytes(bytes(entry.stat().st_size))
    assert torch.equal(patches_of(found), before)
    assert sorted(damaged) == sorted(entries)
    entries[0].unlink()
    for path in paths:
        assert cv2.imwrite(str(path), np.zeros((30, 40, 3), np.uint8))
    with pytest.raises(ImageError, match="has changed since it was read"):
        patches_of(found)
