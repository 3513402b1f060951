"""Large images in tiles: a network sees overlapping squares one after another, and their feature maps become one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_TILES_AT_A_TIME = 8
"""Bound of a pass of the network, whatever the size of the image."""


def tile_starts(size: int, tile: int, overlap: int, step: int) -> list[int]:
    """Where tiles start along one side, in pixels: evenly spread multiples of `step`, from the first pixel to the last.

    Args:
        size: side of the image; a multiple of `step`.
        tile: side of a tile; a multiple of `step`, at most `size`.
        overlap: neighbours overlap at least so far; at most `tile - step`.
        step: of the grid that starts lie on.
    """
    gaps = -(-(size - tile) // ((tile - overlap) // step * step))
    return [round((size - tile) / step * number / max(1, gaps)) * step for number in range(gaps + 1)]


def tiled(
    network: Callable[[Tensor], Tensor], images: Tensor, tile: int, overlap: int, step: int, reduction: int
) -> Tensor:
    """The feature map of images, put together from those of their tiles.

    Where tiles overlap, the map is the mean of theirs, weighted by how far a patch is from the tile's edge: there the
    network sees least of its surroundings. Weights fall to nearly zero, so that a tile's end leaves no step.

    Args:
        network: maps (n, 3, tile, tile) to (n, channels, tile / reduction, tile / reduction).
        images: (n, 3, size, size) float32, prepared.
        tile: side of a tile in pixels.
        overlap: of neighbouring tiles in pixels, at least.
        step: starts of tiles are multiples of it, in pixels; a multiple of `reduction`.
        reduction: pixels per patch side.

    Returns:
        (n, channels, size / reduction, size / reduction) float32. Working memory is that and a few tiles' maps.
    """
    size, side = images.shape[-1], tile // reduction
    starts = tile_starts(size, tile, overlap, step)
    corners = [(top, left) for top in starts for left in starts]
    weight = _weight(side, max(1, overlap // reduction)).to(images)
    maps: list[Tensor] = []
    for image in images:
        total, weights = None, torch.zeros(size // reduction, size // reduction).to(images)
        for first in range(0, len(corners), _TILES_AT_A_TIME):
            some = corners[first : first + _TILES_AT_A_TIME]
            features = network(torch.stack([image[:, top : top + tile, left : left + tile] for top, left in some]))
            if total is None:
                total = features.new_zeros(features.shape[1], *weights.shape)
            for (top, left), feature in zip(some, features, strict=True):
                rows = slice(top // reduction, top // reduction + side)
                columns = slice(left // reduction, left // reduction + side)
                total[:, rows, columns] += feature * weight
                weights[rows, columns] += weight
        assert total is not None, "an image has at least one tile"
        maps.append(total / weights)
    return torch.stack(maps)


def _weight(side: int, overlap: int) -> Tensor:
    """(side, side): 1 inside, falling to its edge over the overlap."""
    place = torch.arange(side) + 0.5
    ramp = (torch.minimum(place, side - place) / overlap).clamp_max(1)
    return ramp[:, None] * ramp[None]
