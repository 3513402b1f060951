"""Aggregation: the reduced banks of all sites to one global memory, by k-means (arXiv 2502.21012; the start from
coverage seeds, weights and spreads are ours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from feddymem.memory import FloatArray, MemoryBank
from feddymem.memory_reduce import Places, greedy_cover

_ITERATIONS = 10
_FAIR_SHARES = 2.0
"""Seeds of one origin, at most, in equal shares of the memory (docs/method.md, "Poisoned banks")."""
_FEWEST_ORIGINS = 3
"""With fewer, two equal shares are the whole memory."""


@dataclass(frozen=True)
class Aggregation:
    """A global memory, and how k-means got there.

    Attributes:
        memory: the global memory.
        iterations: k-means iterations run; 0 where all items fit and none was needed.
        inertia: sum of squared distances of the banks' items to their nearest item of the global memory.
    """

    memory: MemoryBank
    iterations: int
    inertia: float


def aggregate(banks: list[MemoryBank], count: int, seed: int = 0, weighted: bool = False) -> Aggregation:
    """Merges banks into a global memory of at most `count` items.

    Where all items fit, they are kept as they are. Weights of merged items are added, origin by origin; a merged item's
    spread takes in both the spreads of its parts and their distances to it. With `weighted`, items count in k-means as
    often as the patches behind them; without, each counts once, which keeps rare patches represented (docs/method.md).

    Where they do not, an origin has at most `_FAIR_SHARES` equal shares of the seeds, whatever was uploaded. Once it
    has them, its other items are left out; until then, they are no farther from the seeds than those of others (ours).

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
        return Aggregation(memory=pool, iterations=0, inertia=0.0)
    kmeans = faiss.Kmeans(
        pool.channels,
        count,
        niter=_ITERATIONS,
        seed=seed % 2**31,
        min_points_per_centroid=1,
        max_points_per_centroid=len(pool),
    )
    seeds, kept = _seeds(pool, count)
    if len(seeds) < count:  # fewer distinct items than wanted
        kmeans.k = len(seeds)
    pool = pool.only(kept)
    kmeans.train(pool.items, weights=pool.patches.astype(np.float32) if weighted else None, init_centroids=seeds)
    memory, inertia = _merge(pool, kmeans)
    return Aggregation(memory=memory, iterations=_ITERATIONS, inertia=inertia)


def _seeds(pool: MemoryBank, count: int) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Where k-means starts, (k, channels), and which items of the pool take part in it, (items,)."""
    items, kept = torch.from_numpy(pool.items), np.ones(len(pool), np.bool_)
    if pool.origins < _FEWEST_ORIGINS:
        return pool.items[greedy_cover(items, count).numpy()], kept
    alone = (pool.weights > 0).sum(1) == 1
    owners = np.where(alone, pool.weights.argmax(1), pool.origins)
    places = np.full(pool.origins + 1, math.ceil(_FAIR_SHARES * count / pool.origins))
    places[-1] = len(pool)  # items of several origins have no bound
    picks = greedy_cover(items, count, places=Places(torch.from_numpy(owners), places.tolist())).numpy()
    full = (np.bincount(owners[picks], minlength=len(places)) >= places) & (places < count)
    kept[full[owners]] = False
    kept[picks] = True
    return pool.items[picks], kept


def _merge(pool: MemoryBank, kmeans: faiss.Kmeans) -> tuple[MemoryBank, float]:
    squared, cells = kmeans.index.search(pool.items, 1)
    squared, cells = np.maximum(squared[:, 0], 0).astype(np.float64), cells[:, 0]
    patches = np.bincount(cells, pool.patches, minlength=kmeans.k)
    scatter = np.bincount(cells, pool.patches * (pool.spreads.astype(np.float64) ** 2 + squared), minlength=kmeans.k)
    weights = np.stack([np.bincount(cells, origin, minlength=kmeans.k) for origin in pool.weights.T], axis=1)
    used = patches > 0
    memory = MemoryBank(
        items=np.asarray(kmeans.centroids)[used],
        weights=weights[used].astype(np.float32),
        spreads=np.sqrt(scatter[used] / patches[used]).astype(np.float32),
    )
    return memory, float(squared.sum())
