"""An inference service of two federations, one of them damaged on its disk, and nobody there to ask."""

from __future__ import annotations

import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from feddymem.client import InspectionClient, InspectionError, UnavailableError
from feddymem.v1.release_pb2 import RELEASE_KIND_GLOBAL_MEMORY, RELEASE_KIND_MEMORY_GENERATOR
from services.inference.release_store import ReleaseStore
from tests.chaos.federation import RETRY_SECONDS, SETTINGS, SITES, wait, write_images
from tests.chaos.forks import ForkedFleet

METHOD = {**SETTINGS["method"], "rounds": 1}  # type: ignore[dict-item]
FEDERATIONS = dict(zip(("parts", "screws"), SITES, strict=True))
"""Each with one site."""
KINDS = {"memory": RELEASE_KIND_GLOBAL_MEMORY, "generator": RELEASE_KIND_MEMORY_GENERATOR}


class Plant:
    """An aggregator of two federations, an edge client for each, and an inference service for both."""

    def __init__(self, folder: Path) -> None:
        self.images = write_images(folder / "images")
        self.fleet = ForkedFleet(folder / "services")
        config = folder / "aggregator.yaml"
        settings = {"quorum": 1, "method": METHOD}
        config.write_text(yaml.safe_dump({"federations": dict.fromkeys(FEDERATIONS, settings)}))
        calls = ["--aggregator", self.fleet.address("aggregator"), "--retry-seconds", str(RETRY_SECONDS)]
        self._commands = {"aggregator": ["aggregator", "--config", str(config)]}
        for federation, site in FEDERATIONS.items():
            where = ["--federation", federation, "--site", site, "--data", str(self.images[site])]
            self._commands[federation] = ["edge", *calls, *where, "--input-size", "64"]
        edges = [flag for federation in FEDERATIONS for flag in ("--edge-clients", self.fleet.address(federation))]
        self._commands["inference"] = ["inference", *calls, *edges]
        self.publishers = ("aggregator", *FEDERATIONS)

    def start(self, *names: str) -> None:
        for name in names:
            self.fleet.launch(name, *self._commands[name])

    def score(self, federation: str) -> float:
        """Score of an image of a federation's site.

        Raises:
            InspectionError: there is none.
        """
        site = FEDERATIONS[federation]
        address = self.fleet.address("inference")
        with InspectionClient(address, federation=federation, site=site, attempts=1) as client:
            return client.inspect(min(self.images[site].iterdir())).score

    def scores(self) -> dict[str, float]:
        """Of each federation that can score."""
        found = {}
        for federation in FEDERATIONS:
            try:
                found[federation] = self.score(federation)
            except InspectionError:
                continue
        return found

    def file(self, federation: str, kind: str) -> Path:
        """Of what the inference service has on disk: the record of a federation's global memory, or an array of its
        global memory or memory generator that no other release has."""
        store = ReleaseStore(self.fleet.state("inference"))
        releases = [kept.release for kept in store.load()]
        wanted = KINDS.get(kind, RELEASE_KIND_GLOBAL_MEMORY)
        [release] = [each for each in releases if (each.federation, each.kind) == (federation, wanted)]
        if kind == "record":
            return store._path(release)
        others = {array.sha256 for each in releases if each != release for array in each.arrays}
        own = next(array for array in release.arrays if array.sha256 not in others)
        return self.fleet.state("inference") / "arrays" / own.sha256.hex()

    def damaged_files(self) -> float:
        """As the inference service counts them."""
        address = self.fleet.wait_listening("inference").metrics
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        return float(next(line for line in lines if line.startswith("feddymem_damaged_files_total ")).split()[1])

    def logs(self) -> str:
        return self.fleet.log("inference")[-3000:]


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    """All is there and scores; tests must leave it so."""
    found = Plant(tmp_path_factory.mktemp("plant"))
    found.start(*found.publishers, "inference")
    wait(lambda: len(found.scores()) == 2, found.logs)
    yield found
    found.fleet.stop()


@pytest.mark.parametrize("kind", ["memory", "generator", "record"])
def test_one_that_is_damaged_does_not_concern_the_other_and_comes_again(plant: Plant, kind: str) -> None:
    expected = plant.scores()
    for name in (*plant.publishers, "inference"):
        plant.fleet.kill(name)
    path = plant.file("parts", kind)
    shutil.rmtree(path.parent / "quarantine", ignore_errors=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    plant.start("inference")
    wait(lambda: plant.scores() == {"screws": expected["screws"]}, plant.logs)
    with pytest.raises(UnavailableError):
        plant.score("parts")
    [quarantined] = (path.parent / "quarantine").iterdir()
    assert quarantined.name.endswith(path.name)
    assert quarantined.read_bytes() == bytes(content)
    assert plant.damaged_files() == 1

    plant.start(*plant.publishers)
    wait(lambda: plant.scores() == expected, plant.logs)
