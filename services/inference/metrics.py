"""What the inference service counts; docs/metrics.md explains each.

Every series is paid for by each pod, and a federation's by each federation: a test counts them.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5)
_LEAST_DISTANCE = 1e-6
"""As for heatmaps: without spread, any distance is large."""
NAMED_LINES = 30
"""Pairs of federation and site that have series of their own, and are watched for drift; the first that send images."""
NAMED_SHADOWS = 5
"""Federations with a release in the shadow that have series of their own, the first that have one."""

INSPECTIONS = Counter(
    "feddymem_inspections_total",
    "Inspections, by outcome: ok, anomalous, rejected, invalid, cancelled or failed.",
    ["outcome"],
)
ENDED = {
    outcome: INSPECTIONS.labels(outcome)
    for outcome in ("ok", "anomalous", "rejected", "invalid", "cancelled", "failed")
}
"""Of each outcome; so all are there from the start, and the first that fails is an increase."""

DURATION = Histogram(
    "feddymem_inspection_duration_seconds",
    "Time from an image's acceptance to its result, of inspections that had one.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
)
QUEUE_SECONDS = Histogram(
    "feddymem_inspection_queue_seconds",
    "Time that an accepted image waits: to be decoded, and then to be computed.",
    buckets=_SECONDS,
)
DECODE_SECONDS = Histogram("feddymem_inspection_decode_seconds", "Time to decode an image.", buckets=_SECONDS[:-2])
COMPUTE_SECONDS = Histogram("feddymem_inspection_compute_seconds", "Time to compute a batch.", buckets=_SECONDS)
ENCODE_SECONDS = Histogram(
    "feddymem_inspection_encode_seconds",
    "Time to make an image's result of its distances: verdict, regions, map.",
    buckets=_SECONDS[:-2],
)
BATCH_IMAGES = Histogram("feddymem_inspection_batch_images", "Images of a batch.", buckets=(1, 4, 16, 64))
WAITING = Gauge("feddymem_inspections_waiting", "Inspections accepted and not yet answered.")
QUEUE_IMAGES = Gauge("feddymem_inspection_queue_images", "Images in the queue, not yet being decoded.")
QUEUE_LIMIT = Gauge("feddymem_inspection_queue_limit_images", "Images that the queue has room for.")
SCORE = Histogram(
    "feddymem_inspection_score_ratio",
    "Anomaly scores, each divided by the typical distance of its release.",
    ["federation"],
    buckets=(1.5, 2.0),
)
VERDICTS = Counter("feddymem_verdicts_total", "Verdicts: normal or anomalous.", ["federation", "verdict"])
HIGHEST_RATE = Gauge(
    "feddymem_alarm_rate_highest_ratio",
    "Share of 100 normal images that may be called anomalous by chance, by the release's calibration.",
    ["federation"],
)
DRIFT = Gauge(
    "feddymem_drift", "1 while a site's images are scored unlike those held out, else 0.", ["federation", "site"]
)
SHADOW_VERDICTS = Counter(
    "feddymem_shadow_verdicts_total",
    "Images that a release in the shadow has judged: same, shadow_only or active_only are anomalous.",
    ["federation", "agreement"],
)
SHADOW_IMAGES = Counter(
    "feddymem_shadow_images_total",
    "Images of lines with a shadow: judged by it, dropped because others waited, or failed.",
    ["outcome"],
)
SHADOWED = {outcome: SHADOW_IMAGES.labels(outcome) for outcome in ("judged", "dropped", "failed")}
FEEDBACK = Counter("feddymem_feedback_reports_total", "Feedback that an edge client has kept, by opinion.", ["opinion"])
RELEASE = Gauge("feddymem_serving_release_version", "Version of the release that scores.", ["federation"])
RELEASE_CREATED = Gauge(
    "feddymem_serving_release_timestamp_seconds", "When the release that scores was made.", ["federation"]
)
SWAPS = Counter("feddymem_release_swaps_total", "Releases swapped in.")


@dataclass(frozen=True, eq=False)
class OfFederation:
    """What is counted of one federation's inspections."""

    score: Histogram
    normal: Counter
    anomalous: Counter

    def count(self, score: float, typical_distance: float, anomalous: bool | None) -> None:
        """Counts one result.

        Args:
            score: anomaly score.
            typical_distance: of the release's global memory.
            anomalous: the verdict; None for none.
        """
        self.score.observe(score / max(typical_distance, _LEAST_DISTANCE))
        if anomalous is not None:
            (self.anomalous if anomalous else self.normal).inc()


@functools.cache
def of_federation(name: str) -> OfFederation:
    """Counters of a federation; there are as many as the aggregator's settings have."""
    return OfFederation(SCORE.labels(name), VERDICTS.labels(name, "normal"), VERDICTS.labels(name, "anomalous"))


def forget_highest_rate(federation: str) -> None:
    """A release takes the place of another one, which may have had a calibration."""
    if (federation,) in HIGHEST_RATE._metrics:
        HIGHEST_RATE.remove(federation)


@dataclass(frozen=True, eq=False)
class OfLine:
    """What is shown of one site's images."""

    drift: Gauge


_lines: dict[tuple[str, str], OfLine] = {}
_shadows: set[str] = set()
_naming = threading.Lock()


def of_line(federation: str, site: str) -> OfLine | None:
    """Metrics of a site's images; None where as many have some as may: names come from requests."""
    with _naming:
        if (federation, site) not in _lines and len(_lines) < NAMED_LINES:
            _lines[federation, site] = OfLine(DRIFT.labels(federation, site))
        return _lines.get((federation, site))


def of_shadow(federation: str, agreement: str) -> Counter:
    """Images that a federation's release in the shadow has judged; beyond NAMED_SHADOWS, federations share a name."""
    with _naming:
        if len(_shadows) < NAMED_SHADOWS:
            _shadows.add(federation)
        return SHADOW_VERDICTS.labels(federation if federation in _shadows else "", agreement)
