"""Normal images that are held out of a site's bank, to see how a release scores what it has not learned (ours)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from feddymem.calibration import SiteCalibration
from feddymem.maps import anomaly_map
from feddymem.patches import PatchSource
from feddymem.progress import Progress, no_progress
from feddymem.scoring import Inspection, Scorer
from feddymem.sketch import ScoreSketch

LEAST, MOST = 5, 1_000
"""Images that a site holds out, at least and at most: 1,000 tell a rate of 5 % to within 1.4 points."""

RUN = 6
"""Images that came one after another and are on one side, if possible."""

_ROUNDING = 1e-9
"""Of images: a share that is a whole number of them is not rounded up."""
_EVENLY = (5**0.5 - 1) / 2
"""Multiples of the golden ratio, without what is before the point, are spread evenly however many they are (Weyl)."""


def held_out(arrivals: Mapping[str, int], share: float, seed: int) -> frozenset[str]:
    """Which of a site's images are held out.

    What came one after another is alike, and sites that see the same parts see them in about the same order. So whole
    runs are chosen, evenly spread, and by all sites the same: what is nearly what one holds out is then less often in
    its own bank or another's. Most images stay on their side when others come. One that was in a bank and is held out
    later scores a little too well; of 60 images that become 90 it is one, six at most.

    Args:
        arrivals: number of each image, by SHA-256 of its file in hex, in the order in which they came, from 0.
        share: of the images to hold out, rounded up, 0 to 0.5; 0 for none at all.
        seed: varies the choice.

    Returns:
        Those held out: the share of the images; at least LEAST of them where that leaves as many for the bank, else
        half; MOST at most.
    """
    if share == 0:
        return frozenset()
    count = min(max(math.ceil(share * len(arrivals) - _ROUNDING), LEAST), len(arrivals) // 2, MOST)
    rng = np.random.default_rng(seed)
    first, shift = rng.integers(RUN), rng.random()

    def place(image: str) -> tuple[float, int]:
        number = arrivals[image]
        return ((number + first) // RUN * _EVENLY + shift) % 1, number

    return frozenset(sorted(arrivals, key=place)[:count])


def calibrate(scorer: Scorer, images: PatchSource | None, progress: Progress = no_progress) -> SiteCalibration:
    """How a release scores a site's held-out images; None for none.

    The same code as in the inference service, on the same patch features but for the float16 that they are kept in.
    """
    if images is None:
        return SiteCalibration()
    found = scores_and_peaks(scorer, images, progress)
    return SiteCalibration(ScoreSketch.of(score for score, _ in found), ScoreSketch.of(peak for _, peak in found))


def scores_and_peaks(
    scorer: Scorer, images: PatchSource, progress: Progress = no_progress
) -> list[tuple[float, float]]:
    """Each image's score, and the largest value of its anomaly map at the input size."""
    side = scorer.extractor.feature_space.input_size
    found: list[tuple[float, float]] = []
    for block in images.blocks():
        inspections: list[Inspection] = scorer.inspect_features(block.to(scorer.extractor.device))
        found += [(each.score, float(anomaly_map(each.distances, (side, side)).max())) for each in inspections]
        progress("calibration", len(found), images.images)
    return found
