"""Data sets in the MVTec AD layout, one folder per site.

ROOT/SITE/train/good/*                  normal images, for the memory bank
ROOT/SITE/test/good/*, test/KIND/*      test images, normal and defect
ROOT/SITE/ground_truth/KIND/STEM_mask.png    masks of the defects
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from feddymem.images import decode_file

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"})
GOOD = "good"


class DatasetError(ValueError):
    """A folder is missing, empty, or not in the layout."""


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
        pixels = decode_file(self.mask)[:, :, 0]
        rows = (np.arange(size[0]) + 0.5) * pixels.shape[0] / size[0]
        columns = (np.arange(size[1]) + 0.5) * pixels.shape[1] / size[1]
        return np.asarray(pixels[rows.astype(int)][:, columns.astype(int)] > 127)


@dataclass(frozen=True)
class SiteData:
    """One site's folder.

    Attributes:
        name: name of the site.
        train_folder: folder of the normal images.
        train: normal images for the bank, sorted.
        test: test images, sorted.
    """

    name: str
    train_folder: Path
    train: tuple[Path, ...]
    test: tuple[TestImage, ...]


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


def load_sites(root: Path) -> tuple[SiteData, ...]:
    """All sites under a folder, by name.

    Raises:
        DatasetError: no site folder with `train/good` under it, or a site without images.
    """
    if not root.is_dir():
        raise DatasetError(f"data folder {root} does not exist")
    folders = sorted(path for path in root.iterdir() if (path / "train" / GOOD).is_dir())
    if not folders:
        raise DatasetError(
            f"data folder {root} has no SITE/train/{GOOD} folder; expected one folder per site (MVTec AD layout)"
        )
    return tuple(_load_site(folder) for folder in folders)


def _load_site(folder: Path) -> SiteData:
    test = list_images(folder / "test") if (folder / "test").is_dir() else ()
    return SiteData(
        name=folder.name,
        train_folder=folder / "train" / GOOD,
        train=list_images(folder / "train" / GOOD),
        test=tuple(_test_image(folder, path) for path in test),
    )


def _test_image(folder: Path, path: Path) -> TestImage:
    kind, *rest = path.relative_to(folder / "test").parts
    if not rest:
        raise DatasetError(f"{path} lies directly in test; put it into test/{GOOD} or test/KIND")
    mask = folder / "ground_truth" / kind / f"{path.stem}_mask.png"
    return TestImage(path=path, kind=kind, mask=mask if mask.is_file() else None)
