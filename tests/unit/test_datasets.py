"""Data sets: folders in the MVTec AD layout, and clear words about those that are not."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from feddymem.dataset_files import load_sites
from feddymem.datasets import DatasetError, TestImage, list_images, read_mask
from feddymem.images import ImageError


def image(path: Path, value: int | NDArray[np.uint8] = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((6, 8), value, np.uint8) if isinstance(value, int) else value
    assert cv2.imwrite(str(path), pixels)
    return path


def site(root: Path, name: str) -> None:
    for part in ("train/good/000.png", "train/good/001.png", "test/good/000.png", "test/crack/000.png"):
        image(root / name / part)
    image(root / name / "test/dent/007.png")
    image(root / name / "ground_truth/crack/000_mask.png", 255)


def test_sites_come_by_name_with_their_images(tmp_path: Path) -> None:
    for name in ("line-b", "line-a"):
        site(tmp_path, name)
    sites = load_sites(tmp_path)
    assert [each.name for each in sites] == ["line-a", "line-b"]
    assert sites[0].train == tuple(tmp_path / "line-a/train/good" / name for name in ("000.png", "001.png"))
    assert [(each.kind, each.path.name) for each in sites[0].test] == [
        ("crack", "000.png"),
        ("dent", "007.png"),
        ("good", "000.png"),
    ]


def test_masks_are_found_beside_the_defects(tmp_path: Path) -> None:
    site(tmp_path, "a")
    crack, dent, good = load_sites(tmp_path)[0].test
    assert (crack.defect, crack.mask) == (True, tmp_path / "a/ground_truth/crack/000_mask.png")
    assert (dent.defect, dent.mask) == (True, None)
    assert (good.defect, good.mask) == (False, None)


def test_a_mask_belongs_to_an_image_of_any_suffix(tmp_path: Path) -> None:
    site(tmp_path, "a")
    image(tmp_path / "a/test/crack/003.jpg")
    mask = image(tmp_path / "a/ground_truth/crack/003_mask.png")
    assert {each.path.name: each.mask for each in load_sites(tmp_path)[0].test}["003.jpg"] == mask


def test_a_site_without_test_images_is_good_for_training(tmp_path: Path) -> None:
    image(tmp_path / "a/train/good/000.png")
    assert load_sites(tmp_path)[0].test == ()


def test_a_test_image_in_no_folder_of_its_kind_is_refused(tmp_path: Path) -> None:
    site(tmp_path, "a")
    image(tmp_path / "a/test/000.png")
    with pytest.raises(DatasetError, match=r"000\.png lies directly in test; put it into test/good or test/KIND"):
        load_sites(tmp_path)


def test_a_folder_that_cannot_name_a_site_is_refused(tmp_path: Path) -> None:
    site(tmp_path, "line a")
    with pytest.raises(DatasetError, match=r"site name 'line a' must be 1 to 63 letters"):
        load_sites(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sites.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"sites\.json is neither a folder nor a \.csv, \.yaml or \.yml file"):
        load_sites(tmp_path / "sites.json")


def test_other_folders_and_files_are_passed_over(tmp_path: Path) -> None:
    site(tmp_path, "a")
    image(tmp_path / "notes/whiteboard.png")
    (tmp_path / "readme.txt").write_text("not a site")
    (tmp_path / "a/train/good/license.txt").write_text("not an image")
    (found,) = load_sites(tmp_path)
    assert len(found.train) == 2


def test_images_are_found_at_any_depth_and_in_any_case(tmp_path: Path) -> None:
    for name in ("b.JPG", "deep/er/a.png", "c.tiff", "d.TIF", "e.bmp", "f.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "g.gif").touch()
    names = [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)]
    assert names == ["b.JPG", "c.tiff", "d.TIF", "deep/er/a.png", "e.bmp", "f.jpeg"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(DatasetError, match=re.escape(f"folder {missing} does not exist")):
        list_images(missing)
    with pytest.raises(DatasetError, match=re.escape(f"data set {missing} does not exist")):
        load_sites(missing)


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DatasetError, match=re.escape(f"folder {tmp_path} has no image (.bmp, .jpeg, .jpg, .png")):
        list_images(tmp_path)


def test_a_folder_without_sites_is_told_the_layout(tmp_path: Path) -> None:
    image(tmp_path / "train/good/000.png")
    with pytest.raises(DatasetError, match=r"no SITE/train/good folder; expected one folder per site"):
        load_sites(tmp_path)


@pytest.mark.parametrize("part", ["train/good", "test"])
def test_a_site_with_an_empty_folder_is_refused(tmp_path: Path, part: str) -> None:
    site(tmp_path, "a")
    image(tmp_path / "b/train/good/000.png")
    (tmp_path / "b" / part).mkdir(parents=True, exist_ok=True)
    for path in (tmp_path / "b" / part).iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match=re.escape(str(tmp_path / "b" / part))):
        load_sites(tmp_path)


def test_the_mask_of_a_good_image_is_empty(tmp_path: Path) -> None:
    mask = TestImage(tmp_path / "000.png", "good", None).read_mask((5, 7))
    assert mask.dtype == np.bool_
    assert mask.tolist() == [[False] * 7] * 5


def test_a_mask_keeps_its_place_at_any_size(tmp_path: Path) -> None:
    drawn = np.zeros((20, 40), np.uint8)
    drawn[5:10, 20:40] = 255
    defect = TestImage(tmp_path / "000.png", "crack", image(tmp_path / "mask.png", drawn))
    np.testing.assert_array_equal(defect.read_mask((20, 40)), drawn > 0)
    for height, width in ((2, 2), (4, 8), (8, 16), (100, 80)):
        mask = defect.read_mask((height, width))
        expected = np.zeros((height, width), np.bool_)
        expected[height // 4 : height // 2, width // 2 :] = True
        np.testing.assert_array_equal(mask, expected)


def test_a_mask_has_no_shades(tmp_path: Path) -> None:
    shades = np.array([[0, 127, 128, 255]], np.uint8)
    mask = TestImage(tmp_path / "000.png", "crack", image(tmp_path / "mask.png", shades)).read_mask((1, 4))
    assert mask.tolist() == [[False, False, True, True]]


def test_a_mask_of_labels_marks_every_kind_of_defect(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 2, 9]], np.uint8)
    assert read_mask(image(tmp_path / "mask.png", labels)).tolist() == [[False, True, True, True]]


def test_a_mask_may_have_colours(tmp_path: Path) -> None:
    colours = np.zeros((1, 4, 3), np.uint8)
    colours[0, 1:] = 200 * np.eye(3, dtype=np.uint8)
    assert read_mask(image(tmp_path / "mask.png", colours)).tolist() == [[False, True, True, True]]


def test_an_empty_mask_marks_nothing(tmp_path: Path) -> None:
    assert not read_mask(image(tmp_path / "mask.png", 0)).any()


def test_a_defect_without_mask_has_none_to_read(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"000\.png shows a defect but has no mask"):
        TestImage(tmp_path / "000.png", "crack", None).read_mask((4, 4))


def test_a_broken_mask_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "000_mask.png"
    broken.write_bytes(b"text")
    with pytest.raises(ImageError, match=r"000_mask\.png"):
        TestImage(tmp_path / "000.png", "crack", broken).read_mask((4, 4))
