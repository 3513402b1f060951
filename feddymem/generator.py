"""The memory generator: a site's small trainable network from backbone features into the memory's space."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MemoryGenerator(nn.Module):
    """A residual map applied to each patch on its own: x + W2 gelu(W1 [x / scale, position]).

    W2 starts at zero, so an untrained generator is the identity and banks of sites that have not trained yet fit
    together. The paper (arXiv 2502.21012) has a memory generator; this form of it is ours.

    Args:
        channels: length of a patch feature.
        grid: patches along one side of the image.
        scale: typical absolute value of a feature, so that the network sees values of order 1.
    """

    scale: Tensor
    position: Tensor

    def __init__(self, channels: int, grid: int, scale: float = 1.0) -> None:
        super().__init__()
        self.inner = nn.Linear(channels + 2, channels // 2)
        self.outer = nn.Linear(channels // 2, channels)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        axis = torch.linspace(-1, 1, grid)
        rows, columns = torch.meshgrid(axis, axis, indexing="ij")
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("position", torch.stack([rows, columns], dim=-1).flatten(0, 1), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Maps (images, grid * grid, channels) float32 to the same shape."""
        position = self.position.expand(len(features), -1, -1)
        hidden = nn.functional.gelu(self.inner(torch.cat([features / self.scale, position], dim=-1)))
        return features + self.scale * torch.as_tensor(self.outer(hidden))
