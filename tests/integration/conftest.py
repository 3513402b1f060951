"""Real processes for integration tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from feddymem.client import InspectionClient, NotServedError, UnavailableError
from feddymem.dataset_files import load_sites
from feddymem.datasets import SiteData
from feddymem.synthetic import write_products
from feddymem.v1.release_pb2 import DownloadArrayRequest, Release, WatchReleasesRequest
from feddymem.v1.release_pb2_grpc import ReleaseServiceStub
from services.demo.processes import Fleet, RunningService
from tests.chaos.federation import Trial, write_images

StartAggregator = Callable[..., RunningService]

TIMEOUT_SECONDS = 30


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Service processes that end with the test."""
    with Fleet(tmp_path / "services") as running:
        yield running


@pytest.fixture
def start_aggregator(fleet: Fleet, tmp_path: Path) -> StartAggregator:
    """Starts an aggregator with one federation `parts` of the settings given."""

    def start(name: str = "aggregator", **federation: object) -> RunningService:
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump({"federations": {"parts": federation}}))
        return fleet.start(name, "aggregator", "--config", str(config))

    return start


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    """A few images for each site of a `Trial`; the folder of each."""
    return write_images(tmp_path / "images")


@pytest.fixture
def trial(tmp_path: Path, images: dict[str, Path]) -> Iterator[Trial]:
    """A federation whose processes start in no time, may be killed at any moment, and come back at the same address."""
    opened = Trial(tmp_path / "trial", images)
    yield opened
    opened.close()


@dataclass(frozen=True, eq=False)
class System:
    """A federation of two sites that is done, and the inference service that serves it."""

    fleet: Fleet
    aggregator: RunningService
    edges: dict[str, RunningService]
    inference: RunningService
    sites: dict[str, SiteData]


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory, products: dict[str, SiteData]) -> Iterator[System]:
    """Real processes: aggregator, two edge clients, inference; two rounds done. Tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("system")
    config = folder / "aggregator.yaml"
    sites = {name: products[name] for name in ("brick-hall", "dim-hall")}
    method = {"bank_items": 200, "memory_items": 500, "rounds": 2}
    config.write_text(yaml.safe_dump({"federations": {"bricks": {"sites": list(sites), "method": method}}}))
    with Fleet(folder) as fleet:
        aggregator = fleet.start("aggregator", "aggregator", "--config", str(config))
        for name, site in sites.items():
            fleet.launch(f"edge-{name}", "edge", *edge_flags(aggregator, site, "bricks"))
        edges = {name: fleet.wait_listening(f"edge-{name}") for name in sites}
        inference = fleet.start("inference", "inference", *inference_flags(aggregator, edges.values()))
        for site in sites.values():
            fleet.wait_until(lambda site=site: serves(inference, site, 2), 120, f"release 2 for {site.name}")  # type: ignore[misc]
        yield System(fleet, aggregator, edges, inference, sites)


def edge_flags(aggregator: RunningService, site: SiteData, federation: str = "parts") -> list[str]:
    """Flags of an edge client of a site."""
    flags = ["--aggregator", aggregator.grpc, "--federation", federation, "--site", site.name]
    return [*flags, "--data", str(site.train[0].parent), "--threads", "1", "--retry-seconds", "0.2"]


def inference_flags(aggregator: RunningService, edges: Iterable[RunningService]) -> list[str]:
    """Flags of an inference service."""
    addresses = [flag for edge in edges for flag in ("--edge-clients", edge.grpc)]
    return ["--aggregator", aggregator.grpc, *addresses, "--retry-seconds", "0.2"]


def serves(inference: RunningService, site: SiteData, release: int) -> bool:
    """Whether an inference service scores a site's images with a release."""
    return serves_image(inference, site.name, site.train[0], release)


def serves_image(inference: RunningService, site: str, image: Path, release: int) -> bool:
    """Whether an inference service scores an image of a site with a release."""
    with InspectionClient(inference.grpc, site=site, attempts=1) as client:
        try:
            return client.inspect(image).release == release
        except (UnavailableError, NotServedError):
            return False


def published(service: RunningService) -> tuple[Release, list[tuple[Any, bytes]]]:
    """The release that a service publishes, and its arrays: manifest and bytes of each."""
    with grpc.insecure_channel(service.grpc) as channel:
        stub = ReleaseServiceStub(channel)
        stream = stub.WatchReleases(WatchReleasesRequest(), timeout=TIMEOUT_SECONDS)
        release = next(stream).release
        stream.cancel()
        arrays = []
        for array in release.arrays:
            pieces = stub.DownloadArray(DownloadArrayRequest(sha256=array.sha256), timeout=TIMEOUT_SECONDS)
            arrays.append((array, b"".join(piece.chunk.data for piece in pieces)))
        return release, arrays


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SiteData]:
    """Three sites of synthetic products, by name."""
    root = tmp_path_factory.mktemp("products")
    write_products(root)
    return {site.name: site for site in load_sites(root)}
