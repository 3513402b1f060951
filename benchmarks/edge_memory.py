"""Peak memory of an edge client against the number of images: `feddymem edge --once` on 200 and on 4,000 images.

The images are synthetic products, repeated by hard links. Every run is a federation of its own with two rounds, so that
extraction, training of the generator, memory-reduce and upload all take part in the peak.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import write_result
from feddymem.dataset_files import load_sites
from feddymem.synthetic import write_products
from services.demo.processes import Fleet

COUNTS = (200, 4000)
BAR_MIB = 200
_MIB = 2**20


def main() -> None:
    """Measures and reports the growth."""
    peaks: dict[int, float] = {}
    seconds: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="feddymem-bench-") as name:
        folder = Path(name)
        write_products(folder / "products")
        originals = load_sites(folder / "products")[0].train
        for count in COUNTS:
            images = folder / f"images-{count}"
            images.mkdir()
            for number in range(count):
                os.link(originals[number % len(originals)], images / f"{number:05}.png")
            started = time.perf_counter()
            peaks[count] = _peak_mib(folder / f"run-{count}", images)
            seconds[count] = time.perf_counter() - started
    growth = peaks[COUNTS[1]] - peaks[COUNTS[0]]
    write_result(
        "edge_memory",
        {
            "peak_mib": {str(count): round(peak, 1) for count, peak in peaks.items()},
            "seconds": {str(count): round(value, 1) for count, value in seconds.items()},
            "growth_mib": round(growth, 1),
            "bar_mib": BAR_MIB,
            "holds": growth < BAR_MIB,
        },
    )


def _peak_mib(folder: Path, images: Path) -> float:
    """Peak resident memory of one edge client that takes part in two rounds."""
    with Fleet(folder) as fleet:
        folder.mkdir()
        config = folder / "aggregator.yaml"
        config.write_text("federations: {bench: {quorum: 1, method: {rounds: 2}}}\n")
        aggregator = fleet.start("aggregator", "aggregator", "--config", str(config))
        flags = [
            "--aggregator",
            aggregator.grpc,
            "--federation",
            "bench",
            "--site",
            "bench",
            "--data",
            str(images),
            "--once",
        ]
        addresses = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--state-dir", str(folder / "edge")]
        edge = subprocess.Popen(
            [sys.executable, "-m", "services.cli", "edge", *flags, *addresses], stderr=subprocess.DEVNULL
        )
        _pid, status, usage = os.wait4(edge.pid, 0)
        edge.returncode = os.waitstatus_to_exitcode(status)
        if edge.returncode:
            raise RuntimeError(f"the edge client ended with exit code {edge.returncode}")
        return usage.ru_maxrss * 1024 / _MIB


if __name__ == "__main__":
    main()
