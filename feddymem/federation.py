"""A federation's rounds: what the aggregator does with banks, and the whole loop in one process."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from feddymem.aggregate import Aggregation, aggregate
from feddymem.generator import MemoryGenerator
from feddymem.item_types import as_received
from feddymem.local_update import local_update
from feddymem.memory import MemoryBank
from feddymem.method import ItemType, Method
from feddymem.outliers import Outlier, bounded, outlying
from feddymem.patches import PatchSource
from feddymem.progress import Progress, no_progress

_log = logging.getLogger(__name__)

MEMORY_TYPE: ItemType = "float16"
"""Element type of the global memory's items on the wire."""
MAX_ORIGINS = 64
"""Bound of what origins cost in a release and in an inspection; sites beyond share origins."""


@dataclass(frozen=True)
class NextMemory(Aggregation):
    """What the aggregator made of a round.

    Attributes:
        outliers: the outlying banks, which were left out.
    """

    outliers: tuple[Outlier, ...]


@dataclass(frozen=True)
class FederatedMemory:
    """Outcome of a federation.

    Attributes:
        memory: the global memory of the last round.
        generators: each site's memory generator after the last round; None where the method has none.
        bytes_sent: bytes of each site's banks on the wire, round by round.
        outliers: the banks that were left out, round by round.
    """

    memory: MemoryBank
    generators: dict[str, MemoryGenerator | None]
    bytes_sent: dict[str, tuple[int, ...]]
    outliers: tuple[tuple[Outlier, ...], ...]


def next_memory(
    memory: MemoryBank | None,
    banks: Mapping[str, MemoryBank],
    sites: Sequence[str],
    method: Method,
    trusted: Collection[str] = (),
) -> NextMemory:
    """The aggregator's part of a round: the memory that the round started from and the banks of the round, merged.

    Outlying banks are left out; what the memory has of their sites already stays.

    Args:
        memory: the global memory that the round started from; None in the first round.
        banks: the banks of the round, by the site's name; those of banned sites must not be among them.
        sites: names of all sites of which the memory or the round has a bank. A site's place is its origin in the
            memory; it must stay the same from round to round. Beyond MAX_ORIGINS, sites share one.
        method: the federation's method. Origins may be switched off from a round on, but not on: what the memory has
            already would count as the first site's.
        trusted: sites whose banks are merged even if they are outlying.
    """
    origins = min(len(sites), MAX_ORIGINS) if method.origins else 1
    if memory is not None and not method.origins:  # as where it was switched off between two rounds
        memory = dataclasses.replace(memory, weights=memory.weights.sum(1, keepdims=True))
    outliers = outlying(banks, trusted)
    left_out = {each.site for each in outliers}
    merged = {site: bank for site, bank in sorted(bounded(banks).items()) if site not in left_out}
    parts = [] if memory is None else [memory.placed(0, origins)]
    parts += [bank.placed(sites.index(site) % origins, origins) for site, bank in merged.items()]
    outcome = aggregate(parts, method.memory_items, method.seed, method.weighted)
    return NextMemory(outcome.memory, outcome.iterations, outcome.inertia, outliers)


def federate(
    sites: dict[str, PatchSource], method: Method, progress: Progress = no_progress, device: str = "cpu"
) -> FederatedMemory:
    """Runs a whole federation in this process, with the same code and results as the services.

    Args:
        sites: each site's patch features, by name.
        method: the federation's method.
        progress: told what is being done.
        device: torch device that computes.
    """
    memory: MemoryBank | None = None
    generators: dict[str, MemoryGenerator | None] = dict.fromkeys(sites)
    bytes_sent: dict[str, tuple[int, ...]] = dict.fromkeys(sites, ())
    outliers = []
    for round_number in range(1, method.rounds + 1):
        banks = {}
        for name, source in sorted(sites.items()):
            update = local_update(source, memory, generators[name], method, round_number, progress, device)
            generators[name] = update.generator
            banks[name] = as_received(update.bank, method.item_type)
            bytes_sent[name] += (method.bank_bytes(len(update.bank), update.bank.channels),)
        merged = next_memory(memory, banks, sorted(sites), method)
        for outlier in merged.outliers:
            _log.warning("round %d leaves the bank of site %s out: %s", round_number, outlier.site, outlier.reason)
        memory = as_received(merged.memory, MEMORY_TYPE)
        outliers.append(merged.outliers)
    assert memory is not None, "a method has at least one round"
    return FederatedMemory(memory, generators, bytes_sent, tuple(outliers))
