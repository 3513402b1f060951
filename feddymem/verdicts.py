"""From a score to a verdict: made here and nowhere else, for reports and the inference service alike (ours)."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from feddymem.calibration import Calibration, Limit, site_key
from feddymem.maps import HeatScale

_LIMITS_KEPT = 256
"""Limits of a release at hand, by site and rate: rates come from requests, and an odd one is soon made again."""
_UNKNOWN = ""


@dataclass(frozen=True, eq=False)
class Judgement:
    """What is found of one score.

    Attributes:
        anomalous: whether it is the threshold or more.
        threshold: what it is judged by.
        p_value: share of normal images whose score is at least as high, this one among them; None without a
            calibration.
        normalised: the score from 0, as the usual normal image, over 0.5, the threshold, to 1; None without a
            calibration, because then nothing is known of usual images.
        limit: what the threshold rests on; None where it is somebody's own, of which nothing is known.
    """

    anomalous: bool
    threshold: float
    p_value: float | None = None
    normalised: float | None = None
    limit: Limit | None = None


def judge(score: float, limit: Limit | None, threshold: float | None = None) -> Judgement | None:
    """Judges a score; None where there is nothing to judge by.

    Args:
        score: of an image.
        limit: for images of its site; None without a calibration.
        threshold: somebody's own, which counts instead of the limit's; p-value and the lower end of the scale are the
            calibration's all the same.
    """
    if threshold is None:
        if limit is None:
            return None
        return Judgement(
            score >= limit.threshold, limit.threshold, limit.p_value(score), limit.normalised(score), limit
        )
    if limit is None:
        return Judgement(score >= threshold, threshold)
    own = dataclasses.replace(limit, threshold=threshold)
    return Judgement(score >= threshold, threshold, limit.p_value(score), own.normalised(score))


@dataclass(frozen=True, eq=False)
class SiteLimits:
    """What tells normal from anomalous at one site.

    Attributes:
        scores: for image scores.
        peaks: for the values of anomaly maps.
    """

    scores: Limit
    peaks: Limit

    @property
    def heat_scale(self) -> HeatScale:
        """Colours of anomaly maps: the first up to what the usual normal image has at most, the middle one at the pixel
        threshold."""
        return HeatScale(self.peaks.low, self.peaks.full)


class ReleaseLimits:
    """The limits of a release, by the names of sites.

    Args:
        federation: its name.
        calibration: of the release.
    """

    def __init__(self, federation: str, calibration: Calibration) -> None:
        self.rate = calibration.rate
        self._federation = federation
        self._sites = {key for key, scores in calibration.scores.sites.items() if len(scores)}
        # Of the calibration alone: the cache of a method holds its object, and releases must go when they are replaced.
        self._find = functools.lru_cache(_LIMITS_KEPT)(functools.partial(_limits, calibration))

    def knows(self, site: str) -> bool:
        """Whether a site has held images out."""
        return self._key(site) != _UNKNOWN

    def of(self, site: str, rate: float | None = None) -> SiteLimits | None:
        """Limits for images of a site; None where no site has held an image out.

        Args:
            site: its name; one that is not known is judged by all sites' images.
            rate: false-alarm rate wanted, above 0 and below 1; None for the federation's.
        """
        return self._find(self._key(site), self.rate if rate is None else rate)

    def _key(self, site: str) -> str:
        key = site_key(self._federation, site)
        return key if key in self._sites else _UNKNOWN


def _limits(calibration: Calibration, key: str, rate: float) -> SiteLimits | None:
    scores, peaks = calibration.scores.limit(key, rate), calibration.peaks.limit(key, rate)
    return None if scores is None or peaks is None else SiteLimits(scores, peaks)
