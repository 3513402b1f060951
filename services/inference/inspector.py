"""From an image to its result, whichever protocol it came by: find the release, queue, score, judge, draw."""

from __future__ import annotations

import dataclasses
import functools
import time
from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray

from feddymem.image_data import EncodedImage, RawImage
from feddymem.maps import HeatScale, MapKind, Region, anomaly_map, heatmap_png, regions
from feddymem.verdicts import Judgement, judge
from services.inference import metrics
from services.inference.active import Active
from services.inference.batcher import Batcher
from services.inference.job import Scored
from services.inference.large_images import LargeImages
from services.inference.lines import Shadow
from services.inference.outcomes import counted_if_raised
from services.inference.registry import Registry
from services.runtime import tracing
from services.runtime.errors import Refusal, invalid


@dataclass(frozen=True, eq=False)
class Inspection:
    """One image to be inspected, as a protocol's adapter understood its request.

    Attributes:
        image: the image, not decoded.
        federation: name of the federation; may be empty where the service has only one.
        site: site whose line took the image; may be empty where the service has only one.
        map_kind: whether, and in what form, the anomaly map is wanted.
        threshold: anomaly score from which the verdict is anomalous; None for the calibrated one.
        pixel_threshold: distance from which pixels make up regions; None for the calibrated one.
        false_alarm_rate: that the calibrated ones are for; None for the federation's.
        regions: whether regions are wanted; they are, too, with a pixel_threshold.
        caller: who asks; callers are served in turn.
        seconds_left: until the caller stops waiting; None for as long as it takes.
        patient: whether to wait for room instead of being refused; for streams, whose senders are held back meanwhile.
    """

    image: EncodedImage | RawImage
    federation: str = ""
    site: str = ""
    map_kind: MapKind = "none"
    threshold: float | None = None
    pixel_threshold: float | None = None
    false_alarm_rate: float | None = None
    regions: bool = False
    caller: str = ""
    seconds_left: float | None = None
    patient: bool = False


@dataclass(frozen=True, eq=False)
class Result:
    """What an inspection found.

    Attributes:
        score: anomaly score, in units of the feature space.
        judgement: the verdict, and what it rests on; None where there is nothing to judge by.
        pixel_threshold: that regions are by; None where there is none.
        heat_scale: of the colours of maps.
        regions: anomalous regions, in pixels of the image, largest peak first.
        float_map: (input_size, input_size) float32; None unless asked for.
        png_map: a PNG file at the size of the image; None unless asked for.
        height: rows of the image.
        width: columns of the image.
        federation: name of the federation.
        site: as it was named, or the one that scored.
        release: version of the release that scored.
        queue_seconds: from arrival to the start of the computation, decoding included.
        compute_seconds: of the batch that the image was in.
    """

    score: float
    judgement: Judgement | None
    pixel_threshold: float | None
    heat_scale: HeatScale
    regions: tuple[Region, ...]
    float_map: NDArray[np.float32] | None
    png_map: bytes | None
    height: int
    width: int
    federation: str
    site: str
    release: int
    queue_seconds: float
    compute_seconds: float

    @property
    def anomalous(self) -> bool | None:
        """The verdict; None where there is none."""
        return None if self.judgement is None else self.judgement.anomalous


class Inspector:
    """The core that every protocol is an adapter of."""

    def __init__(self, registry: Registry, batcher: Batcher) -> None:
        self._registry, self._batcher = registry, batcher

    def admit(self, caller: str, seconds_left: float | None) -> None:
        """Refuses an image that there is no room or no time for, before it is received; counts it if so.

        Raises:
            Refusal: no room in the queue, or the caller's time is up.
        """
        with counted_if_raised():
            self._batcher.admit(caller, seconds_left)

    async def inspect(self, inspection: Inspection) -> Result:
        """Inspects one image.

        Raises:
            Refusal: unknown federation or site, a threshold or rate that makes no sense, nothing to score with, no room
                in the queue, or the caller's time is up.
            ImageError: the image cannot be decoded.
        """
        _require_sense(inspection)
        active = self._registry.find(inspection.federation, inspection.site)
        site = inspection.site or active.site
        with tracing.span("inspection", federation=active.federation, site=site, release=active.release):
            return await self._score(inspection, active)

    async def _score(self, inspection: Inspection, active: Active) -> Result:
        shadow, large_images = active.lines.shadow, self._batcher.large_images
        started = time.monotonic()
        while True:
            waited = time.monotonic() - started
            left = None if inspection.seconds_left is None else inspection.seconds_left - waited
            try:
                result = await self._batcher.inspect(
                    active,
                    inspection.image,
                    functools.partial(_result, inspection, active, large_images),
                    inspection.caller,
                    left,
                    None if shadow is None else functools.partial(_see, inspection, active, shadow, large_images),
                )
                return dataclasses.replace(result, queue_seconds=result.queue_seconds + waited)
            except Refusal as refusal:
                if not inspection.patient or refusal.status is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
            await self._batcher.room(left)


