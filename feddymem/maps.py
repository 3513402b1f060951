"""Anomaly maps: of patch distances, and as they are handed out, in distances, colours or regions.

Without torch, for the client's sake.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

MapKind = Literal["none", "float32", "png"]
"""Whether and how an anomaly map is wanted: not at all, as distances, or in colours."""

_BLUR_SIGMA_PATCHES = 0.75
"""Gaussian smoothing of the anomaly map, in patches (ours, docs/method.md)."""
_FULL_SCALE = 4.0
"""A heatmap's upper end, in typical distances of normal patches."""
_COLOURS = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_TURBO)[:, 0, ::-1].astype(np.uint8)
"""R, G, B of each of a heatmap's 256 levels."""
_BAND_PIXELS = 2**20
"""Of a heatmap, compressed at once."""
_UP = 2
"""PNG's filter of a line, which stands before it: what is stored is the difference to the line above, which of a smooth
map takes two thirds of the room."""


@dataclass(frozen=True)
class HeatScale:
    """What colours stand for: fixed before there is a map, and never stretched to one.

    Attributes:
        first: distance up to which the first colour stands.
        last: distance from which the last one stands; above `first`.
    """

    first: float
    last: float

    @staticmethod
    def of_memory(typical_distance: float) -> HeatScale:
        """The scale of a release without a calibration.

        Args:
            typical_distance: `MemoryBank.typical_distance` of its memory.
        """
        return HeatScale(0.0, _FULL_SCALE * max(typical_distance, 1e-6))  # without spread, any distance is hot


@dataclass(frozen=True)
class Region:
    """Connected anomalous pixels, in pixels of the image as it was sent.

    Attributes:
        top: first row.
        left: first column.
        height: rows.
        width: columns.
        area: pixels of the region itself, at most height * width.
        peak: largest distance in it, in units of the feature space.
    """

    top: int
    left: int
    height: int
    width: int
    area: int
    peak: float


def anomaly_map(distances: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Patch distances as a smooth map of pixels.

    Args:
        distances: (grid, grid) float32.
        size: height and width wanted, in pixels.

    Returns:
        (height, width) float32, in units of the feature space.
    """
    blurred = cv2.GaussianBlur(distances, (0, 0), _BLUR_SIGMA_PATCHES, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(cv2.resize(blurred, size[::-1], interpolation=cv2.INTER_LINEAR), dtype=np.float32)


def regions(pixels: NDArray[np.float32], threshold: float, size: tuple[int, int]) -> tuple[Region, ...]:
    """Connected areas of an anomaly map that reach a threshold; pixels touch at their sides and corners.

    Args:
        pixels: (rows, columns) float32, from `anomaly_map`.
        threshold: distance from which a pixel is anomalous.
        size: height and width of the image that the map is of; regions are in its pixels.

    Returns:
        The regions, the one with the largest peak first.
    """
    anomalous = pixels >= threshold
    if not anomalous.any():
        return ()
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(anomalous.astype(np.uint8))
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


def coloured(distances: NDArray[np.float32], scale: HeatScale) -> NDArray[np.uint8]:
    """An anomaly map in colours.

    Args:
        distances: (height, width) float32.
        scale: of the colours.

    Returns:
        (height, width, 3) uint8, R, G, B.
    """
    return _COLOURS[_levels(distances, scale)]


def heatmap_png(distances: NDArray[np.float32], scale: HeatScale) -> bytes:
    """An anomaly map in colours.

    Args:
        distances: (height, width) float32, from `anomaly_map`.
        scale: of the colours.

    Returns:
        A PNG file of 256 colours, as large as the map.
    """
    height, width = distances.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits, a palette, nothing special
    pixels = _deflated(distances, scale)
    chunks = ((b"IHDR", header), (b"PLTE", _COLOURS.tobytes()), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _levels(distances: NDArray[np.float32], scale: HeatScale) -> NDArray[np.uint8]:
    above = np.clip(distances, scale.first, scale.last) - np.float32(scale.first)
    return (above * np.float32(255 / (scale.last - scale.first))).astype(np.uint8)


def _deflated(distances: NDArray[np.float32], scale: HeatScale) -> bytes:
    """A PNG's pixels, 8-bit indices into the colours: by ISA-L's deflate, in a third of the time that Pillow takes, and
    band by band, as what is made of a large map on the way would be several times as large as the map."""
    height, width = distances.shape
    deflate = isal_zlib.compressobj(level=1)
    rows = max(1, _BAND_PIXELS // width)
    above, parts = np.zeros((1, width), np.uint8), []
    for first in range(0, height, rows):
        levels = np.concatenate((above, _levels(distances[first : first + rows], scale)))
        lines = np.full((len(levels) - 1, 1 + width), _UP, np.uint8)
        np.subtract(levels[1:], levels[:-1], out=lines[:, 1:])
        parts.append(deflate.compress(lines))
        above = levels[-1:]
    return b"".join((*parts, deflate.flush()))
