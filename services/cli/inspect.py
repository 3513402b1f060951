"""`feddymem inspect`."""

from __future__ import annotations

import csv
import dataclasses
import glob
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from feddymem.client import (
    InspectionClient,
    InspectionError,
    InspectionResult,
    MapKind,
    NotServedError,
    UnavailableError,
    Wishes,
)
from feddymem.client.tls import TlsError
from feddymem.datasets import SUFFIXES, DatasetError, list_images
from services.cli.consoles import standard_error, standard_output
from services.cli.exit_codes import FAILED, OK, REFUSED, SOME_IMAGES_FAILED, USAGE
from services.runtime import trace_export
from services.runtime.logs import configure_logs

STANDARD_OUTPUT = "-"
_CSV_COLUMNS = (
    *("image", "score", "verdict", "threshold", "p_value", "normalised_score", "guaranteed_rate", "guaranteed_images"),
    *("regions", "federation", "site", "release", "queue_seconds", "compute_seconds", "heatmap", "error", "code"),
)

_errors = standard_error()

Sink = Callable[[dict[str, Any]], None]
"""Takes what became of each image, as `--json` prints it."""


@dataclass(frozen=True)
class Inspection:
    """What `feddymem inspect` is asked for.

    Attributes:
        images: files, folders and patterns.
        server: gRPC target of the inference service.
        tls_dir: folder of the TLS files, if any.
        federation: name, or empty.
        site: name, or empty.
        threshold: score from which the verdict is anomalous; None for the calibrated one.
        pixel_threshold: distance from which pixels make up regions; None for the calibrated one.
        false_alarm_rate: that these are for; None for the federation's.
        regions: whether regions are wanted.
        heatmaps: folder to write heatmaps to.
        as_json: whether to print JSON lines.
        csv: file to write, or `STANDARD_OUTPUT`.
    """

    images: tuple[str, ...]
    server: str
    tls_dir: Path | None
    federation: str
    site: str
    threshold: float | None
    pixel_threshold: float | None
    false_alarm_rate: float | None
    regions: bool
    heatmaps: Path | None
    as_json: bool
    csv: str | None

    @property
    def prints_lines(self) -> bool:
        """Whether results go to standard output one by one."""
        return self.as_json or self.csv == STANDARD_OUTPUT


def inspect(asked: Inspection) -> int:
    """Inspects images and prints, or writes, the results; the exit code."""
    if asked.as_json and asked.csv == STANDARD_OUTPUT:
        return _fail("--json and --csv - both go to standard output; give --csv a file", USAGE)
    try:
        paths = find_images(asked.images)
        if trace_export.wanted():
            configure_logs("auto")  # of its trouble; standard output is for results
        with trace_export.exported_traces("inspect"), ExitStack() as outputs:
            table = _Table(asked) if not asked.as_json and asked.csv is None else None
            sinks = [table.add] if table else list(_line_sinks(asked, outputs))
            code = _inspect(asked, paths, sinks)
    except (DatasetError, TlsError, trace_export.InvalidVariableError) as error:
        return _fail(str(error), USAGE)
    except BrokenPipeError:  # whoever reads the lines has had enough: typer ends quietly
        raise
    except OSError as error:
        return _fail(f"cannot write results: {error}", FAILED)
    if table:
        table.print()
    return code


def find_images(inputs: Sequence[str]) -> tuple[Path, ...]:
    """The images that files, folders and patterns mean: in their order, each once.

    A folder means all images in it at any depth, a pattern all images and folders that match it (`**` for any depth),
    sorted. A file that is named itself counts whatever its suffix.

    Raises:
        DatasetError: nothing there, or nothing that is an image.
    """
    return tuple(dict.fromkeys(path for each in inputs for path in _find(each)))


def _find(text: str) -> Iterable[Path]:
    if Path(text).is_dir():
        return list_images(Path(text))
    if Path(text).exists():
        return (Path(text),)
    matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207 - Path.glob knows no absolute pattern
    found = [path for path in matches if path.suffix.lower() in SUFFIXES and path.is_file()]
    in_folders = [path for folder in matches if folder.is_dir() for path in _images_in(folder)]
    if not found and not in_folders:
        raise DatasetError(f"no such image file, folder or pattern: {text}")
    return sorted({*found, *in_folders})


def _images_in(folder: Path) -> tuple[Path, ...]:
    try:
        return list_images(folder)
    except DatasetError:  # one of several that match
        return ()


def _inspect(asked: Inspection, paths: tuple[Path, ...], sinks: Sequence[Sink]) -> int:
    """Inspects until the end, or until nobody answers."""
    started, counts = time.monotonic(), Counter[str]()
    for number, (path, outcome) in enumerate(_outcomes(asked, paths)):
        if isinstance(outcome, InspectionError):
            _errors.print(f"feddymem: {path}: {outcome}")
        if isinstance(outcome, UnavailableError | NotServedError):
            return REFUSED
        row = _row(path, outcome, _write_heatmap(asked.heatmaps, number, path, outcome))
        for sink in sinks:
            sink(row)
        counts[_kind(outcome)] += 1
    seconds = time.monotonic() - started
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    _errors.print(f"{len(paths)} images in {seconds:.1f} s ({len(paths) / seconds:.1f} a second): {kinds}")
    return SOME_IMAGES_FAILED if counts["failed"] else OK


