"""Synthetic products for a first run without data: crops of scikit-image's own photographs, with lighting that
differs from site to site
and painted defects. Good for seeing the system work; no measure of detection on real parts.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage import data

SITES = {"brick-hall": (1.0, 0.0), "dim-hall": (0.8, -8.0), "bright-hall": (1.15, 12.0)}
"""Name of each site, and its lighting: gain and offset of pixel values."""

_SIDE = 224
_TRAIN, _GOOD, _DEFECT = 24, 10, 10


def write_products(root: Path, seed: int = 0) -> None:
    """Writes three sites in the MVTec AD layout under `root`: 24 normal training images, 10 good and 10 defect test
    images each.

    The product is a brick wall (512 x 512 photograph, grey); defects are scratches, blobs and patches of another
    texture.
    """
    photograph = data.brick()
    foreign = data.gravel()
    for number, (site, (gain, offset)) in enumerate(SITES.items()):
        rng = np.random.default_rng([seed, number])
        for part, count in (("train/good", _TRAIN), ("test/good", _GOOD)):
            for index in range(count):
                _write(root / site / part / f"{index:03}.png", _lit(_crop(photograph, rng), gain, offset, rng))
        for index in range(_DEFECT):
            kind, paint = _DEFECTS[index % len(_DEFECTS)]
            image, mask = paint(_crop(photograph, rng), _crop(foreign, rng), rng)
            _write(root / site / "test" / kind / f"{index:03}.png", _lit(image, gain, offset, rng))
            _write(root / site / "ground_truth" / kind / f"{index:03}_mask.png", mask)


def _crop(photograph: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    row, column = rng.integers(0, np.array(photograph.shape) - _SIDE)
    crop = photograph[row : row + _SIDE, column : column + _SIDE]
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)


def _lit(image: NDArray[np.uint8], gain: float, offset: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    noise = rng.normal(0, 2, image.shape)
    return np.clip(image * (gain * rng.uniform(0.97, 1.03)) + offset + noise, 0, 255).astype(np.uint8)


def _scratch(
    image: NDArray[np.uint8], _foreign: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    points = (np.cumsum(rng.integers(-18, 19, (6, 2)), axis=0) + rng.integers(70, 150, 2)).astype(np.int32)
    mask = np.zeros_like(image)
    cv2.polylines(mask, [points.reshape(-1, 1, 2)], False, 255, thickness=int(rng.integers(2, 5)))
    return np.where(mask > 0, np.uint8(245), image).astype(np.uint8), mask


def _stain(
    image: NDArray[np.uint8], _foreign: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    mask = _ellipse(image, rng)
    return np.where(mask > 0, image * 0.35, image).astype(np.uint8), mask


def _foreign_texture(
    image: NDArray[np.uint8], foreign: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    mask = _ellipse(image, rng)
    return np.where(mask > 0, foreign, image).astype(np.uint8), mask


def _ellipse(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    mask = np.zeros_like(image)
    row, column = (int(value) for value in rng.integers(40, _SIDE - 40, 2))
    axes = (int(rng.integers(10, 24)), int(rng.integers(8, 18)))
    cv2.ellipse(mask, (column, row), axes, float(rng.uniform(0, 180)), 0, 360, 255, thickness=-1)
    return mask


_DEFECTS = (("scratch", _scratch), ("stain", _stain), ("foreign", _foreign_texture))


def _write(path: Path, image: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image):
        raise OSError(f"{path} could not be written")
