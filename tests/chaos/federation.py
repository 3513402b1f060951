"""A small federation of real processes that may die, and what it must come to all the same."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import yaml

from feddymem.client import InspectionClient, InspectionError
from feddymem.synthetic import write_products
from feddymem.v1.federation_pb2 import PHASE_DONE, FederationStatus, GetStatusRequest
from feddymem.v1.federation_pb2_grpc import FederationServiceStub
from feddymem.v1.release_pb2 import DownloadArrayRequest, Release, WatchReleasesRequest
from feddymem.v1.release_pb2_grpc import ReleaseServiceStub
from tests.chaos.forks import ForkedFleet, Place
from tests.chaos.kill_at import KillPoint

SITES = ("brick-hall", "dim-hall")
ROUNDS = 2
SETTINGS = {
    "sites": list(SITES),
    "quorum": 2,
    "keep_releases": 1,
    "method": {"generator": True, "bank_items": 40, "memory_items": 60, "rounds": ROUNDS, "item_type": "uint8"},
}
RETRY_SECONDS = 0.05
PATIENCE_SECONDS = 60
"""For a federation to end, deaths included; it takes some seconds."""
_ANSWER_SECONDS = 10
_POLL_SECONDS = 0.02
_IMAGES = 5
_INPUT_SIZE = 64
_GONE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}


class PromiseBrokenError(AssertionError):
    """What must hold whoever dies did not hold."""


@dataclass(frozen=True)
class Published:
    """A release as its publisher serves it.

    Attributes:
        message: the release, serialised, without the time of its making.
        arrays: bytes of each of its arrays.
    """

    message: bytes
    arrays: tuple[bytes, ...]


@dataclass(frozen=True)
class Outcome:
    """All that a federation leaves behind; two are equal if they are so bit for bit.

    Attributes:
        memory: the last global memory.
        generators: each site's memory generator.
        scores: of one image, as each site's line.
    """

    memory: Published
    generators: Mapping[str, Published]
    scores: Mapping[str, float]

    def differences(self, other: Outcome) -> str:
        """What is not the same; empty where all is."""
        found = ["global memory"] if self.memory != other.memory else []
        found += [f"generator of {site}" for site in self.generators if self.generators[site] != other.generators[site]]
        found += [f"score of {site}" for site in self.scores if self.scores[site] != other.scores[site]]
        return ", ".join(found)


def wait(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    """Waits until a condition holds.

    Raises:
        PromiseBrokenError: it did not in time.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise PromiseBrokenError(f"waited {PATIENCE_SECONDS} s for {what()}")
        time.sleep(_POLL_SECONDS)


def write_images(folder: Path, count: int = _IMAGES) -> dict[str, Path]:
    """A few images for each site; the folder of each."""
    write_products(folder / "all")
    folders = {}
    for site in SITES:
        folders[site] = folder / site
        folders[site].mkdir()
        for path in sorted((folder / "all" / site / "train" / "good").iterdir())[:count]:
            shutil.copy(path, folders[site])
    shutil.rmtree(folder / "all")
    return folders


