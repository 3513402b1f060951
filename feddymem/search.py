"""Exact search of the nearest items: a screen in low precision, the decision in float32.

Which items can be the nearest is found from distances in bfloat16, the fastest arithmetic that CPUs and GPUs have for
it; the distances of those few, one or two for most patches and origins, are then computed in float32. What rounding can
do to the screen is bounded, so that no nearest item is lost: the outcome is that of comparing with all items (ours).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 16
"""Items whose least screened distance decides whether any of them is looked at."""
_SCREEN_BYTES = 128 * 2**20
"""Bound of the screened distances that are held at once."""
_STEP = 2048
"""Items screened at a time, at most, so that their distances are still in a cache when the least of a block is taken.
"""
_PAIRS = 2**18
"""Bound of the pairs of a patch and an item that are looked at together, 300 MiB at 152 channels; with that many, which
equal items or one that is much longer than the rest can make, patches are taken in smaller parts."""
_NORM_PARTS = 3
"""bfloat16 values whose sum is a squared length, exact to float32."""
_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 0.51 * torch.finfo(torch.bfloat16).eps}
"""How far a row moves when it is stored, at most, as a share of its stored length."""
_FAR = 1e38
"""Squared length of a row that pads a block: never nearest."""

_held = threading.local()

Screen = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Multiplies items, (blocks * BLOCK, c), with patches, (n, c), into squared distances, (blocks * BLOCK, n), and takes
the least of each block, (blocks, n). All are of one type, bfloat16 or float32, sums are float32, and no distance is
negative."""


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Items in blocks of the same origins; blocks of the same origins follow each other, as a group.

    Attributes:
        items: (blocks * BLOCK,) int64, index of the item in each row; -1 pads.
        sizes: blocks of each group.
        origins: (groups, origins) bool, the origins of each group.
    """

    items: NDArray[np.int64]
    sizes: list[int]
    origins: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Query:
    """Patches as the screen takes them.

    Attributes:
        patches: (n, channels) float32.
        screen: (n, screened channels), see `NearestItems`.
        moved: (n,) float32, how far rounding can have moved a patch and an item together.
        slack: (n,) float32, what summing can be off by; it is in the screened distances.
    """

    patches: Tensor
    screen: Tensor
    moved: Tensor
    slack: Tensor


class NearestItems:
    """The squared distance of patches to the nearest item of each origin.

    A screened distance is one product of two rows: |x|^2 and |y|^2 are in them, each as a sum of _NORM_PARTS values
    times 1, so that the least can be taken from what the product gives.

    Args:
        items: (m, channels) float32.
        origins: (m, origins) bool, which origins an item has; at least one. An origin without items is left out.
        screen: what computes the screened distances.
    """

    def __init__(self, items: Tensor, origins: Tensor, screen: Screen) -> None:
        blocks = _in_blocks(origins.cpu().numpy())
        rows = torch.from_numpy(blocks.items).to(items.device)
        pads = rows < 0
        self._items = items[rows.clamp_min(0)]
        self._sizes = blocks.sizes
        self._origins = torch.from_numpy(blocks.origins[:, blocks.origins.any(0)]).to(items.device)
        self._group = torch.arange(len(self._sizes)).repeat_interleave(torch.tensor(self._sizes)).to(items.device)
        self._dtype, self._compute = screen_dtype(items.device), screen
        rounded = self._items.to(self._dtype)
        stored = rounded.float()
        squares = (stored * stored).sum(1).masked_fill(pads, _FAR)
        self._screen = torch.cat([-2 * rounded, _parts(squares, self._dtype), _ones(rounded)], 1)
        self._starts, self._step = _even_steps(len(self._screen) // BLOCK, _STEP // BLOCK)
        self._rounding = (self._items - stored).norm(dim=1).max()
        self._largest = squares[~pads].max()

    def __call__(self, patches: Tensor) -> Tensor:
        """(n, channels) float32 patches to (origins, n) float32 squared distances."""
        parts = -(-len(patches) * len(self._screen) * self._screen.element_size() // _SCREEN_BYTES)
        return torch.cat([self._nearest(self._query(some)) for some in patches.chunk(max(1, parts))], 1)

    def _query(self, patches: Tensor) -> _Query:
        rounded = patches.to(self._dtype)
        squares = torch.linalg.vector_norm(rounded, dim=1, dtype=torch.float32).square()
        slack = self._screen.shape[1] * torch.finfo(torch.float32).eps * (squares + self._largest)
        # With the slack added, no screened distance is negative, and their bits have the order of their values.
        screen = torch.cat([rounded, _ones(rounded), _parts(squares + slack, self._dtype)], 1)
        return _Query(patches, screen, self._rounding + _ROUNDING[self._dtype] * _sqrt(squares), slack)

    def _nearest(self, query: _Query) -> Tensor:
        screened, least = self._screened(query.screen)
        limits = self._limits(query, least)
        block, patch = _places(least, limits.index_select(0, self._group))
        if len(patch) * BLOCK > _PAIRS and len(query.patches) > 1:
            return torch.cat([self._nearest(self._query(half)) for half in query.patches.chunk(2)], 1)
        group = self._group[block]
        pair, place = _places(screened[block, :, patch], limits[group, patch, None])
        patch, item = patch[pair], block[pair] * BLOCK + place
        squared = query.patches.index_select(0, patch).sub_(self._items.index_select(0, item)).square_().sum(1)
        of_origin = squared[:, None].where(self._origins[group[pair]], torch.inf)
        nearest = squared.new_full((len(query.patches), of_origin.shape[1]), torch.inf)
        return nearest.scatter_reduce_(0, patch[:, None].expand_as(of_origin), of_origin, "amin").T

    def _screened(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Bits of the screened distances, (blocks, BLOCK, n), and of the least of each block, (blocks, n)."""
        distances = _scratch(len(self._screen), query)
        least = query.new_empty(len(self._screen) // BLOCK, len(query))
        for start in self._starts:
            rows = slice(start * BLOCK, (start + self._step) * BLOCK)
            self._compute(self._screen[rows], query, distances[rows], least[start : start + self._step])
        return _bits(distances).view(-1, BLOCK, len(query)), _bits(least)

    def _limits(self, query: _Query, least: Tensor) -> Tensor:
        """(groups, n): bits that the screened distance of an item has at most which may be an origin's nearest.

        An origin's item whose screened distance is `best` is not farther than `upper`, and one as near as that has a
        screened distance of at most the limit.
        """
        of_group = torch.stack([blocks.amin(0) for blocks in torch.split(least, self._sizes)])
        member = self._origins.T[:, :, None]
        unit = torch.finfo(self._dtype).eps
        bits = of_group.where(member, torch.iinfo(of_group.dtype).max).amin(1)
        best = bits.view(self._dtype).float() * (1 + unit)
        upper = (_sqrt(best) + 2 * query.moved).square()
        limit = _bits(((upper + 2 * query.slack) * (1 + 2 * unit)).to(self._dtype))
        return limit[:, None].where(member, -1).amax(0)


def screen_by_torch(items: Tensor, query: Tensor, distances: Tensor, least: Tensor) -> None:
    """See `Screen`."""
    torch.mm(items, query.T, out=distances)
    torch.amin(_bits(distances).view(-1, BLOCK, len(query)), 1, out=_bits(least))


def _even_steps(count: int, largest: int) -> tuple[list[int], int]:
    """Where steps start that together have all blocks, and how many blocks each of them has.

    All have as many, the last one overlaps, because runtimes prepare anew for a product of another shape.
    """
    steps = -(-count // largest)
    size = -(-count // steps)
    return [min(number * size, count - size) for number in range(steps)], size


def _scratch(rows: int, query: Tensor) -> Tensor:
    """Room for the distances of items and patches, (rows, n); a thread has the same each time.

    Memory of that size is the kernel's anew otherwise, and to get it takes a third of the search among 65,536 items.
    """
    key = f"{query.device} {query.dtype}"
    held: Tensor | None = _held.__dict__.get(key)
    if held is None or held.numel() < rows * len(query):
        with torch.inference_mode(False):  # so that it can be written to in and out of that mode
            held = _held.__dict__[key] = torch.empty(rows * len(query), dtype=query.dtype, device=query.device)
    return held[: rows * len(query)].view(rows, len(query))


def screen_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware computes with it; elsewhere it would be slower than float32."""
    if device.type == "cuda":
        # The bound holds for sums in float32, which torch does not promise on CUDA unless told to.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def has_tiles() -> bool:
    """Whether the CPU multiplies matrices of bfloat16 as tiles (AMX)."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def _places(values: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns where values are within limits. On the CPU by numpy, which takes a third of torch's time."""
    if values.device.type == "cpu":
        found = torch.from_numpy(np.flatnonzero(values.numpy() <= limits.numpy()))
    else:
        found = (values <= limits).flatten().nonzero().squeeze(1)
    return found // values.shape[1], found % values.shape[1]


def _sqrt(values: Tensor) -> Tensor:
    """Square roots. Torch's own are MKL's, which has a team of threads whatever torch is told."""
    return values.rsqrt().reciprocal()


def _bits(values: Tensor) -> Tensor:
    """Values of at least 0 as integers of the same order, which compare faster."""
    return values.view(torch.int16 if values.element_size() == 2 else torch.int32)


def _ones(like: Tensor) -> Tensor:
    return torch.ones_like(like[:, :1]).expand(-1, _NORM_PARTS)


def _parts(values: Tensor, dtype: torch.dtype) -> Tensor:
    """(n,) float32 as (n, _NORM_PARTS) of a lower precision that sum up to them."""
    parts = []
    for _ in range(_NORM_PARTS):
        parts.append(values.to(dtype))
        values = values - parts[-1].float()
    return torch.stack(parts, 1)


def _in_blocks(origins: NDArray[np.bool_]) -> _Blocks:
    """Items of the same origins together, in full blocks; those left over once for each of their origins."""
    kinds, kind_of = np.unique(origins, axis=0, return_inverse=True)
    groups: list[tuple[NDArray[np.int64], list[int]]] = []
    left: list[list[int]] = [[] for _ in range(origins.shape[1])]
    for number, kind in enumerate(kinds):
        items, mine = np.flatnonzero(kind_of == number), np.flatnonzero(kind).tolist()
        full = len(items) // BLOCK * BLOCK
        groups.append((items[:full], mine))
        for origin in mine:
            left[origin] += items[full:].tolist()
    for origin, over in enumerate(left):
        groups.append((np.array(over + [-1] * (-len(over) % BLOCK), np.int64), [origin]))
    groups = [(items, mine) for items, mine in groups if len(items)]
    members = np.zeros((len(groups), origins.shape[1]), bool)
    for number, (_, mine) in enumerate(groups):
        members[number, mine] = True
    rows = np.concatenate([items for items, _ in groups])
    return _Blocks(rows, [len(items) // BLOCK for items, _ in groups], members)
