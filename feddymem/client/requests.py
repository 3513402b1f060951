"""What both clients, with and without asyncio, ask for."""

from __future__ import annotations

from typing import TypedDict

from feddymem.client.feedback import OPINIONS, Opinion
from feddymem.client.images import Image, as_file, as_library_image
from feddymem.image_data import EncodedImage, RawImage
from feddymem.maps import MapKind
from feddymem.v1.inspection_pb2 import (
    MAP_FORMAT_FLOAT32,
    MAP_FORMAT_PNG,
    MAP_FORMAT_UNSPECIFIED,
    InspectRequest,
    MapFormat,
    ReportFeedbackRequest,
)

_MAP_FORMATS: dict[MapKind, MapFormat.ValueType] = {
    "none": MAP_FORMAT_UNSPECIFIED,
    "float32": MAP_FORMAT_FLOAT32,
    "png": MAP_FORMAT_PNG,
}


class Wishes(TypedDict, total=False):
    """What may be wished for an inspection; everything can be left out.

    Attributes:
        map_kind: whether and how the anomaly map is wanted: "float32" for distances, "png" for colours, "none"
            without it.
        threshold: anomaly score from which the verdict is anomalous; without it, the one that the release's calibration
            gives for the site and the false-alarm rate.
        pixel_threshold: distance from which pixels make up regions; without it, the calibrated one.
        false_alarm_rate: share of normal images that may be called anomalous, above 0 and below 1; without it, the
            federation's.
        regions: whether regions are wanted; they are, too, with a `pixel_threshold`.
        timeout_seconds: longest wait for the result, all attempts together; without it, the client's.
    """

    map_kind: MapKind
    threshold: float | None
    pixel_threshold: float | None
    false_alarm_rate: float | None
    regions: bool
    timeout_seconds: float


class ClientSettings:
    """What a client is set to: whose images it sends, how many at once, and how long it waits for each.

    Raises:
        ValueError: a number that makes no sense.
    """

    def __init__(self, federation: str, site: str, timeout_seconds: float, window: int) -> None:
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds is {timeout_seconds}; expected a number above 0")
        if window < 1:
            raise ValueError(f"window is {window}; expected at least 1")
        self.window = window
        self._federation, self._site, self._timeout = federation, site, timeout_seconds

    def request(self, image: Image, wishes: Wishes) -> InspectRequest:
        """The request for an image.

        Raises:
            InvalidRequestError: a file cannot be read, or pixels have no meaning as an image.
            ValueError: no such kind of map.
            TypeError: not an image at all, or a wish that there is not.
        """
        unknown = sorted(wishes.keys() - Wishes.__annotations__.keys())
        if unknown:
            raise TypeError(
                f"nobody can wish for {', '.join(unknown)}; expected some of {', '.join(Wishes.__annotations__)}"
            )
        kind = wishes.get("map_kind", "none")
        if kind not in _MAP_FORMATS:
            raise ValueError(f"map_kind is {kind!r}; expected one of {', '.join(_MAP_FORMATS)}")
        request = InspectRequest(
            federation=self._federation,
            site=self._site,
            map_format=_MAP_FORMATS[kind],
            threshold=wishes.get("threshold"),
            pixel_threshold=wishes.get("pixel_threshold"),
            false_alarm_rate=wishes.get("false_alarm_rate"),
            regions=wishes.get("regions", False),
        )
        _fill(request, as_library_image(image))
        return request

    def feedback(self, image: Image, opinion: Opinion, note: str) -> ReportFeedbackRequest:
        """The request that reports what somebody says of an image.

        Raises:
            InvalidRequestError: a file cannot be read, or pixels have no meaning as an image.
            TypeError: not an image at all.
        """
        return ReportFeedbackRequest(
            federation=self._federation,
            site=self._site,
            encoded=as_file(image),
            opinion=OPINIONS[opinion],
            note=note,
        )

    def timeout(self, wishes: Wishes) -> float:
        """Longest wait for the result, in seconds."""
        return wishes.get("timeout_seconds", self._timeout)


def _fill(request: InspectRequest, image: EncodedImage | RawImage) -> None:
    """Field by field: a message that is made apart and put in is copied with its pixels."""
    if isinstance(image, EncodedImage):
        request.encoded = image.data
        return
    request.raw.height, request.raw.width = image.height, image.width
    request.raw.channels, request.raw.bits = image.channels, image.bits
    request.raw.data = bytes(image.data)
