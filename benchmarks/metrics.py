"""What counting costs the inference service: `python -m benchmarks.metrics`."""

from __future__ import annotations

import sys
import time

import prometheus_client

from services.inference import metrics
from services.inference.outcomes import counted
from services.runtime import rpc
from tests.monitoring import inference_pod

_IMAGES = 20_000
_SCRAPES = 20


def _count_image() -> None:
    """All that is counted of one image that comes alone and by an RPC of its own."""
    method = "/feddymem.v1.InspectionService/Inspect"
    rpc._started(method).inc()
    with counted() as ending:
        metrics.WAITING.set(1)
        with metrics.ENCODE_SECONDS.time():
            metrics.of_federation("federation-1").count(1.5, 1.0, anomalous=False)
        for histogram in (metrics.DURATION, metrics.QUEUE_SECONDS, metrics.DECODE_SECONDS, metrics.COMPUTE_SECONDS):
            histogram.observe(0.01)
        metrics.BATCH_IMAGES.observe(1)
        metrics.WAITING.set(0)
        ending.anomalous = False
    rpc._handled(method, "OK").inc()
    rpc._seconds(method).observe(0.01)


def main() -> None:
    """Prints microseconds for an image, and milliseconds for a scrape of 20 federations."""
    inference_pod.fill()
    started = time.process_time()
    for _ in range(_IMAGES):
        _count_image()
    image = (time.process_time() - started) / _IMAGES
    prometheus_client.disable_created_metrics()
    started = time.process_time()
    for _ in range(_SCRAPES):
        prometheus_client.generate_latest()
    scrape = (time.process_time() - started) / _SCRAPES
    sys.stdout.write(f"{image * 1e6:.0f} us of processor time an image, {scrape * 1e3:.1f} ms a scrape\n")


if __name__ == "__main__":
    main()
