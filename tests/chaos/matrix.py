"""The kill matrix: in each cell a process dies at one moment, and all is in the end as if it had not.

python -m tests.chaos.matrix                 # every cell
python -m tests.chaos.matrix --random 100    # and deaths of random processes at random times
"""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import grpc
import typer
from rich.console import Console
from rich.table import Table

from feddymem.client import InspectionError
from tests.chaos.cells import Cell, all_cells
from tests.chaos.federation import (
    ROUNDS,
    SITES,
    Outcome,
    PromiseBrokenError,
    Published,
    ReleaseObserver,
    Trial,
    write_images,
)
from tests.chaos.forks import Place
from tests.chaos.inference import InferenceTrial, Line, LineObserver

_UNDISTURBED_RUNS = 3
_DEATHS_OF_A_FEDERATION = 5
_LONGEST_LIFE_SECONDS = 1.5
"""Of a process that is killed at a random time: an undisturbed federation takes about two seconds."""

_FAILURES = (PromiseBrokenError, grpc.RpcError, InspectionError)


@dataclass(frozen=True)
class Undisturbed:
    """What comes of it when nobody dies.

    Attributes:
        outcome: of the federation.
        releases: each release of the federation, by version.
        line: of the first site, with all that was published for it.
        scores: of the line's image, by version.
    """

    outcome: Outcome
    releases: dict[int, Published]
    line: Line
    scores: dict[int, float]


