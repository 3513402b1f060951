"""Measurements, each a module: `python -m benchmarks.NAME`. Results go to benchmarks/results/NAME.json."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, result: dict[str, object]) -> None:
    """Writes and prints a benchmark's result."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
