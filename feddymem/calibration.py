"""Calibration: how scores of normal images are distributed, and the verdicts that follow from it (ours).

Each site holds some of its normal images out of its bank and scores them against a release. From how many of those
score at least as high as an image follows the image's conformal p-value (Vovk et al., Algorithmic Learning in a Random
World, 2005): if the image is as normal as they are, p <= r happens with a probability of at most r.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from feddymem.sketch import NO_SCORES, ScoreSketch

Basis = Literal["site", "federation"]
"""Whose held-out images a verdict rests on."""

FALSE_ALARM_RATE = 0.05
"""Share of normal images that may be called anomalous, unless a federation or a request says otherwise."""

_NARROWEST = 0.95
"""The lower end of the 0..1 scale is at most this share of the threshold, as where all held-out scores are equal."""


@dataclass(frozen=True)
class SiteCalibration:
    """What a site tells of its held-out normal images; nothing else of them leaves it.

    Attributes:
        scores: image scores.
        peaks: largest value of each image's anomaly map.
    """

    scores: ScoreSketch = NO_SCORES
    peaks: ScoreSketch = NO_SCORES


@dataclass(frozen=True, eq=False)
class Limit:
    """What tells normal from anomalous at a false-alarm rate.

    Attributes:
        threshold: least anomalous value, a float32; what is below it is normal.
        rate: false-alarm rate that is guaranteed for images like those held out; above the rate wanted where they are
            too few for it.
        images: number of held-out images that this rests on.
        basis: "site" where they are the site's own; "federation" where those of other sites are among them.
        reference: (images,) float64, ascending: their values, each through `scale`.
        scale: the mean of the site's own values where those of all sites are taken relative to it, else 1. So limits of
            many sites and rates share one reference.
        scale_error: standard error of `scale` through `scale`: a mean of few values is off by about that.
    """

    threshold: float
    rate: float
    images: int
    basis: Basis
    reference: NDArray[np.float64] = field(repr=False)
    scale: float = 1.0
    scale_error: float = 0.0

    def p_value(self, value: float) -> float:
        """Share of normal images that are at least as anomalous, the image itself among them; above 0, at most 1."""
        below = int(self.reference.searchsorted(value / self.scale))
        return (1 + self.images - below) / (self.images + 1)

    @functools.cached_property
    def low(self) -> float:
        """Value that stands for 0 on the scale: the median of the held-out images."""
        return min(self.scale * float(np.median(self.reference)), _NARROWEST * self.threshold)

    @functools.cached_property
    def full(self) -> float:
        """Value that stands for 1 on the scale: as far above the threshold as 0 is below it."""
        return 2 * self.threshold - self.low

    def normalised(self, value: float) -> float:
        """A value on a scale from 0, as the usual normal image, over 0.5, the threshold, to 1."""
        if self.threshold == 0:  # somebody's own: nothing is below it, and anything above is as far as can be
            return 1.0 if value > 0 else 0.5
        return min(1.0, max(0.0, 0.5 + (value - self.threshold) / (self.full - self.low)))

    def highest_rate(self, images: int) -> float:
        """Share of so many normal images that may be called anomalous by chance: three standard deviations above the
        rate. The held-out images are a sample, too, so that the share is beta-binomial, not binomial.

        Args:
            images: at least 1.
        """
        variance = self.rate * (1 - self.rate) * (1 / (self.images + 2) + 1 / images)
        return min(1.0, self.rate + 3 * math.sqrt(variance))


@dataclass(frozen=True, eq=False)
class Normals:
    """One quantity (image scores, or peaks of maps) of the held-out normal images of all sites.

    Attributes:
        sites: a sketch of each site, by whatever tells sites apart; those without images may be missing.
    """

    sites: Mapping[str, ScoreSketch]

    def limit(self, site: str, rate: float) -> Limit | None:
        """The limit for images of a site at a false-alarm rate; None where no image was held out anywhere.

        It rests on the site's own images where they are enough to guarantee the rate. Else on those of all sites, of
        which each is taken relative to the mean of the others of its site, so that a site with higher scores than
        others has a higher limit: then the guarantee holds as far as sites differ by a factor only. Of a site that is
        not known or held fewer than two images out, nothing relative is known: images of all sites count as they are.

        Args:
            site: as in `sites`.
            rate: false-alarm rate wanted, above 0 and below 1.
        """
        own = self._scores.get(site, np.zeros(0))
        if _allowed(rate, len(own)) >= 0:
            return _limit(own, rate, "site")
        relative = len(own) > 1 and len(self._relative) > 0
        together = self._relative if relative else self._all
        if len(together) <= len(own):  # of nobody else there are any
            return _limit(own, rate, "site") if len(own) else None
        if not relative:
            return _limit(together, rate, "federation")
        return _limit(together, rate, "federation", float(own.mean()), float(together.std()) / math.sqrt(len(own)))

    @functools.cached_property
    def _all(self) -> NDArray[np.float64]:
        return np.sort(np.concatenate([*self._scores.values(), np.zeros(0)]))

    @functools.cached_property
    def _scores(self) -> dict[str, NDArray[np.float64]]:
        return {site: sketch.scores for site, sketch in self.sites.items() if len(sketch)}

    @functools.cached_property
    def _relative(self) -> NDArray[np.float64]:
        """Each image's value through the mean of the others of its site: an image must not vouch for itself."""
        several = [values for values in self._scores.values() if len(values) > 1]
        relative = [values / _means_of_others(values) for values in several]
        return np.sort(np.concatenate([*relative, np.zeros(0)]))


@dataclass(frozen=True, eq=False)
class Calibration:
    """How the normal images of all sites are scored with a release.

    Attributes:
        scores: of the image scores.
        peaks: of the largest value of each anomaly map: at a rate of 5 %, one normal image of twenty has a region.
        rate: the federation's false-alarm rate, used where none is wanted.
    """

    scores: Normals
    peaks: Normals
    rate: float

    @staticmethod
    def of(sites: Mapping[str, SiteCalibration], rate: float) -> Calibration:
        """What the sites tell, put together."""
        return Calibration(
            Normals({site: each.scores for site, each in sites.items()}),
            Normals({site: each.peaks for site, each in sites.items()}),
            rate,
        )


def site_key(federation: str, site: str) -> str:
    """What tells sites apart in the calibration of a release, which goes to all of them: SHA-256, in hex."""
    return hashlib.sha256(f"{federation}\0{site}".encode()).hexdigest()


def _means_of_others(values: NDArray[np.float64]) -> NDArray[np.float64]:
    others = (values.sum() - values) / (len(values) - 1)
    # No less than the least: beside a value that is very much larger the others cancel out.
    return np.asarray(np.maximum(others, values[0]))


def _allowed(rate: float, images: int) -> int:
    """How many of so many normal images may be at least as high as an anomalous one; below 0 where the rate cannot be
    guaranteed, because even the highest p-value is above it. Of a rate near 1 not quite all; of no images, below 0."""
    return min(math.floor(rate * (images + 1) + 1e-9), images) - 1


def _limit(
    reference: NDArray[np.float64], rate: float, basis: Basis, scale: float = 1.0, scale_error: float = 0.0
) -> Limit:
    allowed = max(0, _allowed(rate, len(reference)))
    highest = scale * float(reference[len(reference) - 1 - allowed])
    threshold = np.float32(highest)
    if float(threshold) <= highest:  # p falls to the rate above this value, not at it
        threshold = np.nextafter(threshold, np.float32(np.inf))
    guaranteed = (allowed + 1) / (len(reference) + 1)
    return Limit(float(threshold), guaranteed, len(reference), basis, reference, scale, scale_error)
