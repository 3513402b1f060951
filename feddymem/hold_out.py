"""Normal images that are held out of a site's bank, to see how a release scores what it has not learned (ours)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from feddymem.calibration import SiteCalibration
from feddymem.maps import anomaly_map
from feddymem.memory_reduce import Progress, no_progress
from feddymem.patches import PatchSource
from feddymem.scoring import Inspection, Scorer
from feddymem.sketch import ScoreSketch

LEAST, MOST = 5, 1_000
"""Images that a site holds out, at least and at most: 1,000 tell a rate of 5 % to within 1.4 points."""


def held_out(images: Sequence[str], share: float, seed: int) -> frozenset[str]:
    """Which of a site's images are held out.

    Chosen by content, so that an image stays where it is when others come: one that a bank was made of is never held
    out later, as long as none is taken away. Equal images are on one side.

    Args:
        images: SHA-256 of each image file, in hex.
        share: of the images to hold out, 0 to 0.5; 0 for none at all.
        seed: varies the choice.

    Returns:
        Those held out: about the share of the images; at least LEAST of them where that leaves as many for the bank,
        else half; MOST at most.
    """
    if share == 0:
        return frozenset()
    drawn = sorted((_drawn(image, seed), image) for image in set(images))
    below = sum(number < share for number, _ in drawn)
    count = min(max(below, LEAST), len(drawn) // 2, MOST)
    return frozenset(image for _, image in drawn[:count])


def calibrate(scorer: Scorer, images: PatchSource | None, progress: Progress = no_progress) -> SiteCalibration:
    """How a release scores a site's held-out images; None for none.

    The same code as in the inference service, on the same patch features.
    """
    if images is None:
        return SiteCalibration()
    side = scorer.extractor.feature_space.input_size
    found: list[tuple[float, float]] = []
    for block in images.blocks():
        inspections: list[Inspection] = scorer.inspect_features(block.to(scorer.extractor.device))
        found += [(each.score, float(anomaly_map(each.distances, (side, side)).max())) for each in inspections]
        progress("calibration", len(found), images.images)
    return SiteCalibration(ScoreSketch.of(score for score, _ in found), ScoreSketch.of(peak for _, peak in found))


def _drawn(image: str, seed: int) -> float:
    """A number in 0..1 that depends on the image's content only."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{image}".encode()).digest()[:8]) / 2**64
