"""What FedDyMem is compared with: the same sites, the same features, and other ways to make what each site scores with.

Each way is a function from the sites' patches to a `Detector` of each site.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from feddymem.distances import nearest_items
from feddymem.federation import MEMORY_TYPE, federate, next_memory
from feddymem.generator import MemoryGenerator
from feddymem.item_types import as_received
from feddymem.local_update import local_update
from feddymem.memory import MemoryBank
from feddymem.memory_reduce import greedy_cover
from feddymem.method import Method
from feddymem.patches import PatchSource
from feddymem.progress import Progress, no_progress

CORESET_SHARE = 0.1
"""PatchCore's share of patches that the pooled memory keeps (Roth et al., arXiv 2106.08265)."""
CORESET_BLOCK = 2**17
"""Patches that one greedy k-centre runs over; its time grows with their square."""

Sites = Mapping[str, PatchSource]


@dataclass(frozen=True, eq=False)
class Detector:
    """What a site scores with, and what it cost.

    Attributes:
        memory: the memory bank that patches are measured against.
        generator: maps patches before; None for none.
        bytes_sent: bytes that left the site, round by round; () where nothing left it.
    """

    memory: MemoryBank
    generator: MemoryGenerator | None
    bytes_sent: tuple[int, ...]


Detectors = dict[str, Detector]
"""Each site's detector, by the site's name."""


@dataclass(frozen=True)
class Contender:
    """One of the methods compared.

    Attributes:
        detectors: makes the sites' detectors from their patches; the same for the same arguments.
        summary: what it is, for the report.
        seeded: whether the detectors depend on the method's seed: k-means starts from coverage seeds, and only what is
            trained or drawn at random does.
        together: whether sites know of each other, so that they are calibrated together.
    """

    detectors: Callable[[Sites, Method, Progress, str], Detectors]
    summary: str
    seeded: bool = True
    together: bool = True


def federated(sites: Sites, method: Method, progress: Progress = no_progress, device: str = "cpu") -> Detectors:
    """The method itself, with or without parts of it."""
    outcome = federate(dict(sites), method, progress, device)
    return {name: Detector(outcome.memory, outcome.generators[name], outcome.bytes_sent[name]) for name in sites}


def alone(sites: Sites, method: Method, progress: Progress = no_progress, device: str = "cpu") -> Detectors:
    """Each site as a federation of its own, of the same configuration: as many items as it sends to one with others."""
    outcomes = {name: federate({name: source}, method, progress, device) for name, source in sites.items()}
    return {name: Detector(outcome.memory, outcome.generators[name], ()) for name, outcome in outcomes.items()}


def pooled(sites: Sites, _method: Method, progress: Progress = no_progress, device: str = "cpu") -> Detectors:
    """PatchCore on all sites' patches in one place: an upper reference that gives privacy up.

    The coreset is a tenth of the patches by greedy k-centre, of blocks of CORESET_BLOCK patches each: a union of covers
    covers the union, and neither time nor memory grows with the square of the images. A block mixes sites. Every patch
    leaves its site once, in float16 as it was extracted.
    """
    coreset, held = [], list[Tensor]()
    total = sum(source.images for source in sites.values())
    done = 0
    for _, source in sorted(sites.items()):
        for block in source.blocks():
            held.append(block.flatten(0, 1))
            done += len(block)
            if sum(map(len, held)) >= CORESET_BLOCK or done == total:
                patches = torch.cat(held).to(device)
                coreset.append(patches[greedy_cover(patches, max(1, int(CORESET_SHARE * len(patches))))].cpu())
                held.clear()
            progress("coreset", done, total)
    items = torch.cat(coreset).numpy()
    memory = MemoryBank(items, np.ones((len(items), 1), np.float32), np.zeros(len(items), np.float32))
    itemsize = np.dtype(np.float16).itemsize
    sent = {name: (s.images * s.patches_per_image * s.channels * itemsize,) for name, s in sites.items()}
    return {name: Detector(memory, None, sent[name]) for name in sites}


def averaged(sites: Sites, method: Method, progress: Progress = no_progress, device: str = "cpu") -> Detectors:
    """The memory-reduce without coverage seeds, as CFA makes its memory; banks merged in one round by k-means."""
    banks = {
        name: as_received(running_average(source, progress, device), method.item_type)
        for name, source in sorted(sites.items())
    }
    memory = as_received(next_memory(None, banks, sorted(sites), method).memory, MEMORY_TYPE)
    return {
        name: Detector(memory, None, (method.bank_bytes(len(bank), bank.channels),)) for name, bank in banks.items()
    }


