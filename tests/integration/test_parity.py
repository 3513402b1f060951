"""Federations with memory generators, and of images in tiles: real processes score as the library does."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from feddymem.backbone import load_extractor
from feddymem.client import InspectionClient, InvalidRequestError, NotServedError
from feddymem.datasets import SiteData
from feddymem.images import decode
from feddymem.maps import anomaly_map
from feddymem.scoring import Scorer
from services.demo.processes import Fleet, RunningService
from services.runtime.arrays import bank_from_wire
from services.runtime.messages import feature_space_from_message, generator_from_wire
from tests.integration.conftest import StartAggregator, edge_flags, inference_flags, published, serves
from tests.integration.test_lifecycle import run_service

METHOD = {"bank_items": 60, "memory_items": 100, "rounds": 2}
TIMEOUT_SECONDS = 120


@pytest.fixture
def few(products: dict[str, SiteData], tmp_path: Path) -> dict[str, SiteData]:
    """The sites with four normal images each."""
    sites = {}
    for name, site in products.items():
        folder = tmp_path / "few" / name
        folder.mkdir(parents=True)
        copies = tuple(Path(shutil.copy(path, folder)) for path in site.train[:4])
        sites[name] = dataclasses.replace(site, train=copies)
    return sites


def federation(
    fleet: Fleet, aggregator: RunningService, sites: list[SiteData], *flags: str
) -> tuple[dict[str, RunningService], RunningService]:
    """The edge clients and the inference service of a federation that is done."""
    for site in sites:
        fleet.launch(site.name, "edge", *edge_flags(aggregator, site), *flags)
    edges = {site.name: fleet.wait_listening(site.name) for site in sites}
    inference = fleet.start("inference", "inference", *inference_flags(aggregator, edges.values()))
    for site in sites:
        fleet.wait_until(lambda site=site: serves(inference, site, 2), TIMEOUT_SECONDS, f"release 2 for {site.name}")  # type: ignore[misc]
    return edges, inference


def assert_scored_as_by(scorer: Scorer, inference: RunningService, site: SiteData) -> None:
    """A good image and one with a defect."""
    size = scorer.extractor.feature_space.input_size
    images = [next(i.path for i in site.test if i.defect == wanted) for wanted in (False, True)]
    with InspectionClient(inference.grpc, site=site.name) as client:
        for path in images:
            answer = client.inspect(path, map_kind="float32")
            [expected] = scorer.inspect(scorer.extractor.prepare(decode(path.read_bytes()))[None])
            assert answer.score == pytest.approx(expected.score, rel=1e-4)
            assert answer.anomaly_map is not None
            np.testing.assert_allclose(
                answer.anomaly_map, anomaly_map(expected.distances, (size, size)), rtol=1e-4, atol=1e-4
            )


def test_each_site_is_scored_with_its_own_memory_generator(
    fleet: Fleet, start_aggregator: StartAggregator, few: dict[str, SiteData]
) -> None:
    sites = [few["brick-hall"], few["dim-hall"]]
    aggregator = start_aggregator(sites=[site.name for site in sites], method={**METHOD, "generator": True})
    edges, inference = federation(fleet, aggregator, sites)
    released, memory = published(aggregator)
    assert released.needs_generator
    extractor, weights = load_extractor(device="cpu"), []
    for site in sites:
        release, arrays = published(edges[site.name])
        generator = generator_from_wire(feature_space_from_message(release.feature_space), arrays)
        assert (release.site, release.version) == (site.name, 2)
        assert bool(generator.outer.weight.any())
        weights.append(generator.outer.weight)
        assert_scored_as_by(Scorer(extractor, bank_from_wire(memory), generator), inference, site)
    assert not torch.equal(weights[0], weights[1])

    for name, kind, said in (("moon", NotServedError, "'moon'"), ("", InvalidRequestError, "name the site")):
        with InspectionClient(inference.grpc, site=name) as client, pytest.raises(kind, match=said):
            client.inspect(sites[0].train[0])


def test_images_in_tiles_are_scored_as_by_the_library(
    fleet: Fleet, start_aggregator: StartAggregator, few: dict[str, SiteData], tmp_path: Path
) -> None:
    aggregator = start_aggregator(quorum=2, method=METHOD)
    sites, size = [few["brick-hall"], few["dim-hall"]], ("--input-size", "128")
    _, inference = federation(fleet, aggregator, sites, *size, "--tile-size", "64", "--tile-overlap", "32")
    released, memory = published(aggregator)
    space = released.feature_space
    assert (space.input_size, space.tile_size, space.tile_overlap, space.grid) == (128, 64, 32, 16)
    assert not released.needs_generator
    extractor = load_extractor(input_size=128, tile_size=64, tile_overlap=32, device="cpu")
    assert space.fingerprint == extractor.feature_space.fingerprint
    for site in sites:
        assert_scored_as_by(Scorer(extractor, bank_from_wire(memory), None), inference, site)

    flags = edge_flags(aggregator, few["bright-hall"])
    run = run_service("edge", *flags, *size, "--tile-size", "96", "--state-dir", str(tmp_path / "stranger"))
    assert run.returncode == 3
    assert extractor.feature_space.fingerprint in run.stderr
    assert "tile_size: 64 against 96" in run.stderr
