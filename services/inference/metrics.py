"""What the inference service counts; docs/metrics.md explains each."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

INSPECTIONS = Counter(
    "feddymem_inspections_total", "Inspections, by outcome: ok, invalid, rejected, cancelled or failed.", ["outcome"]
)
QUEUE_SECONDS = Histogram(
    "feddymem_inspection_queue_seconds",
    "Time from an image's arrival to its computation, decoding included.",
    buckets=_SECONDS,
)
COMPUTE_SECONDS = Histogram("feddymem_inspection_compute_seconds", "Time to compute a batch.", buckets=_SECONDS)
BATCH_IMAGES = Histogram("feddymem_inspection_batch_images", "Images of a batch.", buckets=(1, 2, 4, 8, 16, 32, 64))
WAITING = Gauge("feddymem_inspections_waiting", "Inspections accepted and not yet answered.")
RELEASE = Gauge("feddymem_serving_release_version", "Version of the release that scores.", ["federation"])
SWAPS = Counter("feddymem_release_swaps_total", "Releases swapped in.", ["federation"])
