"""The edge side: features a second against the bare backbone, memory-reduce against a greedy coreset, aggregation.

The greedy coreset is k-centre as PatchCore's implementations have it: all patches in memory, and after every pick the
distance of each to it. Both reduce the same patches to the same number of items, each in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks import interleaved, parts, spread, write_result
from feddymem import memory_reduce
from feddymem.aggregate import aggregate
from feddymem.backbone import FeatureExtractor, load_extractor
from feddymem.distances import nearest_items
from feddymem.experiment import peak_memory, reset_peak_memory
from feddymem.feature_cache import FeatureCache
from feddymem.image_data import EncodedImage
from feddymem.memory import MemoryBank
from feddymem.patches import images_per_block
from feddymem.threads import leave_cores, workers
from services.runtime.hardware import configure_hardware

IMAGES = 500
DRAWN = 100
ITEMS = 1568
BATCH = 8
ROUNDS = 5
SITES = (10, 100, 1000)
_MIB = 2**20

app = typer.Typer()


def extraction(extractor: FeatureExtractor, folder: Path) -> dict[str, object]:
    """Images a second: the backbone alone on prepared images, and files to patch features on disk; in turns.

    Where decoding and backbone share the cores, CPU time bounds what extraction can reach: `bound_by_cpu`, the
    backbone's share of the CPU time that both take alone.
    """
    paths = []
    for number, data in enumerate(parts.jpegs(8 * BATCH)):
        paths.append(folder / f"{number}.jpg")
        paths[-1].write_bytes(data)
    pixels = torch.stack([extractor.read(EncodedImage(data)).pixels for data in parts.jpegs(BATCH)])
    backbone, threads = parts.bare_backbone(), workers()

    def bare() -> None:
        for _ in range(len(paths) // BATCH):
            backbone(pixels)

    def decode() -> None:
        with ThreadPoolExecutor(threads, initializer=leave_cores) as pool:
            list(pool.map(extractor.read_file, paths))

    def extracted() -> None:
        with TemporaryDirectory(dir=folder) as cache:
            FeatureCache(Path(cache), extractor).extract(paths)

    work = {
        "backbone": bare,
        "decoding": decode,
        "extraction": extracted,
    }
    times = interleaved(work, ROUNDS, 2)
    cpu = _cpu_milliseconds(work, ROUNDS)
    rates = {name: round(len(paths) / np.median(values) * 1000, 1) for name, values in times.items()}
    return {
        "images_per_second": rates,
        "milliseconds": {name: spread(values) for name, values in times.items()},
        "extraction_to_backbone": round(rates["extraction"] / rates["backbone"], 3),
        "cpu_milliseconds_per_image": {name: round(value / len(paths), 2) for name, value in cpu.items()},
        "bound_by_cpu": round(cpu["backbone"] / (cpu["backbone"] + cpu["decoding"]), 3),
    }


def _cpu_milliseconds(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU time of each piece of work, of all its threads, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            start = time.process_time()
            run()
            times[name].append((time.process_time() - start) * 1000)
    return {name: float(np.median(values)) for name, values in times.items()}


class Patches:
    """Patch features of images in one file of float16, read block by block; see `feddymem.patches.PatchSource`."""

    patches_per_image, channels = 784, 152

    def __init__(self, path: Path, images: int) -> None:
        self.path, self.images = path, images

    def blocks(self) -> Iterator[Tensor]:
        """See PatchSource."""
        shape = (self.patches_per_image, self.channels)
        step = images_per_block(*shape)
        with self.path.open("rb") as file:
            for start in range(0, self.images, step):
                block = torch.empty(min(step, self.images - start), *shape)
                for image in block:
                    image.view(-1).copy_(torch.from_numpy(np.fromfile(file, np.float16, image.numel())))
                yield block


def _patches(extractor: FeatureExtractor, folder: Path) -> Patches:
    """Patches of IMAGES images: of DRAWN again and again, each time with a little noise of its own."""
    paths = []
    for number in range(DRAWN):
        paths.append(folder / f"part{number}.jpg")
        paths[-1].write_bytes(parts.jpeg(parts.picture(number, 512)))
    drawn = FeatureCache(folder / "drawn", extractor).extract(paths).patches
    rng = torch.Generator().manual_seed(0)
    with (folder / "patches.f16").open("wb") as file:
        for _ in range(IMAGES // DRAWN):
            for block in drawn.blocks():
                file.write((block + torch.randn(block.shape, generator=rng)).numpy().astype(np.float16).data)
    return Patches(folder / "patches.f16", IMAGES)


def greedy(patches: Tensor, count: int) -> Tensor:
    """Items by plain greedy k-centre, (count, channels)."""
    picks, nearest = [0], torch.full((len(patches),), torch.inf)
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, (patches - patches[picks[-1]]).square().sum(1))
        picks.append(int(nearest.argmax()))
    return patches[picks]


@app.command()
def reduce(how: str, file: Path, images: int, out: Path) -> None:
    """One reduction, in this process; prints seconds and the growth of its peak memory in MiB."""
    configure_hardware(None)
    source = Patches(file, images)
    next(source.blocks())  # what reading costs once is not the reduction's
    reset_peak_memory()  # what imports held at their most is not the reduction's
    before, start = peak_memory(), time.perf_counter()
    if how == "memory-reduce":
        items = memory_reduce.reduce(source, ITEMS).items
    else:
        items = greedy(torch.cat([block.flatten(0, 1) for block in source.blocks()]), ITEMS).numpy()
    seconds, growth = time.perf_counter() - start, (peak_memory() - before) / _MIB
    np.save(out, items)
    print(json.dumps({"seconds": round(seconds, 2), "peak_growth_mib": round(growth, 1)}))


def reduction(patches: Patches, folder: Path) -> dict[str, object]:
    """Time, memory and coverage of both."""
    result: dict[str, object] = {}
    seen = torch.cat([block[:, ::16].flatten(0, 1) for block in patches.blocks()])
    for how in ("memory-reduce", "greedy"):
        runs = []
        for _ in range(2):
            out = folder / f"{how}.npy"
            command = [sys.executable, "-m", "benchmarks.edge", "reduce", how, str(patches.path)]
            done = subprocess.run([*command, str(patches.images), str(out)], check=True, capture_output=True)
            runs.append(json.loads(done.stdout))
        distances, _ = nearest_items(seen, torch.from_numpy(np.load(out)))
        result[how] = {
            "runs": runs,
            "mean_distance": round(float(distances.mean()), 3),
            "largest_distance": round(float(distances.max()), 3),
        }
    return {"images": patches.images, "items": ITEMS, **result}


def aggregation(channels: int) -> dict[str, float]:
    """Seconds to merge the banks of so many sites into 12,288 items."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(64, channels)).astype(np.float32) * 8
    seconds = {}
    for count in SITES:
        banks = []
        for _ in range(count):
            items = centres[rng.integers(0, len(centres), ITEMS)] + rng.normal(size=(ITEMS, channels))
            banks.append(
                MemoryBank(items.astype(np.float32), np.ones((ITEMS, 1), np.float32), np.ones(ITEMS, np.float32))
            )
        seconds[str(count)] = _seconds(lambda banks=banks: aggregate(banks, 12_288))  # type: ignore[misc]
    return seconds


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return round(time.perf_counter() - start, 2)


@app.command()
def main() -> None:
    """Measures and writes benchmarks/results/edge.json."""
    configure_hardware(None)
    extractor = load_extractor()
    with TemporaryDirectory(prefix="feddymem-bench-") as name:
        folder = Path(name)
        result = {
            "extraction": extraction(extractor, folder),
            "reduction": reduction(_patches(extractor, folder), folder),
            "aggregation_seconds_by_sites": aggregation(extractor.feature_space.channels),
        }
    write_result("edge", result)


if __name__ == "__main__":
    app() if len(sys.argv) > 1 else main()