def _outcomes(asked: Inspection, paths: tuple[Path, ...]) -> Iterator[tuple[Path, InspectionResult | InspectionError]]:
    client = InspectionClient(asked.server, federation=asked.federation, site=asked.site, tls_dir=asked.tls_dir)
    with _progress(asked) as progress, client:
        bar = progress.add_task("inspecting", total=len(paths))
        for outcome in zip(paths, client.inspect_many(paths, **_wishes(asked)), strict=True):
            yield outcome
            progress.advance(bar)


def _wishes(asked: Inspection) -> Wishes:
    kind: MapKind = "none" if asked.heatmaps is None else "png"
    return Wishes(
        map_kind=kind,
        threshold=asked.threshold,
        pixel_threshold=asked.pixel_threshold,
        false_alarm_rate=asked.false_alarm_rate,
        regions=asked.regions,
    )


def _write_heatmap(
    folder: Path | None, number: int, path: Path, outcome: InspectionResult | InspectionError
) -> Path | None:
    if folder is None or isinstance(outcome, InspectionError) or outcome.heatmap_png is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    # Numbered, because images of different folders may have the same name.
    file = folder / f"{number:05}_{path.stem}.png"
    file.write_bytes(outcome.heatmap_png)
    return file


def _kind(outcome: InspectionResult | InspectionError) -> str:
    if isinstance(outcome, InspectionError):
        return "failed"
    return outcome.verdict.value if outcome.verdict else "scored"


def _row(path: Path, outcome: InspectionResult | InspectionError, heatmap: Path | None) -> dict[str, Any]:
    if isinstance(outcome, InspectionError):
        return {"image": str(path), "error": str(outcome), "code": outcome.status.value[0]}
    known = outcome.guarantee
    row: dict[str, Any] = {
        "image": str(path),
        "score": outcome.score,
        "verdict": outcome.verdict.value if outcome.verdict else None,
        "threshold": outcome.threshold,
        "p_value": outcome.p_value,
        "normalised_score": outcome.normalised_score,
        "guaranteed_rate": None if known is None else known.false_alarm_rate,
        "guaranteed_images": None if known is None else known.images,
        "regions": [dataclasses.asdict(region) for region in outcome.regions],
        "federation": outcome.federation,
        "site": outcome.site,
        "release": outcome.release,
        "queue_seconds": outcome.queue_seconds,
        "compute_seconds": outcome.compute_seconds,
    }
    return row if heatmap is None else {**row, "heatmap": str(heatmap)}


def _line_sinks(asked: Inspection, outputs: ExitStack) -> Iterator[Sink]:
    if asked.as_json:
        yield lambda row: print(json.dumps(row), flush=True)
    if asked.csv is not None:
        yield _csv_sink(outputs.enter_context(_opened(asked.csv)))


def _csv_sink(file: TextIO) -> Sink:
    writer = csv.DictWriter(file, _CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()

    def write(row: dict[str, Any]) -> None:
        writer.writerow({**row, "regions": len(row["regions"]) if "regions" in row else ""})
        file.flush()

    return write


@contextmanager
def _opened(name: str) -> Iterator[TextIO]:
    if name == STANDARD_OUTPUT:
        yield sys.stdout
    else:
        with Path(name).open("w", newline="", encoding="utf-8") as file:
            yield file


class _Table:
    """Results for a person, printed when all are there."""

    def __init__(self, asked: Inspection) -> None:
        self._with_regions = asked.regions or asked.pixel_threshold is not None
        headings = ("score", "verdict", "p", "guaranteed\nrate", "0..1", "regions", "release")
        columns = (Column("image", overflow="fold"), *(Column(heading, no_wrap=True) for heading in headings))
        self._table = Table(*columns, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # narrow: 80 columns are enough

    def add(self, row: dict[str, Any]) -> None:
        if "error" in row:
            return
        names = ("p_value", "guaranteed_rate", "normalised_score")
        calibrated = ("-" if row[name] is None else f"{row[name]:.3f}" for name in names)
        regions = str(len(row["regions"])) if self._with_regions else "-"
        score, verdict = f"{row['score']:.4f}", row["verdict"] or "-"
        self._table.add_row(row["image"], score, verdict, *calibrated, regions, str(row["release"]))

    def print(self) -> None:
        if self._table.row_count:
            standard_output().print(self._table)


def _progress(asked: Inspection) -> Progress:
    """A bar for a person, unless lines of results on the same terminal show how far it is."""
    shown = _errors.is_terminal and not (asked.prints_lines and sys.stdout.isatty())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Results are for standard output, which rich would take over with the bar.
    return Progress(*columns, console=_errors, transient=True, disable=not shown, redirect_stdout=False)


def _fail(text: str, code: int) -> int:
    _errors.print(f"feddymem: {text}")
    return code
