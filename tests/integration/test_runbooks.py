"""What docs/runbooks.md has operators do, done with real processes and TLS while a line inspects: none fails."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
import yaml

from feddymem.client import InspectionClient, InspectionError
from feddymem.client.tls import AUTHORITY
from feddymem.v1.federation_pb2 import PHASE_DONE, FederationStatus
from feddymem.v1.release_pb2 import RELEASE_KIND_MEMORY_GENERATOR
from services.cli.certs import authority, issue
from services.cli.status import get_status
from services.runtime.files import write_atomically
from services.runtime.identity import Role
from tests.chaos.federation import SITES, wait, write_images
from tests.chaos.forks import ForkedFleet, own_host
from tests.integration.test_operator import feddymem

HERE, _THERE = SITES
IDENTITIES = {
    "aggregator": (Role.AGGREGATOR, "hub"),
    **{site: (Role.SITE, site) for site in SITES},
    "inference": (Role.INFERENCE, HERE),
    "line": (Role.LINE, "camera"),
    "operator": (Role.OPERATOR, "ann"),
}


class Plant:
    """A federation of two sites with TLS, and the inference service of one of them."""

    def __init__(self, folder: Path, generator: bool = False) -> None:
        folder.mkdir()
        self.fleet = ForkedFleet(folder / "services")
        self._images, self._config, self._generator = write_images(folder / "images"), folder / "hub.yaml", generator
        self.image = min(self._images[HERE].iterdir())
        self.folder, self.tls = folder, {name: folder / "tls" / name for name in IDENTITIES}
        authority(folder / "authority")
        self.issue(folder / "authority")

    def issue(self, by: Path) -> None:
        """New certificates for everybody."""
        for name, (role, who) in IDENTITIES.items():
            issue(by, role, who, host=[own_host()], days=1, out=self.tls[name])

    def start_aggregator(self, rounds: int) -> None:
        method = {"bank_items": 40, "memory_items": 60, "rounds": rounds, "generator": self._generator}
        federations = {"parts": {"sites": list(SITES), "quorum": 2, "method": method}}
        self._config.write_text(yaml.safe_dump({"federations": federations}))
        self._launch("aggregator", "aggregator", "--config", str(self._config))

    def start(self, rounds: int) -> None:
        """Starts all, and waits until all rounds are over and the last release scores."""
        self.start_aggregator(rounds)
        calls = ["--aggregator", self.fleet.address("aggregator"), "--retry-seconds", "0.2"]
        self.start_edge_clients(input_size=64)
        self._launch("inference", "inference", *calls, "--edge-clients", self.fleet.address(HERE))
        self.wait_done(rounds)

    def start_edge_clients(self, input_size: int) -> None:
        for site in SITES:
            where = ["--federation", "parts", "--site", site, "--data", str(self._images[site])]
            calls = ["--aggregator", self.fleet.address("aggregator"), "--retry-seconds", "0.2"]
            self._launch(site, "edge", *calls, *where, "--input-size", str(input_size))

    def _launch(self, name: str, command: str, *flags: str) -> None:
        self.fleet.launch(name, command, *flags, "--tls-dir", str(self.tls[name]))
        self.fleet.wait_listening(name)

    def wait_done(self, rounds: int) -> None:
        def done() -> bool:
            now = self.status()
            scores = (now.phase, now.round, now.release, self.served()[0]) == (PHASE_DONE, rounds, rounds, rounds)
            return scores and (not self._generator or self._has_generator(rounds))

        wait(done, self.logs)

    def _has_generator(self, version: int) -> bool:
        """Whether the inference service has the generator of a round, which comes on its own and changes scores."""
        releases = self.fleet.state("inference") / "releases"
        return any(releases.glob(f"*-{RELEASE_KIND_MEMORY_GENERATOR}-{version:010}.binpb"))

    def status(self) -> FederationStatus:
        [federation] = get_status(self.fleet.address("aggregator"), tls_dir=self.tls["operator"]).federations
        return federation

    def operate(self, *arguments: str) -> str:
        """What a command says that has to succeed."""
        asked = ("--server", self.fleet.address("aggregator"), "--tls-dir", str(self.tls["operator"]))
        run = feddymem(*arguments, *asked)
        assert run.returncode == 0, run.stderr
        return run.stdout

    def served(self) -> tuple[int, float]:
        """Release that scores, and the score; 0 where none does."""
        with InspectionClient(self.fleet.address("inference"), site=HERE, tls_dir=self.tls["line"]) as client:
            try:
                result = client.inspect(self.image)
            except InspectionError:
                return 0, 0.0
        return result.release, result.score

    def activated(self, release: int) -> int:
        """How often the inference service has begun to score with a release of this number."""
        return self.fleet.log("inference").count(f'"release": {release}, "event": "release_active"')

    def logs(self) -> str:
        return "".join(f"\n{name}:\n{self.fleet.log(name)[-1500:]}" for name in (*SITES, "aggregator", "inference"))


class Line:
    """Inspects one image after the other, and never again what has failed, inside the block."""

    def __init__(self, plant: Plant) -> None:
        self._plant, self._stop = plant, threading.Event()
        self._releases: list[int] = []
        self.failures: list[str] = []
        self._thread = threading.Thread(target=self._inspect, name="line")

    def __enter__(self) -> Line:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def releases(self) -> list[int]:
        """That scored, in order."""
        return [release for release, _ in groupby(self._releases)]

    def wait_scored_by(self, release: int) -> None:
        """Waits until the last image was scored by this release: on a busy machine the line may be behind."""
        wait(lambda: self.releases[-1:] == [release], self._plant.logs)

    def _inspect(self) -> None:
        where, tls = self._plant.fleet.address("inference"), self._plant.tls["line"]
        with InspectionClient(where, site=HERE, tls_dir=tls, attempts=1) as client:
            while not self._stop.wait(0.02):
                try:
                    self._releases.append(client.inspect(self._plant.image).release)
                except InspectionError as error:
                    self.failures.append(str(error))


def in_order(found: list[int], expected: list[int]) -> bool:
    """Whether the first and the last release are as expected, and those between in order; who follows may miss some."""
    rest = iter(expected)
    return (found[0], found[-1]) == (expected[0], expected[-1]) and all(release in rest for release in found)


@pytest.fixture
def plant(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Plant]:
    made = Plant(tmp_path / "plant", generator=getattr(request, "param", False))
    yield made
    made.fleet.stop()


with_and_without_generators = pytest.mark.parametrize(
    "plant", [False, True], ids=["plain", "generators"], indirect=True
)


@with_and_without_generators
def test_a_bad_release_is_rolled_back(plant: Plant) -> None:
    plant.start(rounds=3)
    _, newest = plant.served()
    with Line(plant) as line:
        line.wait_scored_by(3)
        said = plant.operate("release", "rollback", "parts", "--if-active", "3")
        assert said == "release 2 of parts is active and stays so; before: 3\n"
        wait(lambda: plant.served()[0] == 2, plant.logs)
        line.wait_scored_by(2)
        assert plant.operate("release", "activate", "parts", "newest") == "release 3 of parts is active; before: 2\n"
        wait(lambda: plant.served() == (3, newest), plant.logs)
        line.wait_scored_by(3)
    assert (line.failures, line.releases) == ([], [3, 2, 3])


@with_and_without_generators
def test_the_aggregator_s_disk_is_lost_without_a_backup(plant: Plant) -> None:
    plant.start(rounds=3)
    before = plant.served()
    with Line(plant) as line:
        line.wait_scored_by(3)
        plant.fleet.kill("aggregator")
        shutil.rmtree(plant.fleet.state("aggregator"))
        assert plant.served() == before
        plant.start_aggregator(rounds=3)
        wait(lambda: plant.activated(3) == 2, plant.logs)
        plant.wait_done(3)
        assert plant.served() == before  # the same images: as if the federation had never been there before
        line.wait_scored_by(3)
    assert not line.failures
    assert in_order(line.releases, [3, 1, 2, 3]), line.releases


@with_and_without_generators
def test_the_aggregator_s_disk_is_lost_and_restored(plant: Plant) -> None:
    plant.start(rounds=2)
    copy, state = plant.folder / "copies" / "monday", plant.fleet.state("aggregator")
    assert feddymem("backup", str(state), str(copy)).returncode == 0
    plant.fleet.kill("aggregator", signal.SIGTERM)
    plant.start_aggregator(rounds=4)
    plant.wait_done(4)
    with Line(plant) as line:
        line.wait_scored_by(4)
        plant.fleet.kill("aggregator")
        shutil.rmtree(state)
        shutil.copytree(copy, state)
        plant.start_aggregator(rounds=4)
        wait(lambda: plant.activated(4) == 2, plant.logs)
        plant.wait_done(4)
        line.wait_scored_by(4)
    assert not line.failures
    assert in_order(line.releases, [4, 2, 3, 4]), line.releases


@with_and_without_generators
def test_the_federation_begins_anew_with_another_feature_space(plant: Plant) -> None:
    plant.start(rounds=2)
    with Line(plant) as line:
        line.wait_scored_by(2)
        for name in (*SITES, "aggregator"):
            plant.fleet.kill(name, signal.SIGTERM)
            shutil.rmtree(plant.fleet.state(name))
        plant.start_aggregator(rounds=3)
        plant.start_edge_clients(input_size=96)
        plant.wait_done(3)
        line.wait_scored_by(3)
    assert (line.failures, line.releases[0], line.releases[-1]) == ([], 2, 3)


def test_the_authority_is_replaced(plant: Plant) -> None:
    def believe(*authorities: Path) -> None:
        """Everybody has the certificates of these authorities, the new one's folder too, which issues then."""
        both = b"".join(certificates[folder] for folder in authorities)
        for folder in (new, *plant.tls.values()):
            write_atomically(folder / AUTHORITY, both)

    old, new = plant.folder / "authority", plant.folder / "new-authority"
    authority(new)
    certificates = {folder: (folder / AUTHORITY).read_bytes() for folder in (old, new)}
    plant.start(rounds=1)
    with Line(plant) as line:
        believe(old, new)
        assert plant.served()[0] == 1
        plant.issue(new)
        assert plant.served()[0] == 1
        believe(new)
        assert plant.served()[0] == 1
        plant.fleet.kill("aggregator", signal.SIGTERM)  # and back again: all have to connect anew
        plant.start_aggregator(rounds=2)
        line.wait_scored_by(2)
        plant.wait_done(2)
    assert line.failures == []
    issue(old, Role.LINE, "camera", host=[], days=1, out=plant.tls["line"])
    assert plant.served()[0] == 0