class Trial:
    """One federation: an aggregator, an edge client for each site, and an inference service of both."""

    def __init__(
        self,
        folder: Path,
        images: Mapping[str, Path],
        places: Mapping[str, Place] | None = None,
        flags: Sequence[str] = (),
        site_flags: Sequence[str] = (),
    ) -> None:
        """Makes a federation; nothing runs yet.

        Args:
            folder: for its services; made.
            images: folder of each site.
            places: of services that do not run beside this process.
            flags: more for whoever calls the aggregator.
            site_flags: more for the first site's edge client.
        """
        folder.mkdir(parents=True)
        self.fleet = ForkedFleet(folder / "services", places)
        self._images = images
        config = folder / "aggregator.yaml"
        config.write_text(yaml.safe_dump({"federations": {"parts": SETTINGS}}))
        calls = ["--aggregator", self.fleet.address("aggregator"), "--retry-seconds", str(RETRY_SECONDS), *flags]
        edges = [flag for site in SITES for flag in ("--edge-clients", self.fleet.address(site))]
        self._commands = {"aggregator": ["aggregator", "--config", str(config)]}
        for site in SITES:
            where = ["--federation", "parts", "--site", site, "--data", str(images[site])]
            self._commands[site] = ["edge", *calls, *where, "--input-size", str(_INPUT_SIZE)]
        self._commands[SITES[0]] += site_flags
        self._commands["inference"] = ["inference", *calls, *edges]
        self.names, self.sites = tuple(self._commands), SITES

    def start(self, name: str, kill: KillPoint | None = None) -> None:
        """Starts one of the services; it may not be listening yet."""
        self.fleet.launch(name, *self._commands[name], kill=kill)

    def run(self, kills: Mapping[str, list[KillPoint]]) -> None:
        """Starts all and has them die in turn, each coming back with its state, until all rounds are over.

        Args:
            kills: by service, how each of its lives but the last one ends.

        Raises:
            PromiseBrokenError: a moment of death never came, a service ended in another way, or the rounds did not end.
        """
        left = {name: list(kills.get(name, ())) for name in self.names}
        armed = {name: bool(points) for name, points in left.items()}

        def start(name: str) -> None:
            armed[name] = bool(left[name])
            self.start(name, left[name].pop(0) if left[name] else None)

        for name in self.names:
            start(name)

        def over() -> bool:
            for name, code in self.fleet.ended().items():
                if not armed[name] or code != -signal.SIGKILL:
                    raise PromiseBrokenError(f"{name} ended with {code}:\n{self.fleet.log(name)[-3000:]}")
                start(name)
            return not any(armed.values()) and self.done()

        wait(over, lambda: f"the end; still to die: {[name for name in armed if armed[name]]}{self.logs()}")

    def wait_done(self, when: str = "") -> None:
        """Waits until all rounds are over; nobody may end.

        Raises:
            PromiseBrokenError: a service ended, or the rounds did not end.
        """

        def over() -> bool:
            if codes := self.fleet.ended():
                raise PromiseBrokenError(f"{when}: ended, with these exit codes: {codes}{self.logs()}")
            return self.done()

        wait(over, lambda: f"the end {when}{self.logs()}")

    def wait_release(self, version: int) -> None:
        """Waits until a round has made its release, active or not.

        Raises:
            PromiseBrokenError: it has not in time.
        """

        def made() -> bool:
            try:
                return version in self.status().releases
            except grpc.RpcError:  # it has just been started
                return False

        wait(made, lambda: f"release {version}{self.logs()}")

    def restart_inference_afresh(self) -> None:
        """Ends the inference service, and starts one that knows nothing but the last releases."""
        self.fleet.kill("inference")
        shutil.rmtree(self.fleet.state("inference"))
        self.start("inference")

    def done(self) -> bool:
        """Whether all rounds are over."""
        try:
            status = self.status()
        except grpc.RpcError:
            return False
        return (status.phase, status.release) == (PHASE_DONE, ROUNDS)

    def status(self) -> FederationStatus:
        """As the aggregator says it."""
        with grpc.insecure_channel(self.fleet.address("aggregator")) as channel:
            answer = FederationServiceStub(channel).GetStatus(GetStatusRequest(), timeout=_ANSWER_SECONDS)
            return answer.federations[0]

    def outcome(self, expected: Outcome | None = None) -> Outcome:
        """What the federation has come to.

        An inference service hears of global memory and memory generator on two streams; where the outcome is known, it
        is given the time to have heard of both.
        """
        memory = read_release(self.fleet.address("aggregator"), ROUNDS)
        generators = {site: read_release(self.fleet.address(site), ROUNDS) for site in SITES}

        def served() -> bool:
            found = self.scores()
            return None not in found.values() if expected is None else found == expected.scores

        wait(served, lambda: f"the last release to be served; scores are {self.scores()}{self.logs()}")
        scores = {site: score for site, score in self.scores().items() if score is not None}
        return Outcome(memory, generators, scores)

    def scores(self) -> dict[str, float | None]:
        """Score of an image by the last release, as each site's line; None where it is not served."""
        return {site: self._score(site) for site in SITES}

    def _score(self, site: str) -> float | None:
        image = min(self._images[site].iterdir())
        with InspectionClient(self.fleet.address("inference"), site=site, attempts=1) as client:
            try:
                result = client.inspect(image)
            except InspectionError:
                return None
        return result.score if result.release == ROUNDS else None

    def events(self, name: str, event: str) -> list[dict[str, object]]:
        """Log lines of one event of a service, all its lives together."""
        lines = [json.loads(line) for line in self.fleet.log(name).splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def logs(self) -> str:
        """The end of each service's log."""
        return "".join(f"\n{name}:\n{self.fleet.log(name)[-1500:]}" for name in self.names)

    def close(self) -> None:
        """Ends all services."""
        self.fleet.stop()


def read_release(address: str, version: int) -> Published:
    """The release that a service publishes, once it is this version.

    Raises:
        PromiseBrokenError: an array does not have the bytes of its manifest.
        grpc.RpcError: the version does not come, or no answer does.
    """
    with grpc.insecure_channel(address) as channel:
        stub = ReleaseServiceStub(channel)
        request, seconds = WatchReleasesRequest(), _ANSWER_SECONDS
        for response in stub.WatchReleases(request, timeout=seconds, wait_for_ready=True):
            if response.release.version == version:
                return download_release(stub, response.release)
    raise AssertionError("a watch ended without a status")


def download_release(stub: ReleaseServiceStub, release: Release) -> Published:
    """A release with all its bytes.

    Raises:
        grpc.RpcError: an array cannot be had.
    """
    arrays = []
    for array in release.arrays:
        pieces = stub.DownloadArray(DownloadArrayRequest(sha256=array.sha256), timeout=_ANSWER_SECONDS)
        arrays.append(b"".join(piece.chunk.data for piece in pieces))
    timeless = Release()
    timeless.CopyFrom(release)
    timeless.ClearField("created")
    return Published(timeless.SerializeToString(deterministic=True), tuple(arrays))


class ReleaseObserver:
    """Watches an aggregator all the time, over its deaths, and holds each release against the undisturbed one."""

    def __init__(self, address: str, expected: Mapping[int, Published] | None = None) -> None:
        self._address, self._expected = address, expected
        self.seen: dict[int, Published] = {}
        self.broken: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="release-observer")

    def __enter__(self) -> ReleaseObserver:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        last = 0
        while not self._stop.is_set():
            try:
                with grpc.insecure_channel(self._address) as channel:
                    stub = ReleaseServiceStub(channel)
                    for response in stub.WatchReleases(WatchReleasesRequest(), timeout=0.5):
                        if response.release.shadow:
                            continue
                        version = response.release.version
                        if version < last:
                            self.broken.append(f"release {last} was published, then {version}")
                        last = max(last, version)
                        self._look_at(version, download_release(stub, response.release))
            except grpc.RpcError as error:
                if error.code() not in _GONE | {grpc.StatusCode.NOT_FOUND}:  # pruned while it was downloaded
                    self.broken.append(f"{error.code().name}: {error.details()}")
                self._stop.wait(_POLL_SECONDS)

    def _look_at(self, version: int, found: Published) -> None:
        known = self._expected if self._expected is not None else self.seen
        if known.get(version, found) != found:
            self.broken.append(f"release {version} is another one than in the undisturbed run")
        self.seen[version] = found
