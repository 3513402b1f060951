"""Exact distances of patches to items, in blocks of bounded size."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 4096
_DISTANCE_BYTES = 32 * 2**20
"""Bound of the distances of a block of patches to all items."""


def squared_distances(points: Tensor, squares: Tensor, centres: Tensor) -> Tensor:
    """(n, m) squared distances of (n, channels) points, whose squared lengths are known, to (m, channels) centres."""
    cross = torch.addmm((centres * centres).sum(1)[None], points, centres.T, alpha=-2)
    return cross.add_(squares[:, None]).clamp_min_(0)


def squared_lengths(points: Tensor) -> Tensor:
    """(n,) squared lengths of (n, channels) points, without a second copy of them."""
    return torch.cat([(rows * rows).sum(1) for rows in torch.split(points, _ROWS)])


def nearest_items(patches: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to, and index of, the item nearest to each patch.

    Args:
        patches: (n, channels) float32, without gradients.
        items: (m, channels) float32.

    Returns:
        (n,) float32 Euclidean distances and (n,) int64 indices.
    """
    squares = squared_lengths(patches)
    item_squares = squared_lengths(items)
    distances, indices = torch.empty_like(squares), torch.empty(len(patches), dtype=torch.int64, device=patches.device)
    step = min(len(patches), max(1, _DISTANCE_BYTES // (4 * len(items))))
    # One buffer for all parts: memory that is taken anew for each ends up scattered over the heap, and several times.
    buffer = patches.new_empty(step, len(items))
    for start in range(0, len(patches), max(1, step)):
        rows = slice(start, start + step)
        cross = buffer[: len(patches[rows])]
        torch.addmm(item_squares[None], patches[rows], items.T, alpha=-2, out=cross)
        best, indices[rows] = cross.min(1)
        distances[rows] = (best + squares[rows]).clamp_min(0).sqrt()
    return distances, indices
