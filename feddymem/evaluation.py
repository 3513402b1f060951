"""How well scores and anomaly maps separate good from defect: the figures that a report shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

AUPRO_LIMIT = 0.3
"""False positive rate that the per-region overlap is integrated to, as in MVTec AD's own evaluation."""
LEVELS = 2**18
"""Levels that anomalies are counted at, evenly from the least to the greatest of all maps."""


@dataclass(frozen=True)
class Detection:
    """Detection quality on one site's test images; each figure in 0..1, higher is better.

    Attributes:
        image_auroc: area under the ROC curve of the image scores.
        image_ap: average precision of the image scores.
        image_f1_max: F1 of the image scores at the best threshold.
        pixel_auroc: area under the ROC curve of all pixels of all maps.
        aupro: overlap with a defect region, mean over the regions (8-connected), integrated over the false positive
            rate of the normal pixels from 0 to 0.3, divided by 0.3.

    The image figures are NaN where there are only good or only defect images, the pixel figures where there is no
    defect pixel or no normal one.
    """

    image_auroc: float
    image_ap: float
    image_f1_max: float
    pixel_auroc: float
    aupro: float


@dataclass(frozen=True)
class Alarms:
    """What the verdicts on one site's test images come to.

    Attributes:
        false_alarm_rate: share of the good images that were called anomalous; NaN where there are none.
        detection_rate: share of the defect images that were called anomalous; NaN where there are none.
    """

    false_alarm_rate: float
    detection_rate: float


def alarms(labels: NDArray[np.bool_], anomalous: NDArray[np.bool_]) -> Alarms:
    """Shares of verdicts.

    Args:
        labels: (n,) True for defect.
        anomalous: (n,) True for what was called anomalous.
    """
    return Alarms(
        *(float(called.mean()) if len(called) else math.nan for called in (anomalous[~labels], anomalous[labels]))
    )


def detect(
    labels: NDArray[np.bool_],
    scores: NDArray[np.floating],
    masks: Sequence[NDArray[np.bool_] | None],
    maps: Sequence[NDArray[np.float32]],
) -> Detection:
    """All figures of one site's test images.

    Pixels are counted in histograms, so that beside the maps no memory grows with the images: two anomalies closer than
    1 / 262,144 of the range of all maps may count as equal. That moves the pixel AUROC by at most the share of
    (normal, defect) pairs so close, and AUPRO by at most that of (normal, region) pairs, mean over regions, divided
    by 0.3.

    Args:
        labels: (n,) True for defect.
        scores: (n,) higher means more anomalous.
        masks: n of (height, width), True for a defect pixel. None for an image without one: all pixels of a good image
            are normal, and a defect image says nothing about pixels.
        maps: n of (height, width), the size of the mask; images may differ in size.

    Raises:
        ValueError: lengths or sizes that differ, or a map with NaN or infinite values.
    """
    if not len(labels) == len(scores) == len(masks) == len(maps):
        raise ValueError(
            f"{len(labels)} labels, {len(scores)} scores, {len(masks)} masks and {len(maps)} maps; each image has one"
        )
    pixel_auroc, aupro = _pixel_figures(
        [
            (np.broadcast_to(np.False_, anomalies.shape) if mask is None else mask, anomalies)
            for label, mask, anomalies in zip(labels, masks, maps, strict=True)
            if mask is not None or not label
        ]
    )
    return Detection(auroc(labels, scores), *_precision_figures(labels, scores), pixel_auroc, aupro)


def auroc(labels: NDArray[np.bool_], scores: NDArray[np.floating]) -> float:
    """Area under the ROC curve; NaN where all labels are equal.

    Args:
        labels: (n,) True for defect.
        scores: (n,) higher means more anomalous.
    """
    if _one_kind(labels):
        return math.nan
    return float(roc_auc_score(labels, scores))


def _precision_figures(labels: NDArray[np.bool_], scores: NDArray[np.floating]) -> tuple[float, float]:
    """Average precision and the greatest F1; NaN where all labels are equal."""
    if _one_kind(labels):
        return math.nan, math.nan
    precision, recall, _ = precision_recall_curve(labels, scores)
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
    return float(average_precision_score(labels, scores)), float(f1.max())


def _one_kind(labels: NDArray[np.bool_]) -> bool:
    return bool(labels.all() or not labels.any())


def _pixel_figures(pairs: Sequence[tuple[NDArray[np.bool_], NDArray[np.float32]]]) -> tuple[float, float]:
    """Pixel AUROC and AUPRO of pairs of mask and map; NaN where there is no defect pixel or no normal one."""
    low, high = _range(pairs)
    # By level of anomaly: normal pixels, defect pixels, and defect pixels of which every region has 1 in all.
    normal, defect, overlap = np.zeros((3, LEVELS))
    for mask, anomalies in pairs:
        levels = _levels(anomalies, low, high)
        normal += np.bincount(levels[~mask], minlength=LEVELS)
        if mask.any():
            defect += np.bincount(levels[mask], minlength=LEVELS)
            overlap += np.bincount(levels[mask], _region_shares(mask), minlength=LEVELS)
    if not normal.any() or not defect.any():
        return math.nan, math.nan
    false_positives = _rates(normal)
    pro = _area(false_positives, _rates(overlap), AUPRO_LIMIT) / AUPRO_LIMIT
    return _area(false_positives, _rates(defect), 1.0), pro


def _range(pairs: Sequence[tuple[NDArray[np.bool_], NDArray[np.float32]]]) -> tuple[float, float]:
    """Least and greatest anomaly; what does not fit together is refused."""
    low, high = math.inf, -math.inf
    for mask, anomalies in pairs:
        if mask.shape != anomalies.shape:
            raise ValueError(f"mask of {mask.shape} pixels for a map of {anomalies.shape}; both need the same size")
        least, greatest = float(anomalies.min()), float(anomalies.max())
        if not math.isfinite(least) or not math.isfinite(greatest):
            raise ValueError(f"map of {anomalies.shape} pixels has NaN or infinite values")
        low, high = min(low, least), max(high, greatest)
    return low, high


def _levels(anomalies: NDArray[np.float32], low: float, high: float) -> NDArray[np.int32]:
    """Level of each pixel, 0..LEVELS - 1; all 0 where there is one value only."""
    if high == low:
        return np.zeros(anomalies.shape, np.int32)
    return ((anomalies.astype(np.float64) - low) * ((LEVELS - 1) / (high - low))).astype(np.int32)


def _region_shares(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(defect pixels,) 1 / size of the 8-connected region that each lies in."""
    _, regions = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    regions = regions[mask]
    return np.asarray(1 / np.bincount(regions)[regions], np.float64)


def _rates(histogram: NDArray[np.float64]) -> NDArray[np.float64]:
    """(LEVELS + 1,) share at and above each level, from the threshold above all levels, 0, to the lowest, 1."""
    above = np.cumsum(histogram[::-1])
    return np.concatenate([[0.0], above / above[-1]])


def _area(x: NDArray[np.float64], y: NDArray[np.float64], limit: float) -> float:
    """Area under a curve of ascending x from 0 to `limit`."""
    within = x <= limit
    at_limit = np.interp(limit, x, y)
    return float(np.trapezoid(np.append(y[within], at_limit), np.append(x[within], limit)))
