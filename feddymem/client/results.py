"""What an inspection finds."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from feddymem.client.images import Image, as_library_image
from feddymem.maps import Region, coloured
from feddymem.v1 import inspection_pb2

_HEAT_SHARE = 0.4
_FRAME_COLOUR = (255, 255, 255)
_FRAME_SHARE = 300
"""A region's frame is as thick as the image's longer side divided by this."""


class Verdict(enum.Enum):
    """What an image is found to be."""

    NORMAL = "normal"
    ANOMALOUS = "anomalous"


@dataclass(frozen=True, eq=False)
class InspectionResult:
    """What an inspection found.

    Attributes:
        score: anomaly score, in units of the feature space; >= 0.
        verdict: what the image is found to be; None without a threshold.
        regions: anomalous regions, the one with the largest peak first; none without a pixel threshold.
        federation: federation that the image was scored for.
        site: site that it was scored for; empty if none was named or needed.
        release: version of the release that scored it.
        queue_seconds: from the arrival of the request to the start of its computation.
        compute_seconds: of the batch that the image was in.
        anomaly_map: (input size, input size) float32, read-only, distances; None unless asked for.
        heatmap_png: the anomaly map in colours at the size of the image, a PNG file; None unless asked for.
    """

    score: float
    verdict: Verdict | None
    regions: tuple[Region, ...]
    federation: str
    site: str
    release: int
    queue_seconds: float
    compute_seconds: float
    anomaly_map: NDArray[np.float32] | None = field(default=None, repr=False)
    heatmap_png: bytes | None = field(default=None, repr=False)

    @cached_property
    def heatmap(self) -> NDArray[np.uint8] | None:
        """(height, width, 3) uint8, R, G, B, on the release's fixed scale; None unless asked for."""
        # Imported here: it sets Pillow and OpenCV up, which a program that draws nothing may not want.
        from feddymem.images import decode

        return None if self.heatmap_png is None else decode(self.heatmap_png).astype(np.uint8, copy=False)

    def overlay(self, image: Image, *, full_scale: float | None = None) -> NDArray[np.uint8]:
        """The image with its heatmap laid over it and its regions framed.

        Args:
            image: the image that was inspected.
            full_scale: distance that gets the last colour, for a result with an `anomaly_map`. A heatmap has a scale.

        Returns:
            (height, width, 3) uint8, R, G, B.

        Raises:
            ValueError: the heatmap is of an image of another size, or an anomaly map lacks its scale.
            ImageError: the image cannot be decoded.
            InvalidRequestError: its file cannot be read.
        """
        from feddymem.images import read

        pixels = np.rint(read(as_library_image(image)).pixels).astype(np.uint8)
        heat = self.heatmap
        if self.anomaly_map is not None:
            heat = _heat(self.anomaly_map, full_scale, pixels.shape[:2])
        if heat is not None:
            if heat.shape != pixels.shape:
                raise ValueError(f"the heatmap is of {heat.shape[:2]} pixels, the image has {pixels.shape[:2]}")
            pixels = cv2.addWeighted(pixels, 1 - _HEAT_SHARE, heat, _HEAT_SHARE, 0).astype(np.uint8, copy=False)
        return self._framed(np.ascontiguousarray(pixels))

    def _framed(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        thickness = max(1, max(pixels.shape[:2]) // _FRAME_SHARE)
        for region in self.regions:
            last = (region.left + region.width - 1, region.top + region.height - 1)
            cv2.rectangle(pixels, (region.left, region.top), last, _FRAME_COLOUR, thickness)
        return pixels


def from_response(response: inspection_pb2.InspectResponse) -> InspectionResult:
    """The result that a response carries."""
    answer = response.map
    has_floats = answer.format == inspection_pb2.MAP_FORMAT_FLOAT32
    floats = np.frombuffer(answer.data, "<f4").reshape(answer.height, answer.width) if has_floats else None
    return InspectionResult(
        score=response.score,
        verdict=_VERDICTS.get(response.verdict),
        regions=tuple(Region(r.top, r.left, r.height, r.width, r.area, r.peak) for r in response.regions),
        federation=response.federation,
        site=response.site,
        release=response.release,
        queue_seconds=response.queue_seconds,
        compute_seconds=response.compute_seconds,
        anomaly_map=floats,
        heatmap_png=answer.data if answer.format == inspection_pb2.MAP_FORMAT_PNG else None,
    )


_VERDICTS = {
    inspection_pb2.VERDICT_NORMAL: Verdict.NORMAL,
    inspection_pb2.VERDICT_ANOMALOUS: Verdict.ANOMALOUS,
}


def _heat(distances: NDArray[np.float32], full_scale: float | None, size: tuple[int, ...]) -> NDArray[np.uint8]:
    if full_scale is None or not full_scale > 0:
        raise ValueError(
            f'full_scale is {full_scale}; an anomaly map needs the distance of the last colour (map_kind="png" has one)'
        )
    grown = cv2.resize(distances, (size[1], size[0]), interpolation=cv2.INTER_LINEAR).astype(np.float32, copy=False)
    return coloured(grown, full_scale)
