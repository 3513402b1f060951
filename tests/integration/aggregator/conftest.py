"""One aggregator for the tests of a file, and a federation for each of them."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
import yaml

from feddymem.v1.federation_pb2 import PHASE_OPEN
from services.demo.processes import Fleet
from tests.integration.fake_site import FakeSite

METHOD = {
    "generator": True,
    "bank_items": 30,
    "memory_items": 32,
    "rounds": 2,
    "item_type": "float16",
    "hold_out_share": 0,
}
FEDERATIONS = [f"parts-{number:02}" for number in range(15)]
"""No fewer than any file has tests that take one."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[grpc.Channel, Iterator[str]]]:
    """One aggregator for many tests, and a federation of its own for each of them."""
    folder = tmp_path_factory.mktemp("aggregator")
    settings = {"quorum": 2, "sites": ["a", "b"], "method": METHOD}
    config = folder / "aggregator.yaml"
    config.write_text(yaml.safe_dump({"federations": dict.fromkeys(FEDERATIONS, settings)}))
    with Fleet(folder) as fleet:
        running = fleet.start("aggregator", "aggregator", "--config", str(config))
        with grpc.insecure_channel(running.grpc) as opened:
            yield opened, iter(FEDERATIONS)


@pytest.fixture
def channel(shared: tuple[grpc.Channel, Iterator[str]]) -> grpc.Channel:
    return shared[0]


@pytest.fixture
def federation(shared: tuple[grpc.Channel, Iterator[str]]) -> str:
    """A federation that no other test uses."""
    return next(shared[1])


@pytest.fixture
def sites(channel: grpc.Channel, federation: str) -> tuple[FakeSite, FakeSite]:
    """Two sites that have joined, in an open first round."""
    a, b = FakeSite(channel, "a", federation), FakeSite(channel, "b", federation)
    a.join()
    b.join()
    a.wait_for(PHASE_OPEN, 1)
    return a, b
