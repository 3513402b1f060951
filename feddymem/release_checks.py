"""Checks that a release must pass before it goes live by itself (ours).

They use nothing but the global memory and what sites tell of their held-out normal images, so that they need no
defects and no image leaves a site. A site that has held out fewer than LEAST images is not judged: their median is
chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from feddymem.calibration import Normals
from feddymem.hold_out import LEAST
from feddymem.memory import MemoryBank
from feddymem.sketch import NO_SCORES, ScoreSketch

CHECKS = ("finite", "coverage", "alarm_rate", "not_worse")
"""Names of all checks, in the order in which they are made."""
COVERAGE_FACTOR = 2.0
"""A site's median score may be this many times the median of all sites'. Sites of one product are up to 1.1 times it
(screws, magnetic tiles, circuit boards; 40 images a site), of all three in one federation by 1.5. Where the memory has
nothing of a product, its sites score 1.6 to 1.9 times as high as where it has: screws among tiles 2.1 times the median
of all, boards 2.9 times. Less than that no median tells."""
_LEAST_SITES = 3
"""Of two sites that differ nobody can tell which one is covered."""
_CHANCE = 1e-3
"""Probability that the alarm rate of one of all sites is found out of its band by chance: once in 1,000 releases."""


@dataclass(frozen=True)
class Check:
    """Outcome of one check.

    Attributes:
        name: one of CHECKS.
        passed: whether the release passed.
        finding: what was found and what was expected, in words; names sites.
    """

    name: str
    passed: bool
    finding: str


@dataclass(frozen=True)
class HeldOut:
    """A site's held-out images, scored twice.

    Attributes:
        candidate: their scores with the release.
        base: the scores of the same images with the release that its round started from; none where it started from
            none.
    """

    candidate: ScoreSketch = NO_SCORES
    base: ScoreSketch = NO_SCORES


def check_release(
    memory: MemoryBank | str, sites: Mapping[str, HeldOut], rate: float, worse_margin: float
) -> tuple[Check, ...]:
    """All checks of a release, in the order of CHECKS.

    Args:
        memory: its global memory, read back as it will be published; or why it cannot be.
        sites: each site's held-out images, by name.
        rate: the federation's false-alarm rate.
        worse_margin: share by which a site's median score may rise from one release to the next.
    """
    judged = {site: each for site, each in sorted(sites.items()) if len(each.candidate) >= LEAST}
    typical = 0.0 if isinstance(memory, str) else _typical_distance(memory)
    return (
        _finite(memory),
        _coverage({site: _median(each.candidate) for site, each in judged.items()}, typical),
        _alarm_rate({site: each.candidate for site, each in sorted(sites.items())}, rate),
        _not_worse(judged, worse_margin, typical),
    )


def most_alarms(images: int, rate: float, chance: float) -> int:
    """Alarms that so many normal images have at most, but for a chance; each is an alarm with probability `rate`."""
    left = 1.0
    for alarms in range(images):
        left -= _binomial(images, alarms, rate)
        if left <= chance:
            return alarms
    return images


def _binomial(images: int, alarms: int, rate: float) -> float:
    """Probability of so many alarms; by logarithms, because of many images the number of choices is no float."""
    choices = math.lgamma(images + 1) - math.lgamma(alarms + 1) - math.lgamma(images - alarms + 1)
    return math.exp(choices + alarms * math.log(rate) + (images - alarms) * math.log1p(-rate))


def _typical_distance(memory: MemoryBank) -> float:
    """Distance of a patch to its item at the usual origin: a minority of sites, whatever it sends, does not move it."""
    squares = memory.spreads.astype(np.float64) ** 2
    origins = memory.weights.T[memory.weights.any(0)]
    return float(np.median([math.sqrt(np.average(squares, weights=weights)) for weights in origins]))


def _finite(memory: MemoryBank | str) -> Check:
    if isinstance(memory, str):
        return Check("finite", False, f"the global memory cannot be read as it would be published: {memory}")
    return Check("finite", True, f"all values of {len(memory)} items are finite")


def _coverage(medians: Mapping[str, float], typical: float) -> Check:
    """Each site's median against that of all; or, where that is less, because the images of most sites are all equal,
    against the distance of patches to their items."""
    if len(medians) < _LEAST_SITES:
        found = f"{len(medians)} sites have held out {LEAST} images or more; {_LEAST_SITES} are needed to compare them"
        return Check("coverage", True, found)
    median = float(np.median(list(medians.values())))
    usual, what = max((median, "the median of all sites"), (typical, "the distance of patches to their items"))
    site, most = max(medians.items(), key=lambda each: each[1])
    found = (
        f"the highest median score of a site is {most:.4g}, of {site}; expected at most {COVERAGE_FACTOR:g} times "
        f"{what}, {usual:.4g}"
    )
    return Check("coverage", most <= COVERAGE_FACTOR * usual, found)


def _alarm_rate(sketches: Mapping[str, ScoreSketch], rate: float) -> Check:
    normals = Normals(sketches)
    sketches = {site: sketch for site, sketch in sketches.items() if len(sketch)}
    beyond, own = [], 0
    for site, sketch in sketches.items():
        limit = normals.limit(site, rate)
        assert limit is not None, "some image is held out"
        own += limit.basis == "site"
        alarms = int(np.count_nonzero(sketch.scores >= limit.threshold))
        most = most_alarms(len(sketch), limit.rate, _CHANCE / len(sketches))
        if alarms > most:
            beyond.append(f"{site}: {alarms} alarms of {len(sketch)} images, expected at most {most}")
    if beyond:
        return Check("alarm_rate", False, "; ".join(beyond))
    tested = len(sketches) - own
    found = f"at {tested} sites held-out images have no more alarms than {rate:.3g} of them and chance make"
    untested = f"; {own} others have limits made of these very images, which says nothing" if own else ""
    return Check("alarm_rate", True, found + untested)


def _not_worse(sites: Mapping[str, HeldOut], margin: float, typical: float) -> Check:
    """Each site's median against that with the base; where that is next to nothing, because all images are equal, a
    rise is told in distances of patches to their items."""
    before = {site: _median(each.base) for site, each in sites.items() if len(each.base)}
    if not before:
        return Check("not_worse", True, "there is nothing before it to compare it with")
    after = {site: _median(sites[site].candidate) for site in before}
    rises = {site: (after[site] - before[site]) / max(before[site], typical) for site in before}
    expected = f"expected a rise of at most {margin:.3g} of it"
    worse = [
        f"{site}: the median score of its held-out images rises from {before[site]:.4g} to {after[site]:.4g}"
        for site, rise in rises.items()
        if rise > margin
    ]
    if worse:
        return Check("not_worse", False, f"{'; '.join(worse)}; {expected}")
    found = f"the median scores of {len(rises)} sites change by {max(rises.values()):+.3f} of what they were at most"
    return Check("not_worse", True, f"{found}; {expected}")


def _median(sketch: ScoreSketch) -> float:
    return float(np.median(sketch.scores))
