"""The metric loss: pulls normal patches to their nearest memory items and keeps the other items apart.

The form is CFA's attract/repel hypersphere loss (Lee et al., arXiv 2206.04325, equations 3 to 5); the radius scaled
to the
data and the penalty on movement are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

ATTRACTED = 3
"""Nearest items that a patch is pulled to."""
REPELLED = 3
"""Next items that a patch is kept away from."""
MARGIN = 0.1
"""How much farther than the radius the repelled items must stay, as a share of the squared radius."""


def metric_loss(patches: Tensor, items: Tensor, radius: float) -> Tensor:
    """Mean over patches of attraction and repulsion, in units of the squared radius.

    Args:
        patches: (n, channels) float32, mapped by the memory generator.
        items: (m, channels) float32 of the memory, m >= 1.
        radius: of the hypersphere around each item, in units of the items; > 0.

    Returns:
        A scalar >= 0.
    """
    squared = torch.addmm((items * items).sum(1)[None], patches, items.T, alpha=-2) + (patches * patches).sum(
        1, keepdim=True
    )
    nearest = squared.topk(min(ATTRACTED + REPELLED, items.shape[0]), largest=False).values / radius**2
    attract = (nearest[:, :ATTRACTED] - 1).clamp_min(0).mean()
    others = nearest[:, ATTRACTED:]
    repel = (1 + MARGIN - others).clamp_min(0).mean() if others.shape[1] else torch.zeros_like(attract)
    return attract + repel
