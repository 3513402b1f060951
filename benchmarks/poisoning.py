"""Poisoned banks: what a site that uploads something else than its bank does to the image AUROC of the others.

One site of a data set is the attacker in every round, then another. Outlying banks are left out as in the services.
Drops are against the federation of the others alone, which is the best that any defence can do; what the others have
from the attacker as long as it is honest is told as well. In the end, attacks that are found run with all trusted.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer

from benchmarks import write_result
from feddymem.backbone import load_extractor
from feddymem.dataset_files import load_sites
from feddymem.datasets import SiteData
from feddymem.evaluation import auroc
from feddymem.feature_cache import CachedPatches, FeatureCache
from feddymem.federation import MEMORY_TYPE, next_memory
from feddymem.folders import cache_folder
from feddymem.item_types import as_received
from feddymem.local_update import local_update
from feddymem.memory import FloatArray, MemoryBank
from feddymem.method import Method
from feddymem.outliers import outlying
from feddymem.scoring import Scorer
from services.runtime.hardware import configure_hardware

ATTACKERS = 2
METHOD = Method()
_BATCH_IMAGES = 8


class Sites:
    """The sites of a data set. What was computed is kept: attacks that are found all leave the same memory."""

    def __init__(self, sites: Sequence[SiteData], cache: FeatureCache) -> None:
        self.names = [site.name for site in sites]
        self._sites, self._cache = {site.name: site for site in sites}, cache
        self._banks: dict[tuple[object, ...], MemoryBank] = {}
        self._memories: dict[tuple[object, ...], MemoryBank] = {}
        self._aurocs: dict[tuple[object, ...], float] = {}

    def bank(self, name: str, memory: MemoryBank | None, defects: bool = False) -> MemoryBank:
        """A site's bank of a round; with `defects`, of its defect test images in place of its normal ones."""
        key = name, _digest(memory), defects
        if key not in self._banks:
            site = self._sites[name]
            paths = [image.path for image in site.test if image.defect] if defects else site.train
            number = 1 if memory is None else 2  # varies random choices only, of which the default has none
            self._banks[key] = local_update(CachedPatches(self._cache, paths), memory, None, METHOD, number).bank
        return self._banks[key]

    def merged(self, memory: MemoryBank | None, banks: Mapping[str, MemoryBank]) -> MemoryBank:
        """The next memory of banks of which none is to be left out."""
        key = _digest(memory), *((name, _digest(bank)) for name, bank in banks.items())
        if key not in self._memories:
            merged = next_memory(memory, banks, self.names, METHOD, trusted=self.names).memory
            self._memories[key] = as_received(merged, MEMORY_TYPE)
        return self._memories[key]

    def aurocs(self, memory: MemoryBank, attacker: str) -> FloatArray:
        """Image AUROC of all sites but the attacker."""
        return np.array([self._auroc(name, memory) for name in self.names if name != attacker], np.float32)

    def _auroc(self, name: str, memory: MemoryBank) -> float:
        key = name, _digest(memory)
        if key not in self._aurocs:
            images, scorer = self._sites[name].test, Scorer(self._cache.extractor, memory, None)
            patches = CachedPatches(self._cache, [image.path for image in images])
            scores = [i.score for batch in patches.batches(_BATCH_IMAGES) for i in scorer.inspect_features(batch)]
            self._aurocs[key] = auroc(np.array([image.defect for image in images], bool), np.array(scores))
        return self._aurocs[key]


def _digest(memory: MemoryBank | None) -> bytes | None:
    if memory is None:
        return None
    return hashlib.sha256(memory.items.tobytes() + memory.weights.tobytes()).digest()


Attack = Callable[[Sites, str, MemoryBank | None], MemoryBank | None]
"""What a site uploads, given the memory that the round starts from; None for nothing."""


def honest(sites: Sites, site: str, memory: MemoryBank | None) -> MemoryBank:
    """Its bank."""
    return sites.bank(site, memory)


def absent(_sites: Sites, _site: str, _memory: MemoryBank | None) -> None:
    """Nothing."""


def noise(sites: Sites, site: str, memory: MemoryBank | None) -> MemoryBank:
    """Normal noise of the mean and deviation that each channel of its bank has."""
    bank = sites.bank(site, memory)
    values = np.random.default_rng(0).normal(bank.items.mean(0), bank.items.std(0), bank.items.shape)
    return _with_items(bank, values)


