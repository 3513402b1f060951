"""`feddymem evaluate`: methods compared on a data set, in one process, with the services' own library code."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from feddymem.backbone import FeatureExtractor, load_extractor
from feddymem.comparison import CONTENDERS
from feddymem.dataset_files import load_sites
from feddymem.datasets import DatasetError, SiteData
from feddymem.experiment import METRICS, Experiment, Result, drawn, extract_all, run, seeds_run
from feddymem.feature_cache import FeatureCache
from feddymem.folders import cache_folder
from feddymem.images import ImageError
from feddymem.method import Method
from feddymem.network import EMBEDDED_BACKBONE
from feddymem.progress import Progress as Report
from services.cli.consoles import standard_error, standard_output
from services.cli.exit_codes import FAILED, OK, USAGE
from services.evaluate.report import COLUMNS, cells, write_report
from services.runtime.hardware import configure_hardware

_SPEED_SECONDS = 3600
"""The time left is estimated from this long before; a run takes minutes."""
_MOST_SEEDS = 1000
_SHOWN = ("image_auroc", "pixel_auroc", "aupro", "false_alarm_rate", "detection_rate", "guaranteed_rate", "seconds")


class InvalidChoiceError(ValueError):
    """A flag names no method or no seed."""


@dataclass(frozen=True)
class Backbone:
    """Which backbone extracts features; see `load_extractor`.

    Attributes:
        name: timm model; "" for the embedded one.
        checkpoint: its weights; None for those that come with it.
        input_size: side of the square that images are stretched to, in pixels.
        tile_size: side of the tiles that the network sees, in pixels; None for the whole image.
        tile_overlap: how far tiles overlap at least, in pixels.
        device: "cpu", "cuda" or "auto".
    """

    name: str
    checkpoint: Path | None
    input_size: int
    tile_size: int | None
    tile_overlap: int
    device: str

    def load(self) -> FeatureExtractor:
        """The extractor.

        Raises:
            InvalidChoiceError: a name, checkpoint, size or device that cannot be.
        """
        try:
            return load_extractor(
                self.name or EMBEDDED_BACKBONE,
                self.checkpoint,
                self.input_size,
                self.tile_size,
                self.tile_overlap,
                self.device,
            )
        except (ValueError, FileNotFoundError) as error:
            raise InvalidChoiceError(str(error)) from error


def evaluate(
    data: Path,
    out: Path,
    methods: str,
    seeds: str,
    train_images: int | None,
    method: Method,
    cache: Path | None,
    backbone: Backbone,
) -> int:
    """Runs the evaluation; the exit code. An interruption is raised, and leaves the report of the methods done."""
    signal.signal(signal.SIGTERM, _interrupt)
    configure_hardware(None)
    console = standard_error()
    try:
        names, numbers = parse_methods(methods), parse_seeds(seeds)
        sites = _load(data)
        extractor = backbone.load()
        features = FeatureCache(cache or cache_folder(), extractor)
        out.mkdir(parents=True, exist_ok=True)  # before hours of work, should it not be possible
        for results in _results(sites, names, numbers, train_images, method, features, console):
            experiment = Experiment(str(data), extractor.feature_space, method, numbers, train_images, results)
            write_report(experiment, out)
    except (InvalidChoiceError, DatasetError, ImageError, OSError) as error:
        console.print(f"feddymem evaluate: {error}")
        return FAILED if isinstance(error, OSError) else USAGE
    standard_output().print(_table(experiment))
    console.print(f"report: {out / 'report.html'}, {out / 'report.md'} and {out / 'report.json'}")
    return OK


def parse_methods(text: str) -> tuple[str, ...]:
    """Names of methods from a list separated by commas; all for an empty text.

    Raises:
        InvalidChoiceError: a name that no method has, or one twice.
    """
    names = tuple(name.strip() for name in text.split(",")) if text else tuple(CONTENDERS)
    for name in names:
        if name not in CONTENDERS:
            raise InvalidChoiceError(f"--methods: {name!r} is none of the methods {', '.join(CONTENDERS)}")
        if names.count(name) > 1:
            raise InvalidChoiceError(f"--methods: {name!r} is there twice; name each once")
    return names


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from a list separated by commas, or from their number; "0" is the seed 0.

    Raises:
        InvalidChoiceError: neither, or a seed twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) < 2**63 for part in parts):
        raise InvalidChoiceError(
            f"--seeds: {text!r} is neither whole numbers like 0,1,2 nor the number of seeds like 3"
        )
    numbers = tuple(int(part) for part in parts)
    if len(numbers) > 1:
        if len(set(numbers)) < len(numbers):
            raise InvalidChoiceError(f"--seeds: {text!r} has a seed twice; name each once")
        return numbers
    if numbers[0] > _MOST_SEEDS:
        raise InvalidChoiceError(f"--seeds: {numbers[0]} seeds are more than {_MOST_SEEDS}; give fewer, or a list")
    return tuple(range(max(1, numbers[0])))


def _load(data: Path) -> tuple[SiteData, ...]:
    sites = load_sites(data)
    if not any(site.test for site in sites):
        raise DatasetError(f"data set {data} has no test image; an evaluation needs some")
    return sites


def _results(
    sites: tuple[SiteData, ...],
    names: tuple[str, ...],
    seeds: tuple[int, ...],
    train_images: int | None,
    method: Method,
    cache: FeatureCache,
    console: Console,
) -> Iterator[dict[str, Result]]:
    """Results of the methods done so far, whenever one more is; with a bar for all runs and one for the step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: dict[str, Result] = {}

    def seeds_of(name: str) -> Sequence[int]:
        return seeds_run(name, seeds, method.hold_out_share, train_images)

    with Progress(*columns, TimeRemainingColumn(), console=console, speed_estimate_period=_SPEED_SECONDS) as bars:
        show = _step(bars)
        extract_all(sites, cache, show)
        overall = bars.add_task("runs", total=sum(len(seeds_of(name)) for name in names))
        for name in names:
            runs = []
            for seed in seeds_of(name):
                seeded = method.model_copy(update={"seed": seed})
                runs.append(run(drawn(sites, train_images, seed), name, seeded, cache, show))
                bars.advance(overall)
                auroc, seconds = runs[-1].mean["image_auroc"], runs[-1].mean["seconds"]
                console.print(f"{name}, seed {seed}: image AUROC {auroc:.3f}, {seconds:.0f} s")
            results[name] = Result(tuple(runs))
            yield results


def _step(bars: Progress) -> Report:
    """A bar that shows one step after the other."""
    task = bars.add_task("", total=None)
    shown = ("", 0)

    def show(what: str, done: int, total: int) -> None:
        nonlocal shown
        if what != shown[0] or done < shown[1]:
            bars.reset(task, description=what)
        bars.update(task, completed=done, total=total)
        shown = (what, done)

    return show


def _table(experiment: Experiment) -> Table:
    """The figures that fit a terminal of 80 characters; all are in the report."""
    headings = dict(zip(METRICS, COLUMNS, strict=True))
    figures = (Column(headings[key], justify="right") for key in _SHOWN)
    table = Table(Column("method", no_wrap=True), *figures, title="mean over sites and seeds", box=None)
    for name, result in experiment.results.items():
        texts = dict(zip(METRICS, cells(result.mean), strict=True))
        table.add_row(name, *(texts[key] for key in _SHOWN))
    return table


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
