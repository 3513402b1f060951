"""An inference service that may die, between two publishers that release what a federation made, one by one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.publishing import Publishing
from feddymem.client import InspectionClient, InspectionError
from feddymem.v1.release_pb2 import RELEASE_KIND_GLOBAL_MEMORY, RELEASE_KIND_MEMORY_GENERATOR, Release
from services.runtime.arrays import WireArray
from services.runtime.messages import feature_space_from_message
from tests.chaos.federation import RETRY_SECONDS, PromiseBrokenError, Published, wait
from tests.chaos.forks import ForkedFleet
from tests.chaos.kill_at import KillPoint

RELEASES = (("generator", 1), ("memory", 1), ("generator", 2), ("memory", 2))
"""In the order in which they come."""
_KINDS = {"memory": RELEASE_KIND_GLOBAL_MEMORY, "generator": RELEASE_KIND_MEMORY_GENERATOR}
_NOTHING_YET = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND}


@dataclass(frozen=True)
class Line:
    """A site's line, and what was published for it.

    Attributes:
        site: name of the site.
        image: what its camera sees, time and again.
        releases: by kind ("memory", "generator") and version.
    """

    site: str
    image: Path
    releases: Mapping[tuple[str, int], Published]

    def release(self, kind: str, version: int) -> Release:
        """The message of a release."""
        return Release.FromString(self.releases[kind, version].message)


class InferenceTrial:
    """One inference service."""

    def __init__(self, folder: Path, line: Line) -> None:
        folder.mkdir(parents=True)
        self._line, self._folder = line, folder
        self.fleet = ForkedFleet(folder / "services")
        space = feature_space_from_message(line.release("memory", 1).feature_space)
        self._publishing = {
            "memory": Publishing(folder / "memories", space, "parts"),
            "generator": Publishing(folder / "generators", space, "parts", line.site),
        }
        self._kills: list[KillPoint] = []
        self._scores: dict[int, float] = {}
        self._armed = False

    def run(self, kills: Sequence[KillPoint]) -> dict[int, float]:
        """Publishes one release after the other, each when the one before has got through; has the service die in turn.

        Returns:
            Score of the line's image by each version.

        Raises:
            PromiseBrokenError: a moment of death never came, the service ended in another way, a release did not get
                through, or something else was on disk in the end than it is scoring with.
        """
        self._kills, self._scores = list(kills), {}
        self._start()
        for kind, version in RELEASES:
            release = self._line.release(kind, version)
            data = self._line.releases[kind, version].arrays
            wires = [WireArray(manifest, piece) for manifest, piece in zip(release.arrays, data, strict=True)]
            self._publishing[kind].publish(version, wires, release.needs_generator)
            wait(lambda kind=kind, version=version: self._taken(kind, version), self._explain)  # type: ignore[misc]
        wait(lambda: self._taken(*RELEASES[-1]) and not self._armed, self._explain)
        self._check_disk()
        return self._scores

    def close(self) -> None:
        """Ends the service and the publishers."""
        self.fleet.stop()
        for publishing in self._publishing.values():
            publishing.stop()

    @property
    def address(self) -> str:
        """HOST:PORT of the service."""
        return self.fleet.address("inference")

    def _start(self) -> None:
        kill = self._kills.pop(0) if self._kills else None
        self._armed = kill is not None
        addresses = {kind: publishing.address for kind, publishing in self._publishing.items()}
        flags = ["--aggregator", addresses["memory"], "--edge-clients", addresses["generator"]]
        self.fleet.launch("inference", "inference", *flags, "--retry-seconds", str(RETRY_SECONDS), kill=kill)

    def _taken(self, kind: str, version: int) -> bool:
        """Whether a release is on disk and, if it is a memory, scores; brings the service back to life."""
        code = self.fleet.ended().get("inference")
        if code is not None:
            if not self._armed or code != -signal.SIGKILL:
                raise PromiseBrokenError(f"inference ended with {code}:\n{self.fleet.log('inference')[-3000:]}")
            self._start()
            return False
        written = any(self._releases.glob(f"*-{_KINDS[kind]}-{version:010}.binpb"))
        if not written or kind == "generator":
            return written
        release, score = self._inspect()
        if release == version:  # noted at once: the next inspection may find the service dead
            self._scores[version] = score
        return release == version

    def _inspect(self) -> tuple[int, float]:
        with InspectionClient(self.address, attempts=1) as client:
            try:
                result = client.inspect(self._line.image)
            except InspectionError as error:
                if error.status not in _NOTHING_YET:
                    raise
                return 0, 0.0
            return result.release, result.score

    @property
    def _state(self) -> Path:
        return self._folder / "services" / "inference" / "state"

    @property
    def _releases(self) -> Path:
        return self._state / "releases"

    def _check_disk(self) -> None:
        """Nothing is left of what was replaced, and nothing half there."""
        kept = [("memory", 2), ("generator", 1), ("generator", 2)]
        arrays = {array.sha256.hex() for kind, version in kept for array in self._line.release(kind, version).arrays}

        def whole() -> bool:
            found = {path.name for path in (self._state / "arrays").iterdir()}
            return found == arrays and len(list(self._releases.iterdir())) == len(kept)

        wait(whole, lambda: f"the disk to hold what is in use: {sorted(self._state.rglob('*'))}")

    def _explain(self) -> str:
        return f"a release to be taken; still to die: {self._armed}\n{self.fleet.log('inference')[-3000:]}"


class LineObserver:
    """Inspects an image all the time, over the deaths of the service: a whole release scores it, or nothing does."""

    def __init__(self, address: str, image: Path, expected: Mapping[int, float] | None) -> None:
        self._address, self._image, self._expected = address, image, expected
        self.broken: list[str] = []
        self.inspections = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="line-observer")

    def __enter__(self) -> LineObserver:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        with InspectionClient(self._address, attempts=1) as client:
            while not self._stop.is_set():
                try:
                    result = client.inspect(self._image)
                except InspectionError as error:
                    if error.status not in _NOTHING_YET:
                        self.broken.append(str(error))
                    self._stop.wait(RETRY_SECONDS)
                    continue
                self.inspections += 1
                if self._expected is not None and self._expected.get(result.release) != result.score:
                    self.broken.append(f"release {result.release} gave {result.score}, expected {self._expected}")
