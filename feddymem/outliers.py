"""Outlying banks: unlike those of all other sites in a way that no product explains (ours).

Three figures of each bank are held against the median of the round's banks, which a minority cannot move. None of them
compares one site's items with another's, so a site that makes something else than all others is no outlier. What honest
and poisoned banks of three data sets come to is in docs/method.md, "Poisoned banks".
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from feddymem.memory import FloatArray, MemoryBank

FEWEST_SITES = 3
"""Of fewer banks none is judged: there is no majority to be unlike."""
FEWEST_ITEMS = 64
"""Of a bank with fewer items only its size is judged: between so few, distances say little."""
_LARGEST_SIZE = 3.0
"""In medians of the sites. Any two honest banks of three products come to at most 2.2 times each other."""
_LEAST_DISTANCE = 0.1
"""In medians of the sites. Any two honest banks of three products come to at least 0.43 times each other."""
_LARGEST_NOISE = 0.85
"""1 is noise; honest banks come to at most 0.72."""
_DRAWN_ITEMS = 2048
"""Distances are those of so many items of a bank at most: their time grows with the square."""


@dataclass(frozen=True)
class Outlier:
    """An outlying bank.

    Attributes:
        site: whose bank it is.
        reason: what is unlike other banks: the rest of a sentence that begins with "its", with figures.
    """

    site: str
    reason: str


@dataclass(frozen=True)
class _Figures:
    """What banks are judged by.

    Attributes:
        size: the largest root mean squared length of the patches behind an item.
        distance: median distance between two items; None where there are too few.
        noise: median distance of an item to the nearest other, divided by the same after each channel was shuffled over
            the items. Patches of pictures lie close to others, and shuffled ones do not: what is in one channel goes
            with what is in the next. Noise does not change. None where there are too few items.
    """

    size: float
    distance: float | None
    noise: float | None


def outlying(banks: Mapping[str, MemoryBank], trusted: Collection[str] = ()) -> tuple[Outlier, ...]:
    """The outlying banks of a round, by name of the site; whatever the order that banks are given in.

    Of fewer than FEWEST_SITES banks none is outlying; and none where half of them or more would be, because then
    nothing tells which are the usual ones.

    Args:
        banks: the banks of a round, by name of the site.
        trusted: sites whose banks were admitted by an operator: never outlying, but judged by like all others.
    """
    if len(banks) < FEWEST_SITES:
        return ()
    figures = {site: _figures(bank) for site, bank in sorted(banks.items())}
    size = float(np.median([each.size for each in figures.values()]))
    distance = _median([each.distance for each in figures.values()])
    noise = _median([each.noise for each in figures.values()])
    reasons = {site: _reason(each, size, distance, noise) for site, each in figures.items()}
    found = [Outlier(site, reason) for site, reason in reasons.items() if reason is not None]
    if 2 * len(found) >= len(banks):
        return ()
    return tuple(each for each in found if each.site not in trusted)


def bounded(banks: Mapping[str, MemoryBank]) -> dict[str, MemoryBank]:
    """The banks of a round, none with more patches behind it than all would have together if each had the median.

    The weights of one that has are made smaller alike, but not below 1. Of fewer than FEWEST_SITES banks none is.
    """
    if len(banks) < FEWEST_SITES:
        return dict(banks)
    most = len(banks) * float(np.median([bank.patches.sum() for bank in banks.values()]))
    return {site: _lighter(bank, most) for site, bank in banks.items()}


def _lighter(bank: MemoryBank, most: float) -> MemoryBank:
    patches = bank.patches.sum()
    if patches <= most:
        return bank
    weights = np.where(bank.weights > 0, np.maximum(bank.weights * (most / patches), 1), 0)
    return dataclasses.replace(bank, weights=weights.astype(np.float32))


def _median(values: Collection[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if len(known) >= FEWEST_SITES else None


def _reason(figures: _Figures, size: float, distance: float | None, noise: float | None) -> str | None:
    """Why a bank is outlying, given the medians; None where it is not."""
    if figures.size > _LARGEST_SIZE * size:
        return (
            f"its patches are up to {figures.size:.4g} long, those of a usual site up to {size:.4g}; "
            f"outlying is more than {_LARGEST_SIZE:g} times as much"
        )
    if figures.distance is not None and distance is not None and figures.distance < _LEAST_DISTANCE * distance:
        return (
            f"its items are {figures.distance:.4g} from each other, those of a usual site {distance:.4g}; "
            f"outlying is less than {_LEAST_DISTANCE:g} times as much"
        )
    if figures.noise is not None and noise is not None and figures.noise > _LARGEST_NOISE > noise:
        return (
            f"its items are noise: as near to each other as {figures.noise:.2f} times what chance gives, "
            f"those of a usual site {noise:.2f} times; outlying is more than {_LARGEST_NOISE:g} times"
        )
    return None


def _figures(bank: MemoryBank) -> _Figures:
    lengths = np.square(bank.items, dtype=np.float64).sum(1) + np.square(bank.spreads, dtype=np.float64)
    size = float(np.sqrt(lengths.max()))
    if len(bank) < FEWEST_ITEMS:
        return _Figures(size, None, None)
    # Random by what is in the bank, so that nobody can put chosen items where they will be drawn.
    digest = hashlib.sha256(bank.items.tobytes()).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    drawn = bank.items[rng.permutation(len(bank))[:_DRAWN_ITEMS]]
    distance, nearest = _distances(drawn)
    _, by_chance = _distances(rng.permuted(drawn, axis=0))
    return _Figures(size, distance, nearest / by_chance if by_chance > 0 else 0.0)


def _distances(items: FloatArray) -> tuple[float, float]:
    """Median distance between two items, and of an item to the nearest other; squares are of what is left of the mean,
    so that items near each other and far from zero do not cancel."""
    points = torch.from_numpy(items).double()
    points -= points.mean(0)
    distances = torch.cdist(points, points)
    others = distances[torch.triu(torch.ones_like(distances, dtype=torch.bool), 1)]
    return float(others.median()), float(distances.fill_diagonal_(torch.inf).amin(1).median())