def running_average(source: PatchSource, progress: Progress = no_progress, device: str = "cpu") -> MemoryBank:
    """The first image's patches, into which each later image's patches are averaged, image after image.

    Each patch of an image goes to the item nearest before that image; items are running means of what came to them
    (the idea is CFA's, Lee et al., arXiv 2206.04325).
    """
    items: Tensor | None = None
    done = 0
    for block in source.blocks():
        for patches in block.to(device):
            if items is None:
                items = patches.clone()
                weights, scatter = torch.ones_like(items[:, 0]), torch.zeros_like(items[:, 0])
                continue
            distances, cell = nearest_items(patches, items)
            sums = torch.zeros_like(items).index_add_(0, cell, patches - items[cell])
            weights += torch.bincount(cell, minlength=len(items))
            scatter.index_add_(0, cell, distances.square())
            items += sums / weights[:, None]
        done += len(block)
        progress("averages", done, source.images)
    assert items is not None, "a patch source has at least one image"
    spreads = (scatter / weights).sqrt()
    return MemoryBank(items.cpu().numpy(), weights[:, None].cpu().numpy(), spreads.cpu().numpy())


def fedavg(sites: Sites, method: Method, progress: Progress = no_progress, device: str = "cpu") -> Detectors:
    """One memory generator for all sites, by federated averaging (McMahan et al., arXiv 1602.05629).

    A round: sites train the generator, the average of their parameters, weighted by images, goes back to them, and they
    make their banks with it, so that banks and scores are of the same generator. Parameters go as float32.
    """
    method = method.model_copy(update={"generator": True})
    fixed = method.model_copy(update={"metric_loss": False})
    memory: MemoryBank | None = None
    generator: MemoryGenerator | None = None
    sent: dict[str, tuple[int, ...]] = dict.fromkeys(sites, ())
    names = sorted(sites)
    for number in range(1, method.rounds + 1):
        updates = [local_update(sites[name], memory, generator, method, number, progress, device) for name in names]
        trained = [update.generator for update in updates if update.generator is not None]
        generator = average(trained, [sites[name].images for name in names])
        banks = {
            name: as_received(
                local_update(sites[name], memory, generator, fixed, number, progress, device).bank, method.item_type
            )
            for name in names
        }
        parameters = sum(values.numel() for values in generator.state_dict().values()) * 4
        for name, bank in banks.items():
            sent[name] += (parameters + method.bank_bytes(len(bank), bank.channels),)
        memory = as_received(next_memory(memory, banks, names, method).memory, MEMORY_TYPE)
    assert memory is not None, "a method has at least one round"
    return {name: Detector(memory, generator, sent[name]) for name in sites}


def average(generators: list[MemoryGenerator], weights: list[int]) -> MemoryGenerator:
    """A generator whose parameters and scale are the weighted averages of those of several."""
    states = [generator.state_dict() for generator in generators]
    shares = [weight / sum(weights) for weight in weights]
    result = copy.deepcopy(generators[0])
    result.load_state_dict(
        {name: sum(share * state[name] for share, state in zip(shares, states, strict=True)) for name in states[0]}
    )
    return result


def _changed(**changes: object) -> Callable[[Sites, Method, Progress, str], Detectors]:
    def detectors(sites: Sites, method: Method, progress: Progress, device: str) -> Detectors:
        return federated(sites, method.model_copy(update=changes), progress, device)

    return detectors


CONTENDERS: dict[str, Contender] = {
    "feddymem": Contender(federated, "FedDyMem as it is by default", seeded=False),
    "local": Contender(
        alone,
        "each site alone, with as many items as it sends to a federation; nothing is sent",
        seeded=False,
        together=False,
    ),
    "pooled": Contender(
        pooled, "PatchCore, 10 % coreset of all sites' patches in one place: privacy given up", seeded=False
    ),
    "running-average": Contender(
        averaged, "each image averaged into the items of the first, in place of memory-reduce", seeded=False
    ),
    "fedavg": Contender(fedavg, "one memory generator for all sites, by federated averaging of its parameters"),
    "with-generator": Contender(_changed(generator=True), "FedDyMem with memory generators and metric loss"),
    "without-generator": Contender(_changed(generator=False), "FedDyMem without memory generators", seeded=False),
    "without-metric-loss": Contender(
        _changed(generator=True, metric_loss=False),
        "FedDyMem with memory generators that are not trained",
        seeded=False,
    ),
    "without-memory-reduce": Contender(_changed(memory_reduce=False), "FedDyMem with banks of patches drawn at random"),
    "without-origins": Contender(
        _changed(origins=False), "FedDyMem that takes every item alike, whichever site it comes from", seeded=False
    ),
    "without-rounds": Contender(_changed(rounds=1), "FedDyMem in one round", seeded=False),
}
"""The methods that can be compared, by name."""
