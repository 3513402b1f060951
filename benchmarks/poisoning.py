"""Poisoned banks: what a site that uploads something else than its bank does to the image AUROC of the others.

One site of a data set is the attacker in every round, then another. Each attack runs as it would in the services, where
outlying banks are left out; one that was found runs once more with all banks trusted, for the first attacker. Drops are
against the federation in which the attacker is honest; `absent` is the federation without it, which is what is left of
an attack that is found.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer

from benchmarks import write_result
from feddymem.backbone import load_extractor
from feddymem.datasets import SiteData, load_sites
from feddymem.evaluation import auroc
from feddymem.feature_cache import CachedPatches, FeatureCache
from feddymem.federation import MEMORY_TYPE, next_memory
from feddymem.folders import cache_folder
from feddymem.item_types import as_received
from feddymem.local_update import local_update
from feddymem.memory import MemoryBank
from feddymem.method import Method
from feddymem.scoring import Scorer
from services.runtime.hardware import configure_hardware

ATTACKERS = 2
METHOD = Method()
_BATCH_IMAGES = 8


class Sites:
    """The sites of a data set. What was computed of one memory is kept: attacks that are found leave the same one."""

    def __init__(self, sites: Sequence[SiteData], cache: FeatureCache) -> None:
        self.names = [site.name for site in sites]
        self._sites, self._cache = {site.name: site for site in sites}, cache
        self._banks: dict[tuple[object, ...], MemoryBank] = {}
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

    def auroc(self, name: str, memory: MemoryBank) -> float:
        """Image AUROC of a site's test images."""
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
    "absent": absent,
    "noise": noise,
    "defects": defects,
    "scaled by 10": scaled,
    "duplicates": duplicates,
    "noise with covariance": noise_with_covariance,
}


def federate(sites: Sites, attacker: str, attack: Attack, trusted: Sequence[str] = ()) -> tuple[MemoryBank, list[str]]:
    """The global memory after all rounds, and whose banks were left out: "ROUND SITE"."""
    memory, left_out = None, []
    for number in range(1, METHOD.rounds + 1):
        uploads = {name: (attack if name == attacker else honest)(sites, name, memory) for name in sites.names}
        banks = {name: as_received(bank, METHOD.item_type) for name, bank in uploads.items() if bank is not None}
        merged = next_memory(memory, banks, sites.names, METHOD, trusted)
        memory = as_received(merged.memory, MEMORY_TYPE)
        left_out += [f"{number} {each.site}" for each in merged.outliers]
    assert memory is not None, "a method has at least one round"
    return memory, left_out


def measure(sites: Sites, attacker: str, undefended: bool) -> dict[str, dict[str, object]]:
    """All attacks of one site; with `undefended`, those that are found once more as if they were not."""
    others = [name for name in sites.names if name != attacker]

    def aurocs(memory: MemoryBank) -> np.ndarray[Any, Any]:
        return np.array([sites.auroc(name, memory) for name in others])

    memory, left_out = federate(sites, attacker, honest)
    before = aurocs(memory)
    result: dict[str, dict[str, object]] = {
        "honest": {"image_auroc": round(float(before.mean()), 4), "left_out": "; ".join(left_out)}
    }
    for name, attack in ATTACKS.items():
        memory, left_out = federate(sites, attacker, attack)
        drops = before - aurocs(memory)
        figures = {"drop": drops.mean(), "of_a_site": drops.max()}
        if not left_out and attack is not absent:
            banned = memory.without([sites.names.index(attacker)])
            assert banned is not None, "other sites have items too"
            figures["banned"] = (before - aurocs(banned)).mean()
        elif left_out and undefended:
            memory, _ = federate(sites, attacker, attack, trusted=sites.names)
            figures["undefended"] = (before - aurocs(memory)).mean()
        rounded = {what: round(float(value), 4) for what, value in figures.items()}
        result[name] = {**rounded, "left_out": "; ".join(left_out)}
        print(attacker, name, result[name], flush=True)
    return result


def main(data: list[Path]) -> None:
    """Measures on data sets of site folders, and writes benchmarks/results/poisoning.json."""
    configure_hardware(None)
    cache = FeatureCache(cache_folder(), load_extractor())
    sets = {path.name: Sites(load_sites(path), cache) for path in data}
    result: dict[str, dict[str, object]] = {name: {} for name in sets}
    for number in range(ATTACKERS):
        for name, sites in sets.items():
            attacker = sites.names[number * len(sites.names) // ATTACKERS]
            result[name][attacker] = measure(sites, attacker, undefended=number == 0)
            write_result("poisoning", result)


if __name__ == "__main__":
    typer.run(main)
