"""The `dev` overlay, deployed: one cluster for all tests that need one, and the figures that they measure."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest

from feddymem.synthetic import write_products
from tests.deploy.cluster import Cluster
from tests.deploy.engine import Engine, podman, why_not
from tests.deploy.inspections import Line
from tests.deploy.overlay import Overlay

IMAGE = os.environ.get("DEPLOY_IMAGE", "localhost/feddymem:0.1.0")
REAL_IMAGES = Path(__file__).parents[3] / "shared" / "data" / "magtile"
"""Of which two exposures stand for two sites, where they are at hand."""
SITES = ("site-a", "site-b")
_TRAINING_IMAGES = 40
"""Of each site, at most."""
_DEPLOYED_SECONDS = 240

_figures: list[str] = []


@dataclass(eq=False)
class Deployment:
    """The `dev` overlay in a cluster, with its federation done.

    Attributes:
        image: of the services.
        overlay: what can be changed and applied again.
        pictures: test images of the first site, in folders by kind.
    """

    engine: Engine
    cluster: Cluster
    image: str
    overlay: Overlay
    pictures: Path

    def line(self, threads: int = 2) -> Line:
        """A line of the first site, which finds its inference pods by the name of their Service."""
        server = "dns:///inference-site-a:7072"
        return Line(self.engine, self.cluster, self.image, server, SITES[0], self.pictures, threads)

    def measured(self, what: str) -> None:
        """Has a figure printed at the end."""
        _figures.append(what)


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Everything of `dev`, settled. Tests run in order, and leave it settled."""
    if why := why_not():
        pytest.skip(f"containers cannot run here: {why}")
    if not podman("images", "--quiet", "--filter", f"reference={IMAGE}"):
        pytest.fail(f"there is no image {IMAGE}; `make images` builds it, DEPLOY_IMAGE names another one")
    started = time.monotonic()
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with Engine(IMAGE) as engine, Cluster(engine) as cluster:
            pictures = _fill(cluster, tmp_path_factory)
            overlay = Overlay(engine.folder / "k8s")
            cluster.apply(overlay.build(IMAGE))
            seconds = cluster.wait(cluster.settled, _DEPLOYED_SECONDS, "all pods ready")
            _figures.append(f"from nothing to all pods ready: {seconds:.1f} s")
            yield Deployment(engine, cluster, IMAGE, overlay, pictures)
        _figures.append(f"in all, image and base not counted: {time.monotonic() - started:.0f} s")
    finally:
        signal.signal(signal.SIGTERM, previous)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the figures."""
    if _figures:
        terminalreporter.section("measured")
        for figure in _figures:
            terminalreporter.line(figure)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ends the run such that everything is removed, and that a second signal does not end that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _fill(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gives each site normal images on the claim of its edge client; the first site's test images."""
    folders = sorted(REAL_IMAGES.glob("exp*"))[: len(SITES)]
    if len(folders) < len(SITES):
        root = tmp_path_factory.mktemp("products")
        write_products(root)
        folders = sorted(path for path in root.iterdir() if path.is_dir())[: len(SITES)]
    for site, folder in zip(SITES, folders, strict=True):
        claim = cluster.volumes.claim(f"edge-client-images-{site}")
        for image in sorted((folder / "train" / "good").iterdir())[:_TRAINING_IMAGES]:
            shutil.copyfile(image, claim / image.name)
    return folders[0] / "test"
