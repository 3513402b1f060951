"""What the inference service counts; docs/metrics.md explains each.

Every series is paid for by each pod, and a federation's by each federation: a test counts them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5)
_LEAST_DISTANCE = 1e-6
"""As for heatmaps: without spread, any distance is large."""

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
    buckets=(1.2, 1.4, 1.6, 1.8, 2.2),
)
VERDICTS = Counter("feddymem_verdicts_total", "Verdicts: normal or anomalous.", ["federation", "verdict"])
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
