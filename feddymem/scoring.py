"""Scoring: an image's distance to the global memory, as one score and as an anomaly map.

The one code path that library, edge client and inference service share; a parity test holds them to the same numbers.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from feddymem.backbone import FeatureExtractor
from feddymem.generator import MemoryGenerator
from feddymem.memory import MemoryBank
from feddymem.search import NearestItems

_TOP_PATCHES = 5
"""The image score is the mean of this many largest patch distances (ours): one patch alone is noisy."""
_EVIDENCE_SHARE = 0.3
"""How badly an origin explains an image is told by this share of the patches, those farthest from its items (ours)."""
_ALLOWANCE = 1.5
"""An origin may be worse than the best by this much of what all origins together gain over the best (ours)."""
_PRICE = 8.0
"""An origin that is worse still is farther by this much of the excess (ours)."""
_BLUR_SIGMA_PATCHES = 0.75
"""Gaussian smoothing of the anomaly map, in patches (ours, docs/method.md)."""
_FULL_SCALE = 4.0
"""A heatmap's upper end, in typical distances of normal patches."""
_PALETTE = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_TURBO)[:, 0, ::-1].tobytes()
"""R, G, B of each of a heatmap's 256 levels."""


@dataclass(frozen=True, eq=False)
class Inspection:
    """Result for one image.

    Attributes:
        score: mean of the largest patch distances, in units of the feature space; >= 0.
        distances: (grid, grid) float32, distance of each patch to the memory, see `of_one_origin`.
    """

    score: float
    distances: NDArray[np.float32]


@dataclass(frozen=True)
class Region:
    """Connected anomalous pixels.

    Attributes:
        top: first row.
        left: first column.
        height: rows.
        width: columns.
        area: pixels of the region itself.
        peak: largest distance in it, in units of the feature space.
    """

    top: int
    left: int
    height: int
    width: int
    area: int
    peak: float


class Scorer:
    """Scores patch features against a global memory, through a site's memory generator if there is one."""

    def __init__(self, extractor: FeatureExtractor, memory: MemoryBank, generator: MemoryGenerator | None) -> None:
        if memory.channels != extractor.feature_space.channels:
            raise ValueError(
                f"the memory's items have {memory.channels} channels, "
                f"the feature space has {extractor.feature_space.channels}"
            )
        self.extractor = extractor
        self.typical_distance = memory.typical_distance
        self._nearest = NearestItems(
            torch.from_numpy(memory.items).to(extractor.device), torch.from_numpy(memory.weights > 0)
        )
        self._generator = None if generator is None else generator.to(extractor.device)

    def inspect(self, images: Tensor) -> list[Inspection]:
        """Scores prepared images: (n, 3, input_size, input_size) float32, from `FeatureExtractor.prepare`."""
        return self.inspect_features(self.extractor(images))

    @torch.inference_mode()
    def inspect_features(self, features: Tensor) -> list[Inspection]:
        """Scores patch features: (n, grid * grid, channels) float32."""
        mapped = features if self._generator is None else self._generator(features)
        squared = self._nearest(mapped.flatten(0, 1)).view(-1, *mapped.shape[:2])
        distances = of_one_origin(squared).sqrt()
        scores = distances.topk(min(_TOP_PATCHES, distances.shape[1]), dim=1).values.mean(1)
        grid = self.extractor.feature_space.grid
        grids = distances.view(-1, grid, grid).cpu().numpy()
        return [Inspection(score=score, distances=grid) for score, grid in zip(scores.tolist(), grids, strict=True)]


def of_one_origin(squared: Tensor) -> Tensor:
    """Distances of images that each come from one site, whichever it is (ours).

    With `d_o` the distance of a patch to the nearest item of origin `o`, `E_o` the mean of an image's largest 30 % of
    `d_o²`, `E` the least of them and `U` the same mean of `min_o d_o²`, an origin has the price
    `8 max(0, E_o - E - 1.5 (E - U))`, and a patch the squared distance `min_o (d_o² + price_o)`. So an item of another
    site does not hide a defect in an image that is nothing like that site's; and where sites are alike, so that an
    image needs several of them (`E - U` is large), all their items count.

    Args:
        squared: (origins, images, patches) float32, d_o².

    Returns:
        (images, patches) float32.
    """
    evidence = _evidence(squared)
    best, together = evidence.amin(0), _evidence(squared.amin(0))
    price = _PRICE * (evidence - best - _ALLOWANCE * (best - together)).clamp_min(0)
    return (squared + price[:, :, None]).amin(0)


def _evidence(squared: Tensor) -> Tensor:
    count = math.ceil(_EVIDENCE_SHARE * squared.shape[-1])
    return squared.topk(count, dim=-1).values.mean(-1)


def anomaly_map(distances: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Patch distances as a smooth map of pixels.

    Args:
        distances: (grid, grid) float32.
        size: height and width wanted, in pixels.

    Returns:
        (height, width) float32, in units of the feature space.
    """
    blurred = cv2.GaussianBlur(distances, (0, 0), _BLUR_SIGMA_PATCHES, borderType=cv2.BORDER_REPLICATE)
    grown = functional.interpolate(torch.from_numpy(blurred)[None, None], size, mode="bilinear", align_corners=False)
    return np.asarray(grown[0, 0].numpy(), dtype=np.float32)


def regions(pixels: NDArray[np.float32], threshold: float, size: tuple[int, int]) -> tuple[Region, ...]:
    """Connected areas of an anomaly map that reach a threshold; pixels touch at their sides and corners.

    Args:
        pixels: (rows, columns) float32, from `anomaly_map`.
        threshold: distance from which a pixel is anomalous.
        size: height and width of the image that the map is of; regions are in its pixels.

    Returns:
        The regions, the one with the largest peak first.
    """
    count, labels, boxes, _ = cv2.connectedComponentsWithStats((pixels >= threshold).astype(np.uint8))
    down, across = size[0] / pixels.shape[0], size[1] / pixels.shape[1]
    found = []
    for number in range(1, count):  # 0 is what reaches no threshold
        left, top, width, height, area = (int(value) for value in boxes[number])
        inside = (slice(top, top + height), slice(left, left + width))
        # In integers: what is rounded up must not be what a fraction was rounded to.
        rows = top * size[0] // pixels.shape[0], -(-(top + height) * size[0] // pixels.shape[0])
        columns = left * size[1] // pixels.shape[1], -(-(left + width) * size[1] // pixels.shape[1])
        peak = float(pixels[inside][labels[inside] == number].max())
        found.append(
            Region(rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0], round(area * down * across), peak)
        )
    return tuple(sorted(found, key=lambda region: -region.peak))


def heatmap_png(pixels: NDArray[np.float32], typical_distance: float) -> bytes:
    """An anomaly map in colours, on a scale that is fixed by the memory and not stretched to the image.

    Args:
        pixels: (height, width) float32, from `anomaly_map`.
        typical_distance: `MemoryBank.typical_distance` of the memory.

    Returns:
        A PNG file of 256 colours, as large as the map.
    """
    full_scale = _FULL_SCALE * max(typical_distance, 1e-6)  # without spread, any distance is hot
    levels = (np.clip(pixels, 0, full_scale) * np.float32(255 / full_scale)).astype(np.uint8)
    image = Image.fromarray(levels)
    image.putpalette(_PALETTE)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
