"""What does not fit on the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc

from feddymem.v1.federation_pb2 import PHASE_OPEN
from feddymem.v1.release_pb2 import Release
from services.demo.processes import Fleet, RunningService
from services.runtime.arrays import bank_to_wire
from tests.integration.aggregator.conftest import METHOD
from tests.integration.conftest import StartAggregator
from tests.integration.fake_site import TIMEOUT_SECONDS, FakeSite, make_bank
from tests.integration.refusals import refused


def full_disk_for(running: RunningService, store: str, sha256: bytes) -> Path:
    """A part of an array that is /dev/full: writing it fails as on a full disk, until it is removed."""
    link = running.log.parent / "state" / store / f"{sha256.hex()}.part"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to("/dev/full")
    return link


def test_what_does_not_fit_on_the_disk_is_refused_and_taken_when_it_does(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=1, sites=["a"], method=METHOD)
    bank = make_bank()
    items = bank_to_wire(bank, "float16")[0].manifest
    full = full_disk_for(running, "banks/parts/a", items.sha256)
    with grpc.insecure_channel(running.grpc) as channel:
        site = FakeSite(channel, "a")
        site.join()
        code, text = refused(lambda: site.upload(bank))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert text.startswith("the disk of this service is full")
        assert "disk_full" in running.log.read_text()
        full.unlink()
        assert site.upload(bank)[-1].HasField("accepted")
        site.wait_for(PHASE_OPEN, 2)


def test_a_release_that_does_not_fit_on_the_disk_is_made_when_it_does(
    start_aggregator: StartAggregator, fleet: Fleet
) -> None:
    """What the release is made of is known from another aggregator, which had room."""

    def release_of(running: RunningService, meanwhile: Callable[[], None]) -> Release:
        with grpc.insecure_channel(running.grpc) as channel:
            sites = [FakeSite(channel, name) for name in ("a", "b")]
            for site in sites:
                site.join()
            sites[0].wait_for(PHASE_OPEN, 1)
            for seed, site in enumerate(sites):
                assert site.upload(make_bank(seed))[-1].HasField("accepted")
            meanwhile()
            sites[0].wait_for(PHASE_OPEN, 2)
            return sites[0].current_release()

    settings = {"sites": ["a", "b"], "method": METHOD}
    expected = release_of(start_aggregator("roomy", **settings), lambda: None)
    running = start_aggregator("full", **settings)
    full = full_disk_for(running, "releases", expected.arrays[0].sha256)
    failed = '"event": "aggregation_failed"'

    def make_room() -> None:
        fleet.wait_until(lambda: failed in running.log.read_text(), TIMEOUT_SECONDS, "the release not to fit")
        full.unlink(missing_ok=True)

    assert release_of(running, make_room).arrays == expected.arrays
    assert running.log.read_text().count(failed) == 1
