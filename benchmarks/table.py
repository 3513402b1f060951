"""The results as tables in Markdown: benchmarks/results/README.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from benchmarks import RESULTS

_HEAD = """# Results

Made by `python -m benchmarks.table` from the JSON files beside it, which the benchmarks wrote. Each file is one run on
one machine, those that tell times with their parts taken in turns; compare ratios, not milliseconds of different
files. What they say: [performance](../../docs/performance.md); of calibration, [verdicts](../../docs/verdicts.md); of
poisoning, [method](../../docs/method.md).
"""


def rows(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Every figure of a result, named by the keys that lead to it; a group of plain figures is one row."""
    if isinstance(value, Mapping):
        if all(not isinstance(inner, Mapping | list) for inner in value.values()):
            yield " / ".join(path), ", ".join(f"{key} {inner}" for key, inner in value.items())
            return
        for key, inner in value.items():
            yield from rows(inner, (*path, str(key)))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for number, inner in enumerate(value, 1):
            yield from rows(inner, (*path, str(number)))
    else:
        yield " / ".join(path), ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def main() -> None:
    """Writes benchmarks/results/README.md."""
    parts = [_HEAD]
    for path in sorted(RESULTS.glob("*.json")):
        lines = [f"| {name} | {figures} |" for name, figures in rows(json.loads(path.read_text()))]
        parts.append("\n".join([f"## {path.stem}", "", "| what | figures |", "|---|---|", *lines, ""]))
    (RESULTS / "README.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
