"""Drift: whether a site's images are still scored like its held-out normal images (ours, of published parts).

The null hypothesis is that images are exchangeable with those held out, but for a share of up to DEFECTS of them, which
score as high as they like. Of each image the test takes the conformal p-value among the held-out images *and all images
since the test began*: exact, whatever the number of images held out (a conformal test martingale: Vovk et al.,
Algorithmic Learning in a Random World, 2005). It bets on small p-values, f(p) = 1 + mean over q of
w_q (1{p <= q} - ((1 - DEFECTS) q + DEFECTS)), of which the mean is at most 1 under the hypothesis, and adds the bets up
in Shiryaev's and Roberts's form, R <- (1 + R) f(p): an e-detector (Shin, Ramdas and Rinaldo, arXiv 2203.03532), so that
R comes to EVIDENCE after EVIDENCE images in the mean at the earliest while nothing has changed. A second one of its
kind bets on scores that fall; what counts is the mean of both.
"""

from __future__ import annotations

import numpy as np

from feddymem.calibration import Limit
from feddymem.sketch import MAX_LEVEL, MIN_LEVEL, STEP, level_of

DEFECTS = 0.1
"""Share of images with a defect that is no drift."""
EVIDENCE = 10_000.0
"""Drift is found when the test's statistic gets here: by mistake, on average, after as many images at the earliest."""
QUIET_IMAGES = 200
"""So many images in a row without new evidence, and the drift is over."""
_BETS = ((0.1, 2.0), (0.3, 2.0), (0.5, 1.5), (0.7, 1.2))
"""How much is bet on p-values up to q: for each q its w. Chosen for shifts of one to two standard deviations."""
_ROUNDING = 1e-6
"""Of a level: a value that lies on the grid must not be rounded up to the next one."""


class DriftTest:
    """One site's images against its held-out ones. Its memory does not grow. Not for several threads at once.

    Args:
        limit: for the site's scores; its reference and scale are what is compared with.

    Attributes:
        found: whether there is drift.
        images_since: images since it was found, in this stretch of drift; 0 without.
    """

    def __init__(self, limit: Limit) -> None:
        self._scale = limit.scale
        levels = np.ceil(np.log(limit.reference) / np.log(STEP) - _ROUNDING).astype(np.int64)
        self._reference = np.bincount(np.clip(levels, MIN_LEVEL, MAX_LEVEL) - MIN_LEVEL, minlength=_LEVELS)
        self.found, self.images_since = False, 0
        self._begin()

    def add(self, score: float) -> None:
        """Takes the next image's score into account."""
        at_least, at_most = self._p_values(score)
        self._rising = (1 + self._rising) * _bet(at_least)
        self._falling = (1 + self._falling) * _bet(at_most)
        evidence = (self._rising + self._falling) / 2 >= EVIDENCE
        if self.found:
            self.images_since += 1
            self._quiet += 1
        if evidence:
            self.found = True
            self._begin()
        elif self._quiet >= QUIET_IMAGES:
            self.found, self.images_since = False, 0
            self._begin()

    def _begin(self) -> None:
        self._counts, self._images = self._reference.copy(), int(self._reference.sum())
        self._rising = self._falling = 0.0
        self._quiet = 0

    def _p_values(self, score: float) -> tuple[float, float]:
        """Shares of images, this one among them, that score at least and at most as high.

        Once there is drift, images are compared with those held out alone: they must not vouch for each other.
        """
        # Rounded as the held-out ones were: first up to the grid, then through the scale.
        level = _level(STEP ** level_of(score) / self._scale)
        at_least = int(self._counts[level:].sum())
        at_most = self._images - at_least + int(self._counts[level])
        images = self._images + 1
        if not self.found:
            self._counts[level] += 1
            self._images = images
        return (at_least + 1) / images, (at_most + 1) / images


_LEVELS = MAX_LEVEL - MIN_LEVEL + 1


def _level(value: float) -> int:
    return min(max(level_of(value * (1 - _ROUNDING * (STEP - 1))), MIN_LEVEL), MAX_LEVEL) - MIN_LEVEL


def _bet(p_value: float) -> float:
    return _CONSTANT + sum(weight for most, weight in _BETS if p_value <= most) / len(_BETS)


_CONSTANT = 1 - sum(weight * ((1 - DEFECTS) * most + DEFECTS) for most, weight in _BETS) / len(_BETS)
