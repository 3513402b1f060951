"""Real processes for integration tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from feddymem.datasets import SiteData, load_sites
from feddymem.synthetic import write_products
from services.demo.processes import Fleet, RunningService

StartAggregator = Callable[..., RunningService]


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


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SiteData]:
    """Three sites of synthetic products, by name."""
    root = tmp_path_factory.mktemp("products")
    write_products(root)
    return {site.name: site for site in load_sites(root)}
