"""Drift: whether a site's images are still scored like its held-out normal images (ours, of published parts).

The null hypothesis is that images, one by one, are exchangeable with those held out, not in lots that are alike within
a lot, but for a share of up to DEFECTS of them, which score as high as they like. Of each image the test takes the
conformal p-value among the held-out images *and all images since the test began*: exact, whatever the number of images
held out (a conformal test martingale: Vovk et al., Algorithmic Learning in a Random World, 2005). It bets on small
p-values, f(p) = 1 + mean over q of w_q (1{p <= q} - ((1 - DEFECTS) q + DEFECTS)), of which the mean is at most 1 under
the hypothesis, and adds the bets up in Shiryaev's and Roberts's form, R <- (1 + R) f(p): an e-detector (Shin, Ramdas
and Rinaldo, arXiv 2203.03532), so that R comes to EVIDENCE after EVIDENCE images in the mean at the earliest while
nothing has changed. A second one of its kind bets on scores that fall; what counts is the mean of both.
"""

from __future__ import annotations

import numpy as np

from feddymem.calibration import Limit
from feddymem.sketch import MAX_LEVEL, MIN_LEVEL, STEP, level_of

DEFECTS = 0.05
"""Share of images with a defect that is no drift. In simulations, twice as many were not found to be drift either."""
EVIDENCE = 10_000.0
"""Drift is found when the test's statistic gets here: by mistake, on average, after as many images at the earliest."""
QUIET_IMAGES = 200
"""So many images in a row without new evidence, and the drift is over."""
_BETS = ((0.1, 2.0), (0.3, 2.0), (0.5, 1.5), (0.7, 1.2))
"""How much is bet on p-values up to q: for each q its w. Chosen for shifts of one to two standard deviations."""
_ERRORS = 2.0
"""Standard errors that the mean of a site's few images is given."""
_ROUNDING = 1e-6
"""Of a level: a value that lies on the grid must not be rounded up to the next one."""


class DriftTest:
    """One site's images against its held-out ones. Its memory does not grow. Not for several threads at once.

    Where those of all sites stand for a site's few, they are scaled by the mean of the few: the test takes it for as
    high (for scores that rise; for those that fall, as low) as it may well be, or it would find the error of that mean.

    Args:
        limit: for the site's scores; its reference and scale are what is compared with.

    Attributes:
        found: whether there is drift.
        images_since: images since it was found, in this stretch of drift; 0 without.
    """

    def __init__(self, limit: Limit) -> None:
        error = min(_ERRORS * limit.scale_error, 0.5)
        self._rising = _Evidence(limit, limit.scale * (1 + error), rising=True)
        self._falling = _Evidence(limit, limit.scale * (1 - error), rising=False)
        self.found, self.images_since = False, 0
        self._quiet = 0

    def add(self, score: float) -> None:
        """Takes the next image's score into account."""
        rounded = STEP ** level_of(score)
        # Once there is drift, images are compared with those held out alone: they must not vouch for each other.
        for each in (self._rising, self._falling):
            each.add(rounded, keep=not self.found)
        if self.found:
            self.images_since += 1
            self._quiet += 1
        if self._rising.value + self._falling.value >= 2 * EVIDENCE:
            self.found = True
            self._begin_anew()
        elif self._quiet >= QUIET_IMAGES:
            self.found, self.images_since = False, 0
            self._begin_anew()

    def _begin_anew(self) -> None:
        self._rising.begin()
        self._falling.begin()
        self._quiet = 0


class _Evidence:
    """For scores that rise, or that fall.

    Args:
        limit: for the site's scores.
        scale: that images are compared on.
        rising: what it is for.

    Attributes:
        value: the statistic, R.
    """

    def __init__(self, limit: Limit, scale: float, rising: bool) -> None:
        self._scale, self._rising = scale, rising
        self._reference = np.bincount([_level(value) for value in limit.reference], minlength=_LEVELS)
        self.begin()

    def begin(self) -> None:
        """Forgets all images but those held out."""
        self._counts, self._images = self._reference.copy(), int(self._reference.sum())
        self.value = 0.0

    def add(self, rounded: float, keep: bool) -> None:
        """Bets on an image.

        Args:
            rounded: its score, rounded to the grid as those of the held-out images are.
            keep: whether later images are compared with it.
        """
        self.value = (1 + self.value) * _bet(self.p_value(rounded, keep))

    def p_value(self, rounded: float, keep: bool) -> float:
        """Share of images, this one among them, that score at least as high; at most, for scores that fall."""
        level = _level(rounded / self._scale)
        others = int((self._counts[level:] if self._rising else self._counts[: level + 1]).sum())
        p_value = (others + 1) / (self._images + 1)
        if keep:
            self._counts[level] += 1
            self._images += 1
        return p_value


_LEVELS = MAX_LEVEL - MIN_LEVEL + 1


def _level(value: float) -> int:
    return level_of(value * (1 - _ROUNDING * (STEP - 1))) - MIN_LEVEL


def _bet(p_value: float) -> float:
    return _CONSTANT + sum(weight for most, weight in _BETS if p_value <= most) / len(_BETS)


_CONSTANT = 1 - sum(weight * ((1 - DEFECTS) * most + DEFECTS) for most, weight in _BETS) / len(_BETS)
