"""From a JPEG to a result: the floors, the library in process, and the service under closed and open loads.

1024 x 1024 JPEGs, embedded backbone at 224 px, 4,096 memory items; score, verdict and regions, no map unless said.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any

import grpc
import numpy as np
import psutil
import torch

from benchmarks import interleaved, parts, spread, write_result
from benchmarks.echo import METHOD as ECHO
from benchmarks.load import Load, run_load
from benchmarks.publishing import Publishing
from feddymem.backbone import FeatureExtractor, load_extractor
from feddymem.image_data import EncodedImage
from feddymem.maps import anomaly_map, regions
from feddymem.memory import MemoryBank
from feddymem.scoring import Scorer
from feddymem.search import NearestItems
from feddymem.threads import leave_cores, team, workers
from feddymem.v1.inspection_pb2 import MAP_FORMAT_PNG, InspectRequest
from services.demo.processes import FEDDYMEM, Fleet, RunningService
from services.runtime.arrays import bank_to_wire
from services.runtime.hardware import configure_hardware

INSPECT = "/feddymem.v1.InspectionService/Inspect"
ITEMS = 4096
CALLERS = (1, 2, 4, 8, 16)
BATCHES = (1, 2, 4, 8)
SECONDS = 6.0
ROUNDS = 4
OVERLOAD = 3
_THRESHOLD, _PIXEL_THRESHOLD = 30.0, 45.0
_MIB = 2**20


def request(jpeg: bytes, **wishes: int) -> bytes:
    """A serialised request for score, verdict and regions."""
    wanted = InspectRequest(encoded=jpeg, threshold=_THRESHOLD, pixel_threshold=_PIXEL_THRESHOLD, **wishes)  # type: ignore[arg-type]
    return wanted.SerializeToString()


@contextmanager
def serving(
    folder: Path,
    extractor: FeatureExtractor,
    memory: MemoryBank,
    *flags: str,
    program: Sequence[str] = FEDDYMEM,
) -> Iterator[RunningService]:
    """An inference service that has this memory as its release, and nothing else to do."""
    publishing = Publishing(folder / "published", extractor.feature_space, "bench")
    publishing.publish(1, bank_to_wire(memory, "float16"))
    with Fleet(folder / "services") as fleet:
        calls = ("--aggregator", publishing.address, "--retry-seconds", "0.2")
        fleet.launch_with(program, "inference", "inference", *calls, *flags)
        inference = fleet.wait_listening("inference")
        fleet.wait_until(lambda: _answers(inference), 120, "the inference service to score")
        yield inference
    publishing.stop()


def _answers(inference: RunningService) -> bool:
    with grpc.insecure_channel(inference.grpc) as channel:
        try:
            inspect: Any = channel.unary_unary(INSPECT)
            inspect(request(parts.jpegs(1)[0]), timeout=30)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.UNAVAILABLE, error  # noqa: PT017 - no release yet
            return False
        return True


@contextmanager
def _echoing(folder: Path) -> Iterator[str]:
    address = folder / "echo"
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.echo", str(address)])
    try:
        while not address.exists():
            assert process.poll() is None, "the echo server ended"
            sleep(0.02)
        yield address.read_text()
    finally:
        process.terminate()
        process.wait()


def one_caller(
    extractor: FeatureExtractor, memory: MemoryBank, inference: RunningService, echo: str
) -> dict[str, dict[str, float]]:
    """Floors, the library and one caller of the service, in turns."""
    jpegs = parts.jpegs(8)
    scorer = Scorer(extractor, memory, None)
    image = EncodedImage(jpegs[0])
    pixels = extractor.read(image).pixels[None]
    patches = extractor(pixels)[0]
    backbone = parts.bare_backbone()
    search = NearestItems(torch.from_numpy(memory.items), torch.from_numpy(memory.weights > 0), extractor.screen)
    turn = itertools.cycle(jpegs)
    # The search in one thread of torch's, as the library and the service have it.
    with team(1), grpc.insecure_channel(inference.grpc) as served, grpc.insecure_channel(echo) as echoing:
        inspect: Any = served.unary_unary(INSPECT)
        say: Any = echoing.unary_unary(ECHO)
        work = {
            "decode": lambda: extractor.read(image),
            "backbone": lambda: backbone(pixels),
            "search": lambda: search(patches),
            "grpc": lambda: say(request(jpegs[0])),
            "library": lambda: scorer.inspect(extractor.read(EncodedImage(next(turn))).pixels[None]),
            "service": lambda: inspect(request(next(turn))),
        }
        return {name: spread(times) for name, times in interleaved(work, 4 * ROUNDS, 10).items()}


def library_rate(extractor: FeatureExtractor, memory: MemoryBank, batch: int, seconds: float) -> float:
    """Images a second from JPEG to score, verdict and regions; each of several threads takes whole batches."""
    scorer, size = Scorer(extractor, memory, None), extractor.feature_space.input_size
    images = [EncodedImage(jpeg) for jpeg in parts.jpegs(8)]
    until = perf_counter() + seconds

    def work(number: int) -> int:
        turn, done = itertools.islice(itertools.cycle(images), number, None), 0
        while perf_counter() < until:
            pixels = torch.stack([extractor.read(next(turn)).pixels for _ in range(batch)])
            for inspection in scorer.inspect(pixels):
                regions(anomaly_map(inspection.distances, (size, size)), _PIXEL_THRESHOLD, (1024, 1024))
            done += batch
        return done

    start = perf_counter()
    with ThreadPoolExecutor(workers(), initializer=leave_cores) as pool:
        return sum(pool.map(work, range(workers()))) / (perf_counter() - start)


def _load(inference: RunningService, folder: Path, seconds: float, **load: float) -> tuple[Load, dict[str, float]]:
    """A load, and what it cost the service."""
    process = psutil.Process(inference.process.pid)
    bodies = [request(jpeg) for jpeg in parts.jpegs(8)]
    before, images, batches = _cpu(process), *_batches(inference)
    load_seen = run_load(inference.grpc, INSPECT, bodies, folder, seconds, **load)  # type: ignore[arg-type]
    cpu, (images_after, batches_after) = _cpu(process) - before, _batches(inference)
    cost = {
        "cpu_cores": round(cpu / seconds, 2),
        "resident_mib": round(process.memory_info().rss / _MIB, 1),
        "images_per_batch": round((images_after - images) / max(1, batches_after - batches), 2),
    }
    return load_seen, cost


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _batches(inference: RunningService) -> tuple[float, float]:
    """Images and batches computed so far."""
    with urllib.request.urlopen(f"http://{inference.metrics}/metrics") as page:
        text = page.read().decode()
    name = "feddymem_inspection_batch_images"
    values = [re.search(rf"^{name}_{kind} (\S+)$", text, re.MULTILINE) for kind in ("sum", "count")]
    return tuple(float(found[1]) if found else 0.0 for found in values)  # type: ignore[return-value]


def saturated(
    extractor: FeatureExtractor, memory: MemoryBank, inference: RunningService, folder: Path
) -> dict[str, object]:
    """Closed loops and the library in turns; rates are medians over the rounds."""
    closed: dict[int, list[tuple[Load, dict[str, float]]]] = {callers: [] for callers in CALLERS}
    library: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    maps = []
    with_map = [request(jpeg, map_format=MAP_FORMAT_PNG) for jpeg in parts.jpegs(8)]
    for _ in range(ROUNDS):
        for batch, rates in library.items():
            rates.append(library_rate(extractor, memory, batch, SECONDS / 3))
        for callers, loads in closed.items():
            loads.append(_load(inference, folder, SECONDS / 2, callers=callers))
        maps.append(run_load(inference.grpc, INSPECT, with_map, folder, SECONDS / 2, callers=8).per_second)
    rate = {callers: _median([load.per_second for load, _ in loads]) for callers, loads in closed.items()}
    best = {batch: _median(rates) for batch, rates in library.items()}
    return {
        "library_images_per_second": best,
        "service_images_per_second": rate,
        "service_with_map_images_per_second": _median(maps),
        "service_to_library": round(max(rate.values()) / max(best.values()), 3),
        "service_with_map_to_library": round(_median(maps) / max(best.values()), 3),
        "closed_loop": {callers: {**asdict(loads[-1][0]), **loads[-1][1]} for callers, loads in closed.items()},
    }


def overloaded(inference: RunningService, folder: Path, unloaded_ms: float) -> dict[str, object]:
    """Arrivals at OVERLOAD times what the service does at most, against closed loops in turns."""
    process = psutil.Process(inference.process.pid)
    rounds, resident = [], []
    for _ in range(ROUNDS):
        full, _cost = _load(inference, folder, SECONDS / 2, callers=8)
        load, cost = _load(inference, folder, SECONDS, callers=16, rate=OVERLOAD * full.per_second)
        resident.append(process.memory_info().rss / _MIB)
        rounds.append((full, load, cost))
    ratios = [load.per_second / full.per_second for full, load, _ in rounds]
    p99 = _median([load.latency_ms["p99"] for _, load, _ in rounds])
    return {
        "goodput_to_saturated": round(_median(ratios), 3),
        "goodput_to_saturated_of_rounds": [round(ratio, 3) for ratio in ratios],
        "p99_ms": p99,
        "p99_to_unloaded_median": round(p99 / unloaded_ms, 2),
        "refused_ms": {
            name: _median([load.refused_ms[name] for _, load, _ in rounds if load.refused_ms])
            for name in ("median", "p99", "max")
        },
        "resident_mib_of_rounds": [round(value, 1) for value in resident],
        "last": {**asdict(rounds[-1][1]), **rounds[-1][2]},
    }


def _median(values: list[float]) -> float:
    return round(float(np.median(values)), 3)


def main() -> None:
    """Measures and writes benchmarks/results/inspection.json."""
    configure_hardware(None)
    extractor = load_extractor()
    memory = parts.memory(extractor, (ITEMS,))[ITEMS]
    with TemporaryDirectory(prefix="feddymem-bench-") as name, _echoing(Path(name)) as echo:
        folder = Path(name)
        with serving(folder, extractor, memory) as inference:
            times = one_caller(extractor, memory, inference, echo)
            floors = sum(times[part]["median_ms"] for part in ("decode", "backbone", "search", "grpc"))
            latency = times["service"]["median_ms"]
            full = saturated(extractor, memory, inference, folder)
            overload = overloaded(inference, folder, latency)
    write_result(
        "inspection",
        {
            "cores": len(os.sched_getaffinity(0)),
            "memory_items": ITEMS,
            "request_bytes": len(request(parts.jpegs(1)[0])),
            "one_caller": times,
            "sum_of_floors_ms": round(floors, 3),
            "service_to_floors": round(latency / floors, 3),
            "saturated": full,
            "overloaded": overload,
        },
    )


if __name__ == "__main__":
    main()
