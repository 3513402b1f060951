"""From pixels to patch features: what runtimes compile, or torch computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from feddymem.feature_space import FeatureSpace
from feddymem.network import Network


class MapNetwork(nn.Module):
    """A backbone from pixels of 0..255 to its layers' feature maps, joined on the finest grid."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network.module
        self.register_buffer("mean", torch.tensor(network.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(network.std).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, 3, side, side) to (n, channels, grid, grid), both float32."""
        maps = self.network((pixels - self.mean) / self.std)
        size = maps[0].shape[-2:]
        return torch.cat(
            [maps[0], *(functional.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps[1:])], dim=1
        )


class PatchFeatures(nn.Module):
    """What a patch looks like, plus what its neighbourhood looks like.

    1. To each patch is added the mean of its neighbourhood, with its channels turned by half their number and every
       second one negated. So patch and context share the channels without cancelling or reinforcing each other:
       squared distances are close to the sum of both squared distances, at half the bytes and search of joining them.
    2. The outermost patches are made smaller, and with them their distances: what is visible there depends on how a
       part was cut out more than on the part.

    What both are worth: docs/method.md. Both are ours.
    """

    averaging: Tensor
    signs: Tensor
    weights: Tensor

    def __init__(self, space: FeatureSpace) -> None:
        super().__init__()
        signs = torch.ones(space.channels, 1, 1)
        signs[1::2] = -1
        weights = torch.full((space.grid, space.grid), space.border_weight)
        weights[1:-1, 1:-1] = 1
        self._turn = space.channels // 2
        self.register_buffer("averaging", _averaging(space.grid, space.pooling))
        self.register_buffer("signs", space.context_weight * signs)
        self.register_buffer("weights", weights)

    def forward(self, maps: Tensor) -> Tensor:
        """(n, channels, grid, grid) to (n, grid * grid, channels), both float32; patches row by row."""
        context = self.averaging @ maps @ self.averaging.T  # of rows, then of columns
        turned = torch.cat([context[:, -self._turn :], context[:, : -self._turn]], 1)
        return ((maps + self.signs * turned) * self.weights).flatten(2).transpose(1, 2)


def _averaging(grid: int, window: int) -> Tensor:
    """(grid, grid): row i averages over the places at most window // 2 from i that there are."""
    place = torch.arange(grid)
    near = ((place[:, None] - place).abs() <= window // 2).float()
    return near / near.sum(1, keepdim=True)
