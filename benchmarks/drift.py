"""How soon drift is found, and how seldom where there is none, in simulations: `python -m benchmarks.drift`."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from feddymem.calibration import Limit, Normals
from feddymem.drift import DriftTest
from feddymem.sketch import ScoreSketch

_RATE = 0.05
_REPEATS, _STREAMS, _IMAGES = 40, 12, 5_000
_ALARM_RATES = (0.2, 0.25, 0.33, 0.5, 0.9)
"""That shifts bring the alarm rate to, from 5 %."""
_SITES = (
    ("1 site, 72 images", 1, 72),
    ("1 site, 300", 1, 300),
    ("1 site, 1,000", 1, 1_000),
    ("6 sites, 12 each", 6, 12),
)

_LOT = 6
"""Images that came one after another and are alike, as held-out ones are chosen."""
_OF_LOTS = (0.0, 0.2, 0.5, 0.8)
"""Share of the variance of scores that is between lots."""

Scores = NDArray[np.float64]


def _scores(rng: np.random.Generator, images: int, shift: float = 0, defects: float = 0) -> Scores:
    """Log-normal scores with a coefficient of variation of 0.1; those of defects are far above."""
    return 40 * np.exp(0.1 * np.where(rng.random(images) < defects, 5.0, rng.normal(size=images) + shift))


def _limit(rng: np.random.Generator, sites: int, images: int) -> Limit:
    found = Normals({str(site): ScoreSketch.of(_scores(rng, images)) for site in range(sites)}).limit("0", _RATE)
    assert found is not None
    return found


def _found_after(test: DriftTest, stream: Iterable[float]) -> int | None:
    for number, score in enumerate(stream, 1):
        test.add(float(score))
        if test.found:
            return number
    return None


def _delays(sites: int, images: int, before: int) -> list[str]:
    """Median image at which each shift is found; of those that are not, as many as the stream has."""
    shown = []
    for rate in _ALARM_RATES:
        rng, shift = np.random.default_rng(0), NormalDist().inv_cdf(1 - _RATE) - NormalDist().inv_cdf(1 - rate)
        found = []
        for _ in range(_REPEATS):
            test = DriftTest(_limit(rng, sites, images))
            _found_after(test, _scores(rng, before))
            found.append(_found_after(test, _scores(rng, 400, shift)) or 400)
        median = statistics.median(found)
        shown.append(f"{median:.0f}" if median < 400 else "-")
    return shown


def _false_alarms(sites: int, images: int, defects: float) -> int:
    rng = np.random.default_rng(0)
    tests = (DriftTest(_limit(rng, sites, images)) for _ in range(_STREAMS))
    return sum(_found_after(test, _scores(rng, _IMAGES, defects=defects)) is not None for test in tests)


def _in_lots(rng: np.random.Generator, images: int, share: float) -> Scores:
    lots = rng.normal(size=-(-images // _LOT)).repeat(_LOT)[:images]
    scores: Scores = 40 * np.exp(0.1 * (math.sqrt(share) * lots + math.sqrt(1 - share) * rng.normal(size=images)))
    return scores


def _of_lots(images: int, share: float) -> str:
    """Streams in which drift is found, though there is none but that images come in lots; and verdicts' mistakes."""
    rng, found, rates = np.random.default_rng(0), 0, []
    for _ in range(_STREAMS):
        limit = Normals({"0": ScoreSketch.of(_in_lots(rng, images, share))}).limit("0", _RATE)
        assert limit is not None
        stream = _in_lots(rng, _IMAGES, share)
        found += _found_after(DriftTest(limit), stream) is not None
        rates.append(float((stream >= limit.threshold).mean()))
    return f"{found}; {np.mean(rates):.3f} ± {np.std(rates):.3f}"


def _line(name: str, values: Sequence[object]) -> None:
    sys.stdout.write(f"| {name} | {' | '.join(map(str, values))} |\n")
    sys.stdout.flush()


def main() -> None:
    """Prints the tables."""
    _line("held out", [f"to {rate:.0%}" for rate in _ALARM_RATES])
    for name, sites, images in _SITES:
        for before in (0, 500):
            _line(f"{name}, after {before}", _delays(sites, images, before))
    _line(f"found in {_STREAMS} streams of {_IMAGES} images", ["no defects", "5 %", "10 %"])
    for name, sites, images in (("1 site, 12 images", 1, 12), *_SITES):
        _line(name, [_false_alarms(sites, images, defects) for defects in (0, 0.05, 0.1)])
    _line(f"the same in lots of {_LOT}; false-alarm rate", [f"{share:.0%}" for share in _OF_LOTS])
    for images in (24, 72, 300):
        _line(f"1 site, {images}", [_of_lots(images, share) for share in _OF_LOTS])


if __name__ == "__main__":
    main()
