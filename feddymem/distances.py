"""Exact distances of patches to items, in blocks of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_DISTANCE_BYTES = 32 * 2**20
"""Bound of the distances of a block of patches to all items."""


def squared_distances(points: Tensor, squares: Tensor, centres: Tensor) -> Tensor:
    """(n, m) squared distances of (n, channels) points, whose squared lengths are known, to (m, channels) centres."""
    cross = torch.addmm((centres * centres).sum(1)[None], points, centres.T, alpha=-2)
    return (cross + squares[:, None]).clamp_min(0)


def nearest_items(patches: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to, and index of, the item nearest to each patch.

    Args:
        patches: (n, channels) float32.
        items: (m, channels) float32.

    Returns:
        (n,) float32 Euclidean distances and (n,) int64 indices.
    """
    squares = (patches * patches).sum(1)
    item_squares = (items * items).sum(1)
    distances, indices = torch.empty_like(squares), torch.empty(len(patches), dtype=torch.int64, device=patches.device)
    for rows in _blocks(len(patches), len(items)):
        best, indices[rows] = torch.addmm(item_squares[None], patches[rows], items.T, alpha=-2).min(1)
        distances[rows] = (best + squares[rows]).clamp_min(0).sqrt()
    return distances, indices


def _blocks(patches: int, items: int) -> Iterator[slice]:
    step = max(1, _DISTANCE_BYTES // (4 * items))
    return (slice(start, start + step) for start in range(0, patches, step))