def _require_sense(inspection: Inspection) -> None:
    for name, value in (("threshold", inspection.threshold), ("pixel_threshold", inspection.pixel_threshold)):
        if value is not None and not value >= 0:
            raise invalid(f"{name} is {value}; expected a number of at least 0")
    rate = inspection.false_alarm_rate
    if rate is not None and not 0 < rate < 1:
        raise invalid(f"false_alarm_rate is {rate}; expected a number above 0 and below 1")


def _may_have_regions(threshold: float | None, scored: Scored) -> bool:
    """Whether there can be regions: smoothing never lifts the map above the largest distance."""
    return threshold is not None and float(scored.inspection.distances.max()) >= threshold


def _result(inspection: Inspection, active: Active, large_images: LargeImages, scored: Scored) -> Result:
    distances, size = scored.inspection.distances, active.scorer.extractor.feature_space.input_size
    limits = active.limits(inspection.site, inspection.false_alarm_rate)
    scale = HeatScale.of_memory(active.scorer.typical_distance) if limits is None else limits.heat_scale
    pixel_threshold = inspection.pixel_threshold
    wanted = inspection.regions or pixel_threshold is not None
    if pixel_threshold is None and limits is not None:
        pixel_threshold = limits.peaks.threshold
    found: tuple[Region, ...] = ()
    values = None
    if inspection.map_kind == "float32" or (wanted and _may_have_regions(pixel_threshold, scored)):
        values = anomaly_map(distances, (size, size))
        if wanted and pixel_threshold is not None:
            found = regions(values, pixel_threshold, (scored.height, scored.width))
    png = None
    if inspection.map_kind == "png":
        with large_images.room(scored.height * scored.width):
            png = heatmap_png(anomaly_map(distances, (scored.height, scored.width)), scale)
    score = scored.inspection.score
    judgement = judge(score, None if limits is None else limits.scores, inspection.threshold)
    metrics.of_federation(active.federation).count(
        score, active.scorer.typical_distance, None if judgement is None else judgement.anomalous
    )
    line = active.line(inspection.site)
    if line is not None:
        line.note(score)
    return Result(
        score=score,
        judgement=judgement,
        pixel_threshold=pixel_threshold,
        heat_scale=scale,
        regions=found,
        float_map=values if inspection.map_kind == "float32" else None,
        png_map=png,
        height=scored.height,
        width=scored.width,
        federation=active.federation,
        site=inspection.site or active.site,
        release=active.release,
        queue_seconds=scored.queue_seconds,
        compute_seconds=scored.compute_seconds,
    )


def _see(
    inspection: Inspection, active: Active, shadow: Shadow, large_images: LargeImages, scored: Scored | None
) -> None:
    """Has the shadow judge an image that has its result; both by their calibrations, whatever the request said."""
    line, site = active.line(inspection.site), inspection.site or active.site
    limits, scorer = None if shadow.limits is None else shadow.limits.of(site), shadow.scorer(active.site)
    if line is None or line.limits is None or limits is None or scorer is None:
        return  # there are no two verdicts to compare
    if scored is None:
        metrics.SHADOWED["dropped"].inc()
        return
    try:
        features = scored.features
        if features is None or scorer.extractor is not active.scorer.extractor:
            prepared = large_images.read(scorer.extractor, inspection.image)
            features = scorer.extractor(prepared.pixels[None])
        [seen] = scorer.inspect_features(features)
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not reach a line
        shadow.fail(error)
        return
    alarm = seen.score >= limits.scores.threshold
    shadow.count(line.site, alarm, scored.inspection.score >= line.limits.scores.threshold)
