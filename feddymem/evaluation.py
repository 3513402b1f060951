"""How well scores and anomaly maps separate good from defect: the figures that a report shows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score


@dataclass(frozen=True)
class Detection:
    """Detection quality on one site's test images.

    Attributes:
        image_auroc: area under the ROC curve of the image scores; NaN where there are only good or only defect images.
        pixel_auroc: the same over all pixels of all anomaly maps; NaN where there is no defect pixel or no mask.
    """

    image_auroc: float
    pixel_auroc: float


def auroc(labels: NDArray[np.bool_], scores: NDArray[np.floating]) -> float:
    """Area under the ROC curve; NaN where all labels are equal.

    Args:
        labels: (n,) True for defect.
        scores: (n,) higher means more anomalous.
    """
    if labels.all() or not labels.any():
        return math.nan
    return float(roc_auc_score(labels, scores))


def mean(values: list[float]) -> float:
    """Mean over sites; NaN where a site has none."""
    return float(np.mean(values))
