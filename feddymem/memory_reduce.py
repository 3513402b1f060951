"""Memory-reduce: many patches to a fixed number of items, by weighted averages (the idea is the paper's, arXiv
2502.21012; coverage seeds, weights and spreads as here are ours).

Two passes over the patches, block by block:

1. Seeds by greedy k-centre, so that rare normal patches stay represented. Blocks are merged as they come: seeds so far
   and the next block compete for the same number of places (a composable coreset).
2. Each patch goes to its nearest seed; an item is the average of the patches of its cell, its weight their number, its
   spread their root mean squared distance to it.

Working memory, whatever the number of images: a block (`patches.BLOCK_BYTES`) and a copy of it beside the seeds, or a
block and about as much again for distances. So a block is let go before the next is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from feddymem.distances import nearest_items, squared_distances, squared_lengths
from feddymem.memory import MemoryBank
from feddymem.patches import PatchSource
from feddymem.progress import Progress, no_progress

_FRONTIER = 512
_ROWS = 2048

Transform = Callable[[Tensor], Tensor]
"""Maps (images, patches, channels) to the same shape: the memory generator, or nothing."""


def identity(features: Tensor) -> Tensor:
    """The transform of a federation without memory generators."""
    return features


def reduce(
    source: PatchSource,
    count: int,
    known: MemoryBank | None = None,
    transform: Transform = identity,
    progress: Progress = no_progress,
    device: str = "cpu",
) -> MemoryBank:
    """Reduces a site's patches to a memory bank of at most `count` items.

    With a `known` memory, seeds are what that memory covers worst, and patches nearest to a known item are left to
    it: the bank holds what the memory lacks, so that rounds add coverage within the same bytes (ours).

    Args:
        source: the patches.
        count: items wanted; fewer come back only where there are fewer distinct patches.
        known: the global memory that the round starts from; None in the first round.
        transform: the memory generator.
        progress: told about every block.
        device: torch device that computes.

    Returns:
        The bank; the same for the same arguments.
    """

    def blocks(what: str) -> Iterator[Tensor]:
        done = 0
        for block in source.blocks():
            yield transform(block.to(device)).flatten(0, 1)
            done += len(block)
            del block
            progress(what, done, source.images)

    base = None if known is None else torch.from_numpy(known.items).to(device)
    seeds = _seeds(blocks("seeds"), count, base)
    return _averages(blocks("averages"), seeds, base)


def sample(
    source: PatchSource, count: int, seed: int, transform: Transform = identity, device: str = "cpu"
) -> MemoryBank:
    """A memory bank without memory-reduce: at most `count` patches drawn at random, for ablations."""
    total = source.images * source.patches_per_image
    rng = np.random.default_rng(seed)
    chosen = torch.from_numpy(np.sort(rng.choice(total, size=min(count, total), replace=False)))
    picked, start = [], 0
    for block in source.blocks():
        patches = transform(block.to(device)).flatten(0, 1).cpu()
        inside = chosen[(chosen >= start) & (chosen < start + len(patches))] - start
        picked.append(patches[inside])
        start += len(patches)
    items = torch.cat(picked).numpy()
    weights = np.full((len(items), 1), total / len(items), np.float32)
    return MemoryBank(items=items, weights=weights, spreads=np.zeros(len(items), np.float32))


def greedy_cover(points: Tensor, count: int, base: Tensor | None = None) -> Tensor:
    """Greedy k-centre: each pick is the point farthest from all picks before it, and from the base.

    Without a base, the first pick is the point nearest to the mean.

    Evaluated lazily: distances to picks only grow smaller, so an old distance is an upper bound, and only points whose
    bound could still win (the frontier) are brought up to date. The picks are those of the plain loop.

    Args:
        points: (n, channels) float32.
        count: picks wanted.
        base: (m, channels) float32, covered already; None for none.

    Returns:
        (k,) int64 indices in the order picked; k < count only where all other points coincide with a pick.
    """
    squares = squared_lengths(points)
    picks: list[int] = []
    if base is None:
        picks.append(int((squares - 2 * (points @ points.mean(0))).argmin()))
        bound = squared_distances(points, squares, points[picks]).squeeze(1)
    else:
        bound = nearest_items(points, base)[0].square()
    up_to_date = torch.full((len(points),), len(picks), dtype=torch.int64, device=points.device)
    while len(picks) < min(count, len(points)):
        width = min(_FRONTIER, len(points))
        values, candidates = bound.topk(min(width + 1, len(points)))
        frontier, outside = candidates[:width], values[width].item() if len(values) > width else -1.0
        rows, row_squares = points[frontier], squares[frontier]
        missing = picks[int(up_to_date[frontier].min()) :]
        nearest = bound[frontier]
        if missing:
            nearest = torch.minimum(nearest, squared_distances(rows, row_squares, points[missing]).amin(1))
        while len(picks) < count:
            best = int(nearest.argmax())
            distance = nearest[best].item()
            if distance < outside or distance <= 0:
                break
            picks.append(int(frontier[best]))
            nearest = torch.minimum(nearest, squared_distances(rows, row_squares, rows[best : best + 1]).squeeze(1))
            nearest[best] = 0
        bound[frontier] = nearest
        up_to_date[frontier] = len(picks)
        if outside <= 0 and float(nearest.max()) <= 0:
            break
    return torch.tensor(picks, dtype=torch.int64, device=points.device)


def _seeds(blocks: Iterable[Tensor], count: int, base: Tensor | None) -> Tensor:
    seeds: Tensor | None = None
    for block in blocks:
        candidates = block if seeds is None else torch.cat([seeds, block])
        picks = greedy_cover(candidates, count, base)
        seeds = candidates[picks] if len(picks) else candidates[:1].clone()
        del block, candidates
    assert seeds is not None, "a patch source has at least one image"
    return seeds


def _averages(blocks: Iterable[Tensor], seeds: Tensor, base: Tensor | None) -> MemoryBank:
    centres = seeds if base is None else torch.cat([seeds, base])
    # Offsets from the seed rather than the patches are summed: exact enough in float64 and free of cancellation.
    sums = torch.zeros(seeds.shape, dtype=torch.float64, device=seeds.device)
    squares = torch.zeros(len(seeds), dtype=torch.float64, device=seeds.device)
    counts = torch.zeros(len(seeds), dtype=torch.float64, device=seeds.device)
    for block in blocks:
        _, cell = nearest_items(block, centres)
        for start in range(0, len(block), _ROWS):
            rows = cell[start : start + _ROWS]
            own = rows < len(seeds)
            rows = rows[own]
            offsets = (block[start : start + _ROWS][own] - seeds[rows]).double()
            sums.index_add_(0, rows, offsets)
            squares.index_add_(0, rows, (offsets * offsets).sum(1))
            counts.index_add_(0, rows, torch.ones_like(rows, dtype=torch.float64))
        del block
    used = counts > 0
    if not used.any():  # nothing that the known memory lacks; a bank has at least one item all the same
        used[0], counts[0] = True, 1
    mean = sums[used] / counts[used, None]
    variance = (squares[used] / counts[used] - (mean * mean).sum(1)).clamp_min(0)
    return MemoryBank(
        items=(seeds[used] + mean).float().cpu().numpy(),
        weights=counts[used, None].float().cpu().numpy(),
        spreads=variance.sqrt().float().cpu().numpy(),
    )
