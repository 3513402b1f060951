"""What counting costs the inference service: `python -m benchmarks.metrics`."""

from __future__ import annotations

import sys
import time

import numpy as np
import prometheus_client
from numpy.typing import NDArray

from feddymem.calibration import Calibration, SiteCalibration, site_key
from feddymem.sketch import ScoreSketch
from feddymem.verdicts import ReleaseLimits, judge
from services.inference import metrics
from services.inference.lines import Lines
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


def _judge_images(scores: NDArray[np.float64]) -> None:
    """A calibrated verdict, and what is counted of the line, for each score."""
    held_out = [SiteCalibration(*[ScoreSketch.of(row)] * 2) for row in np.random.default_rng(0).normal(10, 1, (6, 60))]
    keyed = {site_key("judging", str(number)): each for number, each in enumerate(held_out)}
    lines = Lines("judging", ReleaseLimits("judging", Calibration.of(keyed, 0.05)))
    assert lines.limits is not None
    for score in map(float, scores):
        found, line = lines.limits.of("1"), lines.of("1", known=True)
        assert found is not None
        assert line is not None
        judge(score, found.scores)
        line.note(score)


def main() -> None:
    """Prints microseconds for an image, and milliseconds for a scrape of 20 federations."""
    scores = np.random.default_rng(1).normal(10, 1, _IMAGES)
    started = time.process_time()
    _judge_images(scores)
    judging = (time.process_time() - started) / _IMAGES
    started = time.process_time()
    for _ in range(_IMAGES):
        _count_image()
    image = (time.process_time() - started) / _IMAGES
    inference_pod.fill()
    prometheus_client.disable_created_metrics()
    started = time.process_time()
    for _ in range(_SCRAPES):
        prometheus_client.generate_latest()
    scrape = (time.process_time() - started) / _SCRAPES
    counting = f"{image * 1e6:.0f} us of processor time an image, {judging * 1e6:.0f} us more for verdict and drift"
    sys.stdout.write(f"{counting}, {scrape * 1e3:.1f} ms a scrape\n")


if __name__ == "__main__":
    main()
