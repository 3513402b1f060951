"""Measurements, each a module: `python -m benchmarks.NAME`. Results go to benchmarks/results/NAME.json."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as `feddymem` does, before anything loads torch

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, result: Mapping[str, object]) -> None:
    """Writes and prints a benchmark's result."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)


def spread(milliseconds: list[float]) -> dict[str, float]:
    """Median, and the tenth and ninetieth percentile."""
    low, middle, high = np.percentile(milliseconds, (10, 50, 90))
    return {"median_ms": round(middle, 3), "p10_ms": round(low, 3), "p90_ms": round(high, 3)}


def interleaved(work: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 5) -> dict[str, list[float]]:
    """Milliseconds of each piece of work, taken in turns, so that a noisy minute is noisy for all of them.

    Each turn runs a piece once without counting it, because what ran before it has left its data in the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            run()
            for _ in range(repeats):
                start = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - start) * 1000)
    return times
