"""What an inspection finds."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from feddymem.client.images import Image, as_library_image
from feddymem.maps import HeatScale, Region, coloured
from feddymem.v1 import inspection_pb2

OptionalField = Literal["threshold", "p_value", "normalised_score", "pixel_threshold"]
"""A number of a response that may not be set."""
_HEAT_SHARE = 0.4
_FRAME_COLOUR = (255, 255, 255)
_FRAME_SHARE = 300
"""A region's frame is as thick as the image's longer side divided by this."""


class Verdict(enum.Enum):
    """What an image is found to be."""

    NORMAL = "normal"
    ANOMALOUS = "anomalous"


@dataclass(frozen=True)
class Guarantee:
    """What is known of the false alarms of a calibrated threshold.

    Attributes:
        false_alarm_rate: share of normal images that are called anomalous at most, if they are like those held out;
            above the rate wanted where too few were held out for it.
        images: held-out images that it rests on.
        own_site: whether they are the site's own; else those of all sites are among them.
    """

    false_alarm_rate: float
    images: int
    own_site: bool


@dataclass(frozen=True, eq=False)
class InspectionResult:
    """What an inspection found.

    Attributes:
        score: anomaly score, in units of the feature space; >= 0.
        verdict: what the image is found to be; None where there is no threshold: neither wished nor calibrated.
        regions: anomalous regions, the one with the largest peak first; none unless wished.
        federation: federation that the image was scored for.
        site: site that it was scored for; empty if none was named or needed.
        release: version of the release that scored it.
        queue_seconds: from the arrival of the request to the start of its computation.
        compute_seconds: of the batch that the image was in.
        threshold: score that the verdict is by; None where there is none.
        p_value: share of normal images whose score is at least as high, this one among them: at most the false-alarm
            rate where the verdict is anomalous. None without a calibration.
        normalised_score: the score from 0, as the usual normal image, over 0.5, the threshold, to 1; None without a
            calibration.
        guarantee: what is known of the threshold; None without a calibration, or for a threshold that was wished.
        pixel_threshold: distance that regions are by; None where there is none.
        scale: of the colours of maps of the release; None from a service that does not tell.
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
    threshold: float | None = None
    p_value: float | None = None
    normalised_score: float | None = None
    guarantee: Guarantee | None = None
    pixel_threshold: float | None = None
    scale: HeatScale | None = field(default=None, repr=False)
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
            full_scale: distance that gets the last colour, for a result with an `anomaly_map`; the first one is for 0.
                Without it, the scale is the release's, as a heatmap's is.

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
            scale = self.scale if full_scale is None else _up_to(full_scale)
            heat = _heat(self.anomaly_map, scale, pixels.shape[:2])
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
        threshold=_optional(response, "threshold"),
        p_value=_optional(response, "p_value"),
        normalised_score=_optional(response, "normalised_score"),
        guarantee=_guarantee(response),
        pixel_threshold=_optional(response, "pixel_threshold"),
        scale=HeatScale(answer.first_colour, answer.last_colour) if answer.last_colour > answer.first_colour else None,
        anomaly_map=floats,
        heatmap_png=answer.data if answer.format == inspection_pb2.MAP_FORMAT_PNG else None,
    )


_VERDICTS = {
    inspection_pb2.VERDICT_NORMAL: Verdict.NORMAL,
    inspection_pb2.VERDICT_ANOMALOUS: Verdict.ANOMALOUS,
}


def _optional(response: inspection_pb2.InspectResponse, name: OptionalField) -> float | None:
    return getattr(response, name) if response.HasField(name) else None


def _guarantee(response: inspection_pb2.InspectResponse) -> Guarantee | None:
    if not response.HasField("guarantee"):
        return None
    known = response.guarantee
    return Guarantee(known.false_alarm_rate, known.images, known.own_site)


def _up_to(full_scale: float) -> HeatScale:
    if not full_scale > 0:
        raise ValueError(f"full_scale is {full_scale}; expected a distance above 0")
    return HeatScale(0.0, full_scale)


def _heat(distances: NDArray[np.float32], scale: HeatScale | None, size: tuple[int, ...]) -> NDArray[np.uint8]:
    if scale is None:
        raise ValueError(
            "full_scale is None, and the service tells no scale; give the distance of the last colour, or wish for "
            'map_kind="png"'
        )
    grown = cv2.resize(distances, (size[1], size[0]), interpolation=cv2.INTER_LINEAR).astype(np.float32, copy=False)
    return coloured(grown, scale)
