"""A federation at work for a long time: round after round, swap after swap, new images now and then, lines that
inspect all the while. No inspection may fail, and no process may grow.

python -m tests.chaos.soak --minutes 30
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import grpc
import psutil
import typer
import yaml
from rich.console import Console
from rich.table import Table

from feddymem.client import InspectionClient, InspectionError
from feddymem.synthetic import write_products
from feddymem.v1.federation_pb2 import FederationStatus, GetStatusRequest
from feddymem.v1.federation_pb2_grpc import FederationServiceStub
from services.demo.processes import Fleet

SITES = ("brick-hall", "dim-hall")
BAR = 0.05
"""Growth from which on a process is said to leak: of the memory after the warm-up."""
_METHOD = {"generator": True, "bank_items": 64, "memory_items": 128, "rounds": 100_000, "seed": 0}
_INPUT_SIZE = 64
_IMAGES = 8
"""Of a site at a time: when a new one comes, the oldest goes."""
_NEW_IMAGE_SECONDS = 10
_INSPECTIONS_PER_SECOND = 5
"""Of each line."""
_LINES = (*SITES, SITES[0])
_SAMPLE_SECONDS = 2
_REPORT_SECONDS = 60
_ANSWER_SECONDS = 10
_START_SECONDS = 120
_THREADS = ("--threads", "1")
_MIB = 2**20


@dataclass(frozen=True, eq=False)
class Soaked:
    """What a soak has shown.

    Attributes:
        seconds: how long it was.
        memory: resident memory of each process, in bytes: seconds since the start, and size.
        rounds: that the federation has finished.
        swaps: releases that a line has seen one after the other, all lines together.
        inspections: of all lines.
        failures: texts of inspections that failed, after the repetitions of the client library.
        new_images: that were put into the folders of sites.
    """

    seconds: float
    memory: Mapping[str, list[tuple[float, float]]]
    rounds: int
    swaps: int
    inspections: int
    failures: list[str]
    new_images: int

    def growth(self, name: str) -> tuple[float, float]:
        """Median memory of a process after the warm-up, a sixth of the time, and at the end, in a tenth of it each."""
        samples, window = self.memory[name], self.seconds / 10
        start = self.seconds / 6
        early = [size for when, size in samples if start <= when < start + window]
        late = [size for when, size in samples if when >= self.seconds - window]
        return statistics.median(early), statistics.median(late)

    def leaks(self) -> list[str]:
        """Processes that have grown by more than the bar."""
        return [name for name in self.memory if self.growth(name)[1] > (1 + BAR) * self.growth(name)[0]]


class Soak:
    """A federation of real processes in a folder, with lines of its own."""

    def __init__(self, folder: Path) -> None:
        write_products(folder / "products")
        self._folders = {site: folder / site for site in SITES}
        self._fresh = {site: deque(sorted((folder / "products" / site).glob("*/good/*.png"))) for site in SITES}
        self._numbers = dict.fromkeys(SITES, 0)
        for site in SITES:
            self._folders[site].mkdir()
            for _ in range(_IMAGES):
                self._add_image(site)
        self._fleet = Fleet(folder / "services")
        config = folder / "aggregator.yaml"
        config.write_text(yaml.safe_dump({"federations": {"parts": {"sites": list(SITES), "method": _METHOD}}}))
        flags = ["--config", str(config), *_THREADS]
        self._services = {"aggregator": self._fleet.start("aggregator", "aggregator", *flags)}

    def run(self, seconds: float, console: Console) -> Soaked:
        """Has it work for so long, from the first release on.

        Raises:
            ServiceFailedError: a service ended, or did not come up.
        """
        with self._fleet:
            self._join()
            lines = [_Line(self._services["inference"].grpc, site, self._folders[site]) for site in _LINES]
            self._fleet.wait_until(lambda: self._status().release > 0, _START_SECONDS, "the first release")
            self._wait_served()
            first = self._status().release
            for line in lines:
                line.start()
            try:
                memory, new_images = self._watch(seconds, lines, console)
            finally:
                for line in lines:
                    line.stop.set()
                for line in lines:
                    line.join()
            return Soaked(
                seconds=seconds,
                memory=memory,
                rounds=self._status().release - first,
                swaps=sum(line.swaps for line in lines),
                inspections=sum(line.inspections for line in lines),
                failures=[failure for line in lines for failure in line.failures],
                new_images=new_images,
            )

    def _join(self) -> None:
        aggregator = ["--aggregator", self._services["aggregator"].grpc]
        for site in SITES:
            flags = ["--federation", "parts", "--site", site, "--data", str(self._folders[site])]
            self._fleet.launch(site, "edge", *aggregator, *flags, "--input-size", str(_INPUT_SIZE), *_THREADS)
        self._services |= {site: self._fleet.wait_listening(site) for site in SITES}
        edges = [flag for site in SITES for flag in ("--edge-clients", self._services[site].grpc)]
        self._services["inference"] = self._fleet.start("inference", "inference", *aggregator, *edges, *_THREADS)

    def _wait_served(self) -> None:
        """Until there is something to score each site's images with."""

        def served(site: str) -> bool:
            with InspectionClient(self._services["inference"].grpc, site=site, attempts=1) as client:
                try:
                    client.inspect(min(self._folders[site].iterdir()))
                except InspectionError:
                    return False
                return True

        self._fleet.wait_until(lambda: all(map(served, SITES)), _START_SECONDS, "the first release to be served")

    def _watch(
        self, seconds: float, lines: list[_Line], console: Console
    ) -> tuple[dict[str, list[tuple[float, float]]], int]:
        """Samples memory and brings new images; the samples, and how many images."""
        memory: dict[str, list[tuple[float, float]]] = {name: [] for name in self._services}
        started, new_images, reported = time.monotonic(), 0, 0.0
        while (elapsed := time.monotonic() - started) < seconds:
            self._fleet.check_alive()
            for name, service in self._services.items():
                memory[name].append((elapsed, float(psutil.Process(service.process.pid).memory_info().rss)))
            if elapsed >= (new_images + 1) * _NEW_IMAGE_SECONDS:
                self._add_image(SITES[new_images % len(SITES)])
                new_images += 1
            if elapsed - reported >= _REPORT_SECONDS:
                reported = elapsed
                console.print(self._progress(elapsed, memory, lines), highlight=False)
            time.sleep(_SAMPLE_SECONDS)
        return memory, new_images

    def _progress(self, elapsed: float, memory: Mapping[str, list[tuple[float, float]]], lines: list[_Line]) -> str:
        sizes = ", ".join(f"{name} {samples[-1][1] / _MIB:.1f}" for name, samples in memory.items())
        inspections = sum(line.inspections for line in lines)
        failed = sum(len(line.failures) for line in lines)
        return (
            f"{elapsed / 60:.0f} min: release {self._status().release}, {inspections} inspections, {failed} failed; "
            f"MiB: {sizes}"
        )

    def _add_image(self, site: str) -> None:
        """Brings the next image, under a name of its own, and takes the oldest away where there are enough."""
        image = self._fresh[site][0]
        self._fresh[site].rotate(-1)
        self._numbers[site] += 1
        folder = self._folders[site]
        part = folder / "part"
        shutil.copy(image, part)
        part.rename(folder / f"{self._numbers[site]:06}.png")
        for old in sorted(folder.iterdir())[:-_IMAGES]:
            old.unlink()

    def _status(self) -> FederationStatus:
        with grpc.insecure_channel(self._services["aggregator"].grpc) as channel:
            answer = FederationServiceStub(channel).GetStatus(GetStatusRequest(), timeout=_ANSWER_SECONDS)
            return answer.federations[0]