class Matrix:
    """Runs cells against one undisturbed run, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._images = write_images(folder / "images")
        self.undisturbed = self._run_undisturbed()

    def run(self, cell: Cell) -> None:
        """Runs one cell.

        Raises:
            PromiseBrokenError: it ended otherwise than the undisturbed run, or its death never came.
        """
        if cell.process == "inference":
            self._run_inference(cell)
        else:
            with self._watched() as running:
                running.trial.run({cell.process: list(cell.kills)})

    def run_random(self, rng: random.Random) -> Counter[str]:
        """Runs one federation with deaths of random processes at random times; how often each process died."""
        deaths: Counter[str] = Counter()
        with self._watched() as running:
            trial = running.trial
            for name in trial.names:
                trial.start(name)
            for _ in range(_DEATHS_OF_A_FEDERATION):
                time.sleep(rng.uniform(0, _LONGEST_LIFE_SECONDS))
                name = rng.choice(trial.names)
                code = trial.fleet.kill(name)
                if code != -signal.SIGKILL:
                    raise PromiseBrokenError(f"{name} had ended with {code}:\n{trial.fleet.log(name)[-3000:]}")
                deaths[name] += 1
                trial.start(name)
            trial.wait_done(f"after deaths of {dict(deaths)}")
        return deaths

    def trial(
        self,
        folder: Path,
        places: Mapping[str, Place] | None = None,
        flags: Sequence[str] = (),
        site_flags: Sequence[str] = (),
    ) -> Trial:
        """A federation like the undisturbed one."""
        return Trial(folder, self._images, places, flags, site_flags)

    def _watched(self) -> _Watched:
        return _Watched(self._new_folder(), self._images, self.undisturbed)

    def _run_inference(self, cell: Cell) -> None:
        folder = self._new_folder()
        line, expected = self.undisturbed.line, self.undisturbed.scores
        trial = InferenceTrial(folder, line)
        try:
            with LineObserver(trial.address, line.image, expected) as observer:
                scores = trial.run(cell.kills)
        finally:
            trial.close()
        if observer.broken or scores != expected:
            raise PromiseBrokenError(f"scores are {scores}, not {expected}; {observer.broken}")
        shutil.rmtree(folder)

    def _run_undisturbed(self) -> Undisturbed:
        site = SITES[0]
        outcome, memories, generators = self._observe_undisturbed(site)
        published = {("memory", version): release for version, release in memories.items()}
        published |= {("generator", version): release for version, release in generators.items()}
        line = Line(site, min(self._images[site].iterdir()), published)
        inference = InferenceTrial(self._new_folder(), line)
        try:
            scores = inference.run([])
        finally:
            inference.close()
        if scores[ROUNDS] != outcome.scores[site]:
            raise PromiseBrokenError(f"{scores} here, {outcome.scores} in the federation")
        return Undisturbed(outcome, memories, line, scores)

    def _observe_undisturbed(self, site: str) -> tuple[Outcome, dict[int, Published], dict[int, Published]]:
        """Outcome and all releases of memory and generator; a watcher is owed the newest, and so may miss one."""
        versions = set(range(1, ROUNDS + 1))
        for _ in range(_UNDISTURBED_RUNS):
            trial = Trial(self._new_folder(), self._images)
            try:
                with (
                    ReleaseObserver(trial.fleet.address("aggregator")) as memories,
                    ReleaseObserver(trial.fleet.address(site)) as generators,
                ):
                    trial.run({})
                trial.restart_inference_afresh()
                outcome = trial.outcome()
            finally:
                trial.close()
            if broken := memories.broken + generators.broken:
                raise PromiseBrokenError(f"undisturbed, and yet {broken}")
            if set(memories.seen) == set(generators.seen) == versions:
                return outcome, memories.seen, generators.seen
        seen = sorted(memories.seen), sorted(generators.seen)
        raise PromiseBrokenError(f"of {sorted(versions)}, seen of memory and generator: {seen}")

    def _new_folder(self) -> Path:
        return self._folder / f"cell-{next(self._numbers)}"


class _Watched:
    """A federation whose releases are watched, and whose outcome is compared when the block is left."""

    def __init__(self, folder: Path, images: dict[str, Path], undisturbed: Undisturbed) -> None:
        self.trial = Trial(folder, images)
        self._folder, self._undisturbed = folder, undisturbed
        self._observer = ReleaseObserver(self.trial.fleet.address("aggregator"), undisturbed.releases)

    def __enter__(self) -> _Watched:
        self._observer.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        try:
            if kind is None:
                outcome = self.trial.outcome(self._undisturbed.outcome)
        finally:
            self._observer.__exit__()
            self.trial.close()
        if kind is not None:
            return
        if differences := outcome.differences(self._undisturbed.outcome):
            raise PromiseBrokenError(f"not as undisturbed: {differences}")
        if self._observer.broken:
            raise PromiseBrokenError(f"who watched the releases saw: {self._observer.broken}")
        shutil.rmtree(self._folder)


def main(
    random_deaths: Annotated[int, typer.Option("--random", help="Deaths at random times, after the cells.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the random times.")] = 0,
    short: Annotated[bool, typer.Option(help="Only the cells that are tried on each change.")] = False,
    only: Annotated[str, typer.Option(help="Only cells whose name has this in it.")] = "",
) -> None:
    """Runs cells and prints a table."""
    console = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="feddymem-chaos-") as folder:
        matrix = Matrix(Path(folder))
        cells = [cell for cell in all_cells() if (cell.short or not short) and only in str(cell)]
        results = [_result(matrix, cell, console) for cell in cells]
        random_results = _random(matrix, random_deaths, random.Random(seed), console)  # noqa: S311 - no secret
    Console().print(_table(results, random_results))
    raise typer.Exit(any(failure for *_, failure in [*results, *random_results]))


def _result(matrix: Matrix, cell: Cell, console: Console) -> tuple[str, int, str]:
    started = time.monotonic()
    try:
        matrix.run(cell)
        failure = ""
    except _FAILURES as error:
        failure = str(error)
    console.print(f"{cell}: {failure or 'ok'} ({time.monotonic() - started:.1f} s)", markup=False, highlight=False)
    return cell.process, len(cell.kills), failure


def _random(matrix: Matrix, deaths: int, rng: random.Random, console: Console) -> list[tuple[str, int, str]]:
    results: list[tuple[str, int, str]] = []
    for number in range(-(-deaths // _DEATHS_OF_A_FEDERATION)):
        try:
            died, failure = matrix.run_random(rng), ""
        except _FAILURES as error:
            died, failure = Counter({"random": _DEATHS_OF_A_FEDERATION}), str(error)
        console.print(f"random {number}: {dict(died)}: {failure or 'ok'}", markup=False, highlight=False)
        results += [(f"{name}, at random times", count, failure) for name, count in died.items()]
    return results


def _table(*results: Iterable[tuple[str, int, str]]) -> Table:
    table = Table("process", "cells", "kills", "result")
    rows = list(itertools.chain(*results))
    for process in dict.fromkeys(row[0] for row in rows):
        own = [row for row in rows if row[0] == process]
        failed = sum(1 for *_, failure in own if failure)
        table.add_row(process, str(len(own)), str(sum(row[1] for row in own)), f"{failed} failed" if failed else "ok")
    return table


if __name__ == "__main__":
    typer.run(main)
