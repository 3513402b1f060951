"""K-means by faiss, the only module that loads it: after torch, whose OpenMP it then shares."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

# faiss's wheels bring OpenBLAS 0.3.15 (of 2021), which takes many an Intel processor made since for one of 2004, and
# multiplies at a fourth of the speed (Xeon of 2023). It reads this when it is loaded.
_KERNELS = {"AVX512": "SkylakeX", "AVX2": "Haswell"}
if (_capability := torch.backends.cpu.get_cpu_capability()) in _KERNELS:
    os.environ.setdefault("OPENBLAS_CORETYPE", _KERNELS[_capability])

import faiss  # noqa: E402


@dataclass(frozen=True, eq=False)
class Clusters:
    """What k-means came to.

    Attributes:
        centroids: (clusters, channels) float32.
        cells: (items,) int64, number of the nearest centroid of each item.
        squared: (items,) float64, squared distances of the items to it.
    """

    centroids: NDArray[np.float32]
    cells: NDArray[np.int64]
    squared: NDArray[np.float64]


def k_means(
    items: NDArray[np.float32],
    start: NDArray[np.float32],
    iterations: int,
    seed: int,
    weights: NDArray[np.float32] | None = None,
) -> Clusters:
    """Clusters items, by all of them in every iteration.

    Args:
        items: (items, channels) float32.
        start: (clusters, channels) float32, what centroids begin as; no more than there are items.
        iterations: number of them.
        seed: of faiss, which splits a cluster at random where another one has become empty.
        weights: (items,) float32, how often each item counts; None for once.
    """
    # Counts in the thread that sets it only; any other has all cores, whatever a container's limit is.
    faiss.omp_set_num_threads(torch.get_num_threads())
    clustering = faiss.Kmeans(
        items.shape[1],
        len(start),
        niter=iterations,
        seed=seed % 2**31,
        min_points_per_centroid=1,
        max_points_per_centroid=len(items),
    )
    clustering.train(items, weights=weights, init_centroids=start)
    squared, cells = clustering.index.search(items, 1)
    return Clusters(
        centroids=np.asarray(clustering.centroids),
        cells=cells[:, 0],
        squared=np.maximum(squared[:, 0], 0).astype(np.float64),
    )
