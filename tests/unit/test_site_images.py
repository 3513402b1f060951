"""Which of a site's images may be held out: those of the folder, but none that was accepted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from feddymem.backbone import FeatureExtractor
from feddymem.feature_cache import CachedPatches, FeatureCache
from feddymem.progress import no_progress
from services.edge_client.arrivals import Arrivals
from services.edge_client.images import SiteImages
from services.edge_client.settings import EdgeClientSettings


def write(folder: Path, *numbers: int) -> list[Path]:
    """Different images, named by their numbers."""
    folder.mkdir(exist_ok=True)
    found = [folder / f"{number}.png" for number in numbers]
    for number, path in zip(numbers, found, strict=True):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3)).astype(np.uint8)
        assert cv2.imwrite(str(path), pixels)
    return found


def site_images(tmp_path: Path, extractor: FeatureExtractor, accepted: Sequence[Path] = ()) -> SiteImages:
    """As after each start of an edge client: only what is on disk is the same."""
    fixed = {"aggregator": "127.0.0.1:1", "federation": "parts", "site": "a", "data": tmp_path / "data"}
    settings = EdgeClientSettings(**fixed)  # type: ignore[arg-type]
    arrivals = Arrivals(tmp_path / "arrivals")
    return SiteImages(settings, extractor, tmp_path / "features", no_progress, lambda: accepted, arrivals)


def held_out(images: SiteImages, seed: int) -> set[str]:
    _, held = images.look().split(0.5, seed)
    assert held is not None
    return {path.name for path in held.paths}


@pytest.mark.parametrize("seed", range(8))
def test_what_was_accepted_is_in_the_bank_and_changes_nothing_for_the_others(
    tmp_path: Path, small: FeatureExtractor, seed: int
) -> None:
    write(tmp_path / "data", *range(5))
    alone = held_out(site_images(tmp_path, small), seed)
    readable, broken = write(tmp_path / "accepted", 10, 11)
    broken.write_bytes(b"no image")
    copy = tmp_path / "data" / "copy.png"  # also by another name, in the folder of the site's images
    copy.write_bytes(readable.read_bytes())
    images = site_images(tmp_path, small, [readable, broken])
    bank, _ = images.look().split(0.5, seed)
    assert {readable, copy} <= set(bank.paths)
    assert broken not in bank.paths
    assert held_out(images, seed) == alone


def test_images_that_come_later_stand_behind_the_others_whatever_their_names(
    tmp_path: Path, small: FeatureExtractor
) -> None:
    write(tmp_path / "data", *range(20, 32))
    held_out(site_images(tmp_path, small), 0)
    write(tmp_path / "data", *range(10, 16))  # before the others in the order of names
    in_order = [f"{number}.png" for number in (*range(20, 32), *range(10, 16))]
    _, chosen = CachedPatches(
        FeatureCache(tmp_path / "cache", small), [tmp_path / "data" / name for name in in_order]
    ).split(0.5, 0)
    assert chosen is not None
    assert held_out(site_images(tmp_path, small), 0) == {path.name for path in chosen.paths}
    (tmp_path / "arrivals").unlink()
    assert held_out(site_images(tmp_path, small), 0) != {path.name for path in chosen.paths}
