"""Data sets: the images of each site, and how they lie in folders in the MVTec AD layout.

ROOT/SITE/train/good/*                  normal images, for the memory bank
ROOT/SITE/test/good/*, test/KIND/*      test images, normal and defect
ROOT/SITE/ground_truth/KIND/STEM_mask.png    masks of the defects

`feddymem.dataset_files` finds them, in such folders or in files that list them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from feddymem.images import decode_file
from feddymem.names import NAME_PATTERN, NAME_RULE

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"})
GOOD = "good"


Images = tuple[Sequence[Path], Sequence["TestImage"]]
"""Normal images for training, and test images; in any order."""


class DatasetError(ValueError):
    """A folder or file is missing, empty, or not in the layout."""


@dataclass(frozen=True)
class TestImage:
    """One test image.

    Attributes:
        path: the image file.
        kind: "good", or the kind of defect.
        mask: the mask file of a defect; None for a good image, or where there is no mask.
    """

    __test__ = False

    path: Path
    kind: str
    mask: Path | None

    @property
    def defect(self) -> bool:
        """Whether the image shows a defect."""
        return self.kind != GOOD

    def read_mask(self, size: tuple[int, int]) -> NDArray[np.bool_]:
        """Defect pixels at (height, width) `size`; none for a good image.

        Raises:
            DatasetError: a defect image without a mask.
        """
        if not self.defect:
            return np.zeros(size, np.bool_)
        if self.mask is None:
            raise DatasetError(f"{self.path} shows a defect but has no mask")
        pixels = read_mask(self.mask)
        rows = (np.arange(size[0]) + 0.5) * pixels.shape[0] / size[0]
        columns = (np.arange(size[1]) + 0.5) * pixels.shape[1] / size[1]
        return np.asarray(pixels[rows.astype(int)][:, columns.astype(int)])


@dataclass(frozen=True)
class SiteData:
    """One site's images.

    Attributes:
        name: name of the site.
        train: normal images for the bank, sorted; at least one.
        test: test images, sorted.
    """

    name: str
    train: tuple[Path, ...]
    test: tuple[TestImage, ...]


def make_site(name: str, train: Sequence[Path], test: Sequence[TestImage]) -> SiteData:
    """A site of images in any order.

    Raises:
        DatasetError: no valid name, no normal image for training, or an image twice.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise DatasetError(f"site name {name!r} must be {NAME_RULE}")
    if not train:
        raise DatasetError(f"site {name} has no normal image for training; a memory bank needs some")
    counts = Counter([*train, *(image.path for image in test)])
    (path, times), *_ = counts.most_common(1)
    if times > 1:
        raise DatasetError(f"site {name} has the image {path} {times} times; list each once, for training or for test")
    return SiteData(name, tuple(sorted(train)), tuple(sorted(test, key=lambda image: image.path)))


def read_mask(path: Path) -> NDArray[np.bool_]:
    """Defect pixels of a mask file, (height, width).

    Where no value is above 127, values are labels (VisA numbers the kinds of defect 1, 2, ...): all but 0 are defect.
    Elsewhere they are shades of 0..255, with soft edges in some data sets: those above 127 are defect.

    Raises:
        ImageError: the file cannot be decoded.
    """
    values = decode_file(path).max(axis=2)
    return np.asarray(values > 127 if values.max() > 127 else values > 0)


def list_images(folder: Path) -> tuple[Path, ...]:
    """Image files anywhere under a folder, sorted.

    Raises:
        DatasetError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DatasetError(f"folder {folder} does not exist")
    found = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()))
    if not found:
        raise DatasetError(f"folder {folder} has no image ({', '.join(sorted(SUFFIXES))})")
    return found


def load_category(folder: Path, good: str = GOOD, masks: Sequence[str] = ("{stem}_mask.png",)) -> Images:
    """Images of one category's folder, in the MVTec AD layout or one alike.

    Args:
        folder: has `train` and `ground_truth`, and `test` where there are test images.
        good: name of the folders of normal images.
        masks: names that a mask may have in ground_truth/KIND.

    Raises:
        DatasetError: a folder is missing or empty, or a test image is in no folder of its kind.
    """
    root = folder / "test"
    paths = list_images(root) if root.is_dir() else ()
    test = []
    for path in paths:
        kind, *rest = path.relative_to(root).parts
        if not rest:
            raise DatasetError(f"{path} lies directly in test; put it into test/{good} or test/KIND")
        found = (folder / "ground_truth" / kind / mask.format(stem=path.stem) for mask in masks)
        mask = next((each for each in found if each.is_file()), None)
        test.append(TestImage(path, GOOD, None) if kind == good else TestImage(path, kind, mask))
    return list_images(folder / "train" / good), test
