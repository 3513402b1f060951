"""200 release swaps under constant load: no request may fail, and the inference service's memory must stay flat.

A publisher in this process plays aggregator and edge client: it publishes a new global memory (2,048 items) and a new
memory generator again and again, each when the one before is seen in an answer. Two closed-loop callers send images all
the while. Resident memory is read after every swap.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import psutil
import torch
from grpc import aio

from benchmarks import write_result
from feddymem.backbone import load_extractor
from feddymem.client import InspectionClient
from feddymem.datasets import load_sites
from feddymem.feature_space import FeatureSpace
from feddymem.generator import MemoryGenerator
from feddymem.memory import MemoryBank
from feddymem.synthetic import write_products
from feddymem.v1.release_pb2 import RELEASE_KIND_GLOBAL_MEMORY, RELEASE_KIND_MEMORY_GENERATOR, Release
from services.demo.processes import Fleet, RunningService
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import WireArray, bank_to_wire
from services.runtime.messages import feature_space_to_message, generator_to_wire
from services.runtime.publisher import Publisher

SWAPS = 200
WARM_UP = 20
CALLERS = 2
BAR_MIB = 50
FEDERATION, SITE = "bench", "line"
_MIB = 2**20
_ITEMS = 2048


class Publishing:
    """A release server on a thread of its own."""

    def __init__(self, folder: Path, space: FeatureSpace, kind: int) -> None:
        self._arrays, self._space, self._kind = ArrayStore(folder), space, kind
        self._loop = asyncio.new_event_loop()
        self._publisher = Publisher(self._arrays)
        self._previous: list[bytes] = []
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.address = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    async def _listen(self) -> str:
        self._server = aio.server()
        self._publisher.service.add(self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    def publish(self, version: int, arrays: list[WireArray]) -> None:
        """Publishes a version."""
        for array in arrays:
            self._arrays.put(array.manifest.sha256, array.data)
        release = Release(
            federation=FEDERATION,
            version=version,
            kind=self._kind,  # type: ignore[arg-type]
            site=SITE if self._kind == RELEASE_KIND_MEMORY_GENERATOR else "",
            feature_space=feature_space_to_message(self._space),
            arrays=[array.manifest for array in arrays],
            needs_generator=True,
        )
        self._loop.call_soon_threadsafe(self._publisher.publish, release)

    def stop(self) -> None:
        """Stops serving."""
        asyncio.run_coroutine_threadsafe(self._server.stop(None), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)


def main() -> None:
    """Measures and reports failures and growth."""
    space = load_extractor(device="cpu").feature_space
    with tempfile.TemporaryDirectory(prefix="feddymem-bench-") as name:
        folder = Path(name)
        write_products(folder / "products")
        image = load_sites(folder / "products")[0].train[0].read_bytes()
        memories = Publishing(folder / "memories", space, RELEASE_KIND_GLOBAL_MEMORY)
        generators = Publishing(folder / "generators", space, RELEASE_KIND_MEMORY_GENERATOR)
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
        with InspectionClient(inference.grpc, federation=FEDERATION, site=SITE) as client:
            while not stop.is_set():
                next(requests)
                try:
                    seen = max(seen, client.inspect(image).release)
                except grpc.RpcError as error:
                    if seen:  # before the first release there is nothing to score with
                        failures.append(f"{error.code().name}: {error.details()}")

    with ThreadPoolExecutor(CALLERS) as pool:
        callers = [pool.submit(call) for _ in range(CALLERS)]
        try:
            for version in range(1, SWAPS + 1):
                generators.publish(version, _generator(space, version))
                memories.publish(version, bank_to_wire(_memory(space, version), "float16"))
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