def noise_with_covariance(sites: Sites, site: str, memory: MemoryBank | None) -> MemoryBank:
    """Normal noise of its bank's mean and covariance."""
    bank = sites.bank(site, memory)
    covariance = np.cov(bank.items.T)
    return _with_items(bank, np.random.default_rng(0).multivariate_normal(bank.items.mean(0), covariance, len(bank)))


def defects(sites: Sites, site: str, memory: MemoryBank | None) -> MemoryBank:
    """The bank of its defect images, as if they were normal."""
    return sites.bank(site, memory, defects=True)


def scaled(sites: Sites, site: str, memory: MemoryBank | None) -> MemoryBank:
    """Another site's bank, scaled by 10."""
    bank = sites.bank(sites.names[sites.names.index(site) - 1], memory)
    return _with_items(bank, bank.items * 10)


def duplicates(sites: Sites, site: str, memory: MemoryBank | None) -> MemoryBank:
    """One item of its bank again and again, with noise of a hundredth of the bank's deviation."""
    bank = sites.bank(site, memory)
    values = np.random.default_rng(0).normal(bank.items[0], bank.items.std(0) / 100, bank.items.shape)
    return _with_items(bank, values)


def _with_items(bank: MemoryBank, items: np.ndarray[Any, Any]) -> MemoryBank:
    return dataclasses.replace(bank, items=items.astype(np.float32))


ATTACKS: dict[str, Attack] = {
    "noise": noise,
    "scaled": scaled,
    "duplicates": duplicates,
    "defects": defects,
    "noise with covariance": noise_with_covariance,
}


def federate(
    sites: Sites, attacker: str, attack: Attack, trusted: Collection[str] = ()
) -> tuple[MemoryBank, list[tuple[int, str]]]:
    """The global memory after all rounds, and which banks were left out: round and site."""
    memory, left_out = None, []
    for number in range(1, METHOD.rounds + 1):
        uploads = {name: (attack if name == attacker else honest)(sites, name, memory) for name in sites.names}
        banks = {name: as_received(bank, METHOD.item_type) for name, bank in uploads.items() if bank is not None}
        for outlier in outlying(banks, trusted):
            left_out.append((number, outlier.site))
            del banks[outlier.site]
        memory = sites.merged(memory, banks)
    assert memory is not None, "a method has at least one round"
    return memory, left_out


def measure(sites: Sites, attacker: str, attack: Attack, trusted: Collection[str] = ()) -> dict[str, object]:
    """What an attack does to the other sites: mean drop, and that of the site that loses most.

    `after_ban` is what is left of the drop when an operator takes the attacker's items out of the memory.
    """
    alone = sites.aurocs(federate(sites, attacker, absent)[0], attacker)
    memory, left_out = federate(sites, attacker, attack, trusted)
    drops = alone - sites.aurocs(memory, attacker)
    figures = {"drop": drops.mean(), "of_a_site": drops.max()}
    if attack is honest:
        figures = {"auroc_alone": alone.mean(), "auroc": (alone - drops).mean(), **figures}
    elif not left_out and not trusted:
        banned = memory.without([sites.names.index(attacker)])
        assert banned is not None, "the others have items too"
        figures["after_ban"] = (alone - sites.aurocs(banned, attacker)).mean()
    result: dict[str, object] = {what: round(float(value), 4) for what, value in figures.items()}
    if not trusted:
        result["left_out"] = " ".join(f"{number}:{site}" for number, site in left_out)
    return result


def main(data: list[Path]) -> None:
    """Measures on data sets of site folders, and writes benchmarks/results/poisoning.json."""
    configure_hardware(None)
    cache = FeatureCache(cache_folder(), load_extractor())
    sets = {path.name: Sites(load_sites(path), cache) for path in data}
    result: dict[str, dict[str, dict[str, object]]] = {name: {} for name in sets}
    for what, attack in {"honest": honest, **ATTACKS}.items():
        for name, sites in sets.items():
            attackers = sites.names[:: len(sites.names) // ATTACKERS][:ATTACKERS]
            result[name][what] = {attacker: measure(sites, attacker, attack) for attacker in attackers}
            write_result("poisoning", result)
    for what in ("noise", "scaled", "duplicates"):
        for name, sites in sets.items():
            attacker = sites.names[0]
            result[name][f"{what}, all trusted"] = {attacker: measure(sites, attacker, ATTACKS[what], sites.names)}
            write_result("poisoning", result)


if __name__ == "__main__":
    typer.run(main)
