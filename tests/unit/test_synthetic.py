"""Synthetic products: three sites in the layout, the same for the same seed, with masks that tell the truth."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from skimage import data

from feddymem import synthetic
from feddymem.dataset_files import load_sites
from feddymem.datasets import SiteData
from feddymem.synthetic import SITES, write_products


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("products")
    write_products(folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def sites(root: Path) -> tuple[SiteData, ...]:
    return load_sites(root)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.png")}


def read(path: Path) -> NDArray[np.uint8]:
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert pixels is not None
    return np.asarray(pixels, dtype=np.uint8)


def test_there_are_three_sites_in_the_layout(sites: tuple[SiteData, ...]) -> None:
    assert [site.name for site in sites] == sorted(SITES)
    for site in sites:
        assert len(site.train) == 24
        assert sum(not image.defect for image in site.test) == 10
        assert sum(image.defect for image in site.test) == 10
        assert {image.kind for image in site.test} == {"good", "scratch", "stain", "foreign"}


def test_every_defect_has_a_mask_of_its_size_that_marks_something(sites: tuple[SiteData, ...]) -> None:
    for image in (image for site in sites for image in site.test if image.defect):
        assert image.mask is not None
        mask = read(image.mask)
        assert mask.shape == read(image.path).shape == (224, 224)
        assert set(np.unique(mask)) == {0, 255}
        assert 0.0005 < (mask > 0).mean() < 0.25


@pytest.mark.parametrize("kind", ["scratch", "stain", "foreign"])
def test_masks_mark_just_the_changed_pixels(kind: str) -> None:
    paint = dict(synthetic._DEFECTS)[kind]
    brick, gravel = data.brick()[:224, :224], data.gravel()[:224, :224]
    for seed in range(20):
        painted, mask = paint(brick, gravel, np.random.default_rng(seed))
        np.testing.assert_array_equal(painted[mask == 0], brick[mask == 0])
        assert (painted[mask > 0] != brick[mask > 0]).mean() > 0.9
        assert (mask > 0).any()


def test_sites_differ_in_lighting(sites: tuple[SiteData, ...]) -> None:
    brightness = {site.name: np.mean([read(path).mean() for path in site.train]) for site in sites}
    assert brightness["dim-hall"] < brightness["brick-hall"] - 15
    assert brightness["bright-hall"] > brightness["brick-hall"] + 15


def test_images_of_a_site_differ(sites: tuple[SiteData, ...]) -> None:
    for site in sites:
        paths = [*site.train, *(image.path for image in site.test)]
        assert len({path.read_bytes() for path in paths}) == len(paths)


def test_the_same_seed_gives_the_same_files(root: Path, tmp_path: Path) -> None:
    write_products(tmp_path, seed=3)
    assert files(tmp_path) == files(root)


def test_another_seed_gives_other_images_under_the_same_names(root: Path, tmp_path: Path) -> None:
    write_products(tmp_path, seed=4)
    mine, theirs = files(tmp_path), files(root)
    assert mine.keys() == theirs.keys()
    assert not {content for name, content in mine.items() if "/train/" in name} & set(theirs.values())


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "products").write_text("a file, not a folder")
    with pytest.raises(OSError, match="products"):
        write_products(tmp_path / "products")