@dataclass(eq=False)
class _Line:
    """A site's line: sends its image at an even pace, with and without a map."""

    address: str
    site: str
    folder: Path
    inspections: int = 0
    swaps: int = 0
    failures: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._image = min(self.folder.iterdir()).read_bytes()
        self._thread = threading.Thread(target=self._inspect, name=f"line of {self.site}")

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def join(self) -> None:
        """Waits for the end, once `stop` is set."""
        self._thread.join()

    def _inspect(self) -> None:
        last = 0
        with InspectionClient(self.address, site=self.site) as client:
            while not self.stop.wait(1 / _INSPECTIONS_PER_SECOND):
                try:
                    result = client.inspect(self._image, map_kind=("none", "float32", "png")[self.inspections % 3])
                except InspectionError as error:
                    self.failures.append(str(error))
                    continue
                self.inspections += 1
                self.swaps += result.release != last
                last = result.release


def main(minutes: Annotated[float, typer.Option(help="How long, from the first release on.")] = 30) -> None:
    """Soaks a federation and prints a table; fails where an inspection failed or a process grew."""
    console = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="feddymem-soak-") as folder:
        soaked = Soak(Path(folder)).run(60 * minutes, console)
    table = Table("process", "MiB after warm-up", "MiB at the end", "growth", "largest")
    for name, samples in soaked.memory.items():
        early, late = soaked.growth(name)
        largest = max(size for _, size in samples)
        table.add_row(
            name, *(f"{size / _MIB:.1f}" for size in (early, late)), f"{late / early - 1:+.1%}", f"{largest / _MIB:.1f}"
        )
    console.print(table)
    console.print(
        f"{soaked.rounds} rounds, {soaked.swaps} swaps seen, {soaked.new_images} new images, "
        f"{soaked.inspections} inspections, {len(soaked.failures)} failed {soaked.failures[:3]}"
    )
    leaks = soaked.leaks()
    if leaks:
        console.print(f"grown by more than {BAR:.0%}: {', '.join(leaks)}")
    raise typer.Exit(bool(leaks or soaked.failures))


if __name__ == "__main__":
    typer.run(main)
