"""Aggregation: the reduced banks of all sites to one global memory, by k-means (arXiv 2502.21012; the start from
coverage seeds, weights and spreads are ours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from feddymem.k_means import Clusters, k_means
from feddymem.memory import MemoryBank
from feddymem.memory_reduce import greedy_cover

_ITERATIONS = 10
_FAIR_SHARES = 2.0
"""Items of one origin, at most, in equal shares of the memory (docs/method.md, "Poisoned banks")."""


@dataclass(frozen=True)
class Aggregation:
    """A global memory, and how k-means got there.

    Attributes:
        memory: the global memory.
        iterations: k-means iterations run; 0 where all items fit and none was needed.
        inertia: sum of squared distances between items and what they were merged to.
    """

    memory: MemoryBank
    iterations: int
    inertia: float


def aggregate(banks: list[MemoryBank], count: int, seed: int = 0, weighted: bool = False) -> Aggregation:
    """Merges banks into a global memory of at most `count` items.

    Where all items fit, they are kept as they are. Weights of merged items are added, origin by origin; a merged item's
    spread takes in both the spreads of its parts and their distances to it. With `weighted`, items count in k-means as
    often as the patches behind them; without, each counts once, which keeps rare patches represented (docs/method.md).

    Where they do not, an origin that is alone behind more than `_FAIR_SHARES` equal shares of `count` has those items
    merged to so many first, so that no site takes the places of the others, whatever it uploads (ours).

    Raises:
        ValueError: no banks, or banks of different numbers of channels or origins.
    """
    if not banks:
        raise ValueError("no banks to aggregate")
    for what in ("channels", "origins"):
        numbers = {getattr(bank, what) for bank in banks}
        if len(numbers) > 1:
            raise ValueError(f"banks have different numbers of {what}: {sorted(numbers)}")
    pool = MemoryBank.concatenate(banks)
    if len(pool) <= count:
        return _as_it_is(pool)
    fair = _fair(pool, count, seed, weighted)
    merged = _k_means(fair.memory, count, seed, weighted)
    return Aggregation(merged.memory, max(fair.iterations, merged.iterations), fair.inertia + merged.inertia)


def _as_it_is(pool: MemoryBank) -> Aggregation:
    return Aggregation(pool, iterations=0, inertia=0.0)


def _fair(pool: MemoryBank, count: int, seed: int, weighted: bool) -> Aggregation:
    """The pool, with at most `_FAIR_SHARES` equal shares of `count` items that one origin is alone behind.

    With two origins or one, that is all of them, and the pool stays as it is.
    """
    most = math.ceil(_FAIR_SHARES * count / pool.origins)
    if most >= count:
        return _as_it_is(pool)
    alone = np.count_nonzero(pool.weights, axis=1) == 1
    owners = np.where(alone, pool.weights.argmax(1), pool.origins)
    crowded = np.flatnonzero(np.bincount(owners, minlength=pool.origins)[: pool.origins] > most)
    if not len(crowded):
        return _as_it_is(pool)
    merged = [_k_means(pool.only(owners == origin), most, seed, weighted) for origin in crowded]
    others = ~np.isin(owners, crowded)
    parts = [pool.only(others)] if others.any() else []
    memory = MemoryBank.concatenate([*parts, *(each.memory for each in merged)])
    return Aggregation(memory, _ITERATIONS, sum(each.inertia for each in merged))


def _k_means(pool: MemoryBank, count: int, seed: int, weighted: bool) -> Aggregation:
    if len(pool) <= count:
        return _as_it_is(pool)
    start = pool.items[greedy_cover(torch.from_numpy(pool.items), count).numpy()]  # fewer, of fewer distinct items
    weights = pool.patches.astype(np.float32) if weighted else None
    clusters = k_means(pool.items, start, _ITERATIONS, seed, weights)
    return Aggregation(memory=_merge(pool, clusters), iterations=_ITERATIONS, inertia=float(clusters.squared.sum()))


def _merge(pool: MemoryBank, clusters: Clusters) -> MemoryBank:
    cells, count = clusters.cells, len(clusters.centroids)
    patches = np.bincount(cells, pool.patches, minlength=count)
    scatter = np.bincount(
        cells, pool.patches * (pool.spreads.astype(np.float64) ** 2 + clusters.squared), minlength=count
    )
    weights = np.stack([np.bincount(cells, origin, minlength=count) for origin in pool.weights.T], axis=1)
    used = patches > 0
    return MemoryBank(
        items=clusters.centroids[used],
        weights=weights[used].astype(np.float32),
        spreads=np.sqrt(scatter[used] / patches[used]).astype(np.float32),
    )
