"""Features kept on disk: extracted once, the same from disk, never damaged, never more than the bound."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from feddymem.backbone import FeatureExtractor, load_extractor
from feddymem.feature_cache import CachedPatches, FeatureCache
from feddymem.folders import cache_folder
from feddymem.images import ImageError, decode_file


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(found):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3)).astype(np.uint8)
        assert cv2.imwrite(str(path), pixels)
    return found


@pytest.fixture
def passes(small: FeatureExtractor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each pass of the backbone."""
    counts: list[int] = []
    features = small._features

    def counted(pixels: Tensor) -> Tensor:
        counts.append(len(pixels))
        return features(pixels)

    monkeypatch.setattr(small, "_features", counted)
    return counts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def directly(extractor: FeatureExtractor, path: Path) -> NDArray[np.float16]:
    return np.asarray(extractor(extractor.prepare(decode_file(path))[None])[0].numpy(), np.float16)


def test_features_are_extracted_once_and_are_the_same_from_disk(
    folder: Path, paths: list[Path], small: FeatureExtractor, passes: list[int]
) -> None:
    first = FeatureCache(folder, small).features(paths)
    assert sum(passes) == len(paths)
    second = FeatureCache(folder, small).features(paths[::-1])
    assert sum(passes) == len(paths)
    np.testing.assert_array_equal(first, second.flip(0))
    np.testing.assert_allclose(first[3], directly(small, paths[3]), rtol=1e-2, atol=1e-2)


def test_an_entry_is_of_the_content_and_not_of_the_name(
    folder: Path, paths: list[Path], small: FeatureExtractor, passes: list[int]
) -> None:
    before = FeatureCache(folder, small).features(paths[:1])
    paths[0].write_bytes(paths[1].read_bytes())
    after = FeatureCache(folder, small).features(paths[:1])
    assert not np.array_equal(before, after)
    FeatureCache(folder, small).features(paths[1:2])
    assert passes == [1, 1]


def test_another_feature_space_has_entries_of_its_own(folder: Path, paths: list[Path], small: FeatureExtractor) -> None:
    FeatureCache(folder, small).features(paths[:1])
    other = load_extractor(input_size=96, device="cpu")
    assert FeatureCache(folder, other).features(paths[:1]).shape[1] == other.feature_space.patches
    assert len(entries(folder)) == 2


def test_another_precision_has_entries_of_its_own(folder: Path, paths: list[Path], small: FeatureExtractor) -> None:
    FeatureCache(folder, small).features(paths[:1])
    coarse = load_extractor(input_size=small.feature_space.input_size, device="cpu", precision="bfloat16")
    assert coarse.feature_space == small.feature_space
    found = FeatureCache(folder, coarse).features(paths[:1])
    np.testing.assert_array_equal(found[0].numpy(), directly(coarse, paths[0]))
    assert len(entries(folder)) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_a_damaged_entry_is_extracted_again(
    folder: Path, paths: list[Path], small: FeatureExtractor, passes: list[int], damage: str
) -> None:
    expected = FeatureCache(folder, small).features(paths[:1])
    (entry,) = entries(folder)
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.write_bytes({"truncated": bytes(content[:-7]), "empty": b"", "flipped": bytes(content)}[damage])
    np.testing.assert_array_equal(FeatureCache(folder, small).features(paths[:1]), expected)
    FeatureCache(folder, small).features(paths[:1])
    assert passes == [1, 1]


def test_the_folder_keeps_to_its_bound_and_to_what_was_used_last(
    folder: Path, paths: list[Path], small: FeatureExtractor, passes: list[int]
) -> None:
    FeatureCache(folder, small).features(paths[:4])
    size = entries(folder)[0].stat().st_size
    for age, path in enumerate(entries(folder)):
        os.utime(path, (1000 + age, 1000 + age))
    cache = FeatureCache(folder, small, limit_bytes=4 * size)
    cache.features(paths[:1])  # used now
    cache.features(paths[4:5])
    assert len(entries(folder)) == 3
    passes.clear()
    cache.features([paths[0], paths[4]])
    assert passes == []


def test_a_bound_below_the_images_is_slow_and_right(folder: Path, paths: list[Path], small: FeatureExtractor) -> None:
    expected = FeatureCache(folder / "large", small).features(paths)
    found = FeatureCache(folder / "small", small, limit_bytes=1).features(paths)
    np.testing.assert_array_equal(found, expected)
    assert entries(folder / "small") == []


def test_other_files_in_the_folder_are_left_alone(folder: Path, paths: list[Path], small: FeatureExtractor) -> None:
    foreign = folder / "photos" / "one.png"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"0" * 1000)
    FeatureCache(folder, small, limit_bytes=1).features(paths)
    assert entries(folder) == [foreign]


def test_an_unreadable_image_is_named(folder: Path, paths: list[Path], small: FeatureExtractor) -> None:
    paths[1].write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"1\.png"):
        FeatureCache(folder, small).features(paths)
    with pytest.raises(ImageError, match="missing"):
        FeatureCache(folder, small).features([Path("missing.png")])


def test_a_source_of_cached_patches_has_all_images_in_order(
    folder: Path, paths: list[Path], small: FeatureExtractor
) -> None:
    cache = FeatureCache(folder, small)
    source = CachedPatches(cache, paths)
    blocks = list(source.blocks())
    assert sum(map(len, blocks)) == source.images == len(paths)
    np.testing.assert_array_equal(np.concatenate([block.numpy() for block in blocks]), cache.features(paths))
    assert [len(batch) for batch in source.batches(4)] == [4, 2]


def test_what_has_no_number_is_in_the_bank_and_changes_nothing_for_the_others(
    paths: list[Path], folder: Path, small: FeatureExtractor
) -> None:
    cache = FeatureCache(folder, small)
    *others, chosen = paths
    for seed in range(8):
        alone, held_alone = CachedPatches(cache, others).split(0.5, seed)
        numbers = {cache.name(path): number for number, path in enumerate(others)}
        bank, held = CachedPatches(cache, paths, numbers).split(0.5, seed)
        assert held_alone is not None
        assert held is not None
        assert held.paths == held_alone.paths
        assert bank.paths == (*alone.paths, chosen)


def test_the_numbers_decide_what_is_held_out(paths: list[Path], folder: Path, small: FeatureExtractor) -> None:
    cache = FeatureCache(folder, small)
    backwards = {cache.name(path): number for number, path in enumerate(reversed(paths))}
    _, held = CachedPatches(cache, paths, backwards).split(0.5, 0)
    _, as_they_came = CachedPatches(cache, paths[::-1]).split(0.5, 0)
    _, in_order = CachedPatches(cache, paths).split(0.5, 0)
    assert held is not None
    assert as_they_came is not None
    assert in_order is not None
    assert set(held.paths) == set(as_they_came.paths) != set(in_order.paths)


def test_the_default_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "feddymem"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "feddymem"
