"""200 release swaps under constant load: no request may fail, and the inference service's memory must stay flat.

A publisher in this process plays aggregator and edge client: it publishes a new global memory (2,048 items) and a new
memory generator again and again, each when the one before is seen in an answer. Two closed-loop callers send images all
the while. Resident memory is read after every swap.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks import write_result
from benchmarks.publishing import Publishing
from feddymem.backbone import load_extractor
from feddymem.client import InspectionClient, InspectionError
from feddymem.dataset_files import load_sites
from feddymem.feature_space import FeatureSpace
from feddymem.generator import MemoryGenerator
from feddymem.memory import MemoryBank
from feddymem.synthetic import write_products
from services.demo.processes import Fleet, RunningService
from services.runtime.arrays import WireArray, bank_to_wire
from services.runtime.messages import generator_to_wire

SWAPS = 200
WARM_UP = 20
CALLERS = 2
BAR_MIB = 50
FEDERATION, SITE = "bench", "line"
_MIB = 2**20
_ITEMS = 2048


def main() -> None:
    """Measures and reports failures and growth."""
    space = load_extractor(device="cpu").feature_space
    with tempfile.TemporaryDirectory(prefix="feddymem-bench-") as name:
        folder = Path(name)
        write_products(folder / "products")
        image = load_sites(folder / "products")[0].train[0].read_bytes()
        memories = Publishing(folder / "memories", space, FEDERATION)
        generators = Publishing(folder / "generators", space, FEDERATION, SITE)
        with Fleet(folder / "services") as fleet:
            flags = ["--aggregator", memories.address, "--edge-clients", generators.address, "--retry-seconds", "0.2"]
            inference = fleet.start("inference", "inference", *flags)
            result = _swap(fleet, inference, memories, generators, space, image)
        memories.stop()
        generators.stop()
    write_result("release_swaps", result)


def _swap(
    fleet: Fleet,
    inference: RunningService,
    memories: Publishing,
    generators: Publishing,
    space: FeatureSpace,
    image: bytes,
) -> dict[str, object]:
    seen, failures, requests = 0, [], itertools.count()
    stop = threading.Event()
    process = psutil.Process(inference.process.pid)
    resident: list[float] = []

    def call() -> None:
        nonlocal seen
        with InspectionClient(inference.grpc, federation=FEDERATION, site=SITE, attempts=1) as client:
            while not stop.is_set():
                next(requests)
                try:
                    seen = max(seen, client.inspect(image).release)
                except InspectionError as error:
                    if seen:  # before the first release there is nothing to score with
                        failures.append(f"{error.status.name}: {error}")

    with ThreadPoolExecutor(CALLERS) as pool:
        callers = [pool.submit(call) for _ in range(CALLERS)]
        try:
            for version in range(1, SWAPS + 1):
                generators.publish(version, _generator(space, version))
                memories.publish(version, bank_to_wire(_memory(space, version), "float16"), needs_generator=True)
                fleet.wait_until(lambda version=version: seen >= version, 60, f"release {version}")  # type: ignore[misc]
                resident.append(process.memory_info().rss / _MIB)
        finally:
            stop.set()
        for caller in callers:
            caller.result()
    growth = max(resident[WARM_UP:]) - resident[WARM_UP]
    return {
        "swaps": SWAPS,
        "requests": next(requests),
        "failed_requests": len(failures),
        "failures": failures[:5],
        "resident_mib": {
            "first": round(resident[0], 1),
            f"after_{WARM_UP}": round(resident[WARM_UP], 1),
            "last": round(resident[-1], 1),
        },
        "growth_mib": round(growth, 1),
        "bar_mib": BAR_MIB,
        "holds": not failures and growth < BAR_MIB,
    }


def _memory(space: FeatureSpace, seed: int) -> MemoryBank:
    rng = np.random.default_rng(seed)
    return MemoryBank(
        items=rng.normal(size=(_ITEMS, space.channels)).astype(np.float32),
        weights=np.ones((_ITEMS, 1), np.float32),
        spreads=np.ones(_ITEMS, np.float32),
    )


def _generator(space: FeatureSpace, seed: int) -> list[WireArray]:
    torch.manual_seed(seed)
    return generator_to_wire(MemoryGenerator(space.channels, space.grid))


if __name__ == "__main__":
    main()
