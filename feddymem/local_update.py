"""What a site does in a round: train its memory generator, rebuild its memory bank, reduce it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from feddymem.distances import nearest_items
from feddymem.generator import MemoryGenerator
from feddymem.memory import MemoryBank
from feddymem.memory_reduce import Transform, identity, reduce, sample
from feddymem.method import Method
from feddymem.metric_loss import metric_loss
from feddymem.patches import PatchSource
from feddymem.progress import Progress, no_progress

_LEARNING_RATE = 1e-3
_IMAGES_PER_STEP = 4
_PATCHES_PER_STEP = 1024
_RADIUS_QUANTILE = 0.5
"""The hypersphere's radius: this quantile of the distances of normal patches to the memory."""
_SMALLEST_RADIUS = 1e-3
"""In scales of the generator; below it the memory holds the patches already, and there is nothing to train."""
_MOVEMENT_PENALTY = 0.1
"""Weight of the squared distance that the generator moves a patch; keeps sites in one space and defects visible."""


@dataclass(frozen=True)
class LocalUpdate:
    """Outcome of a site's round.

    Attributes:
        bank: the reduced bank, to be uploaded.
        generator: the memory generator that made it; None where the method has none.
        loss: mean metric loss over the training steps; None where nothing was trained.
    """

    bank: MemoryBank
    generator: MemoryGenerator | None
    loss: float | None


def local_update(
    source: PatchSource,
    memory: MemoryBank | None,
    generator: MemoryGenerator | None,
    method: Method,
    round_number: int,
    progress: Progress = no_progress,
    device: str = "cpu",
) -> LocalUpdate:
    """Runs a site's part of one round. The result is the same for the same arguments.

    Args:
        source: patch features of the site's normal images.
        memory: the global memory that the round starts from; None in the first round, in which the generator is not
            trained, because there is nothing yet to pull patches to.
        generator: the site's memory generator after the last round; None in the first.
        method: the federation's method.
        round_number: from 1; varies the random choices.
        progress: told what is being done.
        device: torch device that computes.
    """
    seed = (method.seed * 1_000_003 + round_number) % 2**63  # torch takes no more
    loss = None
    if not method.generator:
        generator = None
    elif generator is None:
        generator = new_generator(source, seed).to(device)
    if generator is not None and memory is not None and method.metric_loss:
        generator, loss = _train(source, memory, generator, seed, progress, device)
    transform: Transform = identity if generator is None else generator
    with torch.inference_mode():
        if method.memory_reduce:
            bank = reduce(source, method.bank_items, memory, transform, progress, device)
        else:
            bank = sample(source, method.bank_items, seed, transform, device)
    return LocalUpdate(bank=bank, generator=generator, loss=loss)


def new_generator(source: PatchSource, seed: int) -> MemoryGenerator:
    """An untrained memory generator, the identity, scaled to the source's features."""
    block = next(iter(source.blocks()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grid = int(source.patches_per_image**0.5)
        generator = MemoryGenerator(source.channels, grid, scale=float(block.square().mean().sqrt()))
    return generator.eval().requires_grad_(False)


def _train(
    source: PatchSource, memory: MemoryBank, generator: MemoryGenerator, seed: int, progress: Progress, device: str
) -> tuple[MemoryGenerator, float | None]:
    """One pass over the images; the mean loss of its steps, None where there was none."""
    items = torch.from_numpy(memory.items).to(device)
    generator = copy.deepcopy(generator).to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=_LEARNING_RATE)
    rng = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    radius, done = 0.0, 0
    for block in source.blocks():
        block = block.to(device)
        if not losses:
            radius = _radius(block, items, rng)
            if radius < _SMALLEST_RADIUS * float(generator.scale):
                break
        for rows in torch.split(torch.randperm(len(block), generator=rng), _IMAGES_PER_STEP):
            images = block[rows]
            mapped = generator(images)
            patches = mapped.flatten(0, 1)
            chosen = torch.randperm(len(patches), generator=rng)[:_PATCHES_PER_STEP]
            movement = (mapped - images).square().sum(-1).mean() / radius**2
            loss = metric_loss(patches[chosen], items, radius)
            optimizer.zero_grad()
            (loss + _MOVEMENT_PENALTY * movement).backward()
            optimizer.step()
            losses.append(loss.item())
        done += len(block)
        progress("generator", done, source.images)
    return generator.eval().requires_grad_(False), sum(losses) / len(losses) if losses else None


def _radius(block: torch.Tensor, items: torch.Tensor, rng: torch.Generator) -> float:
    patches = block.flatten(0, 1)
    chosen = torch.randperm(len(patches), generator=rng)[: 8 * _PATCHES_PER_STEP]
    distances, _ = nearest_items(patches[chosen], items)
    return float(distances.quantile(_RADIUS_QUANTILE))
