"""Files of the aggregator that were damaged on its disk: what sites can send again is asked for again, and of the rest
the operator is told what to do."""

from __future__ import annotations

import grpc
import pytest

from feddymem.v1.federation_pb2 import PHASE_OPEN, GlobalMemory
from services.demo.processes import Fleet, RunningService
from tests.integration.conftest import StartAggregator
from tests.integration.fake_site import make_bank
from tests.integration.refusals import refused
from tests.integration.test_operator import METHOD, activate, joined, memory_of, operate, play, status


def damage(running: RunningService, folder: str) -> None:
    """Flips a bit in each array below a folder of the state."""
    files = [path for path in (running.log.parent / "state" / folder).rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def test_a_bank_that_was_damaged_is_asked_for_again(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=2, method=METHOD)
    with joined(running, "a", "b") as (a, b):
        a.wait_for(PHASE_OPEN, 1)
        watched = a.watch()
        next(watched)
        a.upload(make_bank(1))
        damage(running, "banks/parts/a")
        b.upload(make_bank(2))
        code, said = refused(lambda: list(watched))
        assert (code, "watch the rounds again" in said) == (grpc.StatusCode.UNAVAILABLE, True)
        assert status(running).waits_for == "1 more banks, for the quorum of 2"
        assert "the bank of site 'a' cannot be read" in running.log.read_text()
        a.join()
        assert a.upload(make_bank(1))[-1].HasField("accepted")
        a.wait_for(PHASE_OPEN, 2)
        assert a.current_release().provenance.sites == 2


@pytest.mark.parametrize("killed", [False, True])
def test_a_round_whose_base_was_damaged_starts_from_the_release_that_an_operator_activates(
    fleet: Fleet, start_aggregator: StartAggregator, killed: bool
) -> None:
    running = start_aggregator(quorum=2, method=METHOD)
    with joined(running, "a", "b") as sites:
        play(sites, 1)
        first = set((running.log.parent / "state" / "releases").iterdir())
        play(sites, 2)
    second = {path for path in (running.log.parent / "state" / "releases").iterdir() if path not in first}
    for path in second:
        path.write_bytes(b"damaged")
    if killed:
        fleet.kill("aggregator")
        running = start_aggregator(quorum=2, method=METHOD)
    with joined(running, "a", "b") as sites:
        for number, site in enumerate(sites):
            site.upload(make_bank(30 + number), 3)
        fleet.wait_until(
            lambda: "release 2 of federation 'parts' cannot be read" in running.log.read_text(), 30, "the error"
        )
        assert status(running).round == 3
        assert activate(running, "1")[0] == 0
        sites[0].wait_for(PHASE_OPEN, 4)
        assert activate(running, "newest") == (0, "release 3 of parts is active; before: 1\n")
        assert (
            len(memory_of(sites[0], GlobalMemory(arrays=sites[0].current_release().arrays))) == 80
        )  # release 1 and two banks


def test_a_base_that_was_damaged_before_a_bank_was_made_is_left_as_well(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=2, method=METHOD)
    releases = running.log.parent / "state" / "releases"
    with joined(running, "a", "b") as sites:
        play(sites, 1)
        first = set(releases.iterdir())
        base = play(sites, 2)
        for path in set(releases.iterdir()) - first:
            path.write_bytes(b"damaged")
        assert refused(lambda: memory_of(sites[0], base))[0] is grpc.StatusCode.DATA_LOSS
        assert activate(running, "1")[0] == 0
        assert sites[0].wait_for(PHASE_OPEN, 3).memory.version == 1
        for damaged in ("2", "newest"):
            code, said = activate(running, damaged)
            assert (code, "release 2 of federation 'parts' is damaged" in said) == (3, True)
        assert status(running).release == 1


def test_what_is_no_bank_is_not_accepted_as_one_of_a_round_long_closed(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=1, method=METHOD)
    with joined(running, "a") as [site]:
        play([site], 1)
        play([site], 2)
        code, _said = refused(lambda: site.send(site.header([], 1), []))
        assert code is grpc.StatusCode.FAILED_PRECONDITION


def test_a_site_that_is_removed_before_its_first_round_is_over_leaves_the_others_their_origins(
    start_aggregator: StartAggregator,
) -> None:
    running = start_aggregator(quorum=2, method=METHOD)
    with joined(running, "b", "c", "a") as (b, c, a):
        a.upload(make_bank(3))
        assert operate(running, "remove", "a")[0] == 0
        play([b, c], 1)
        a.join()
        memory = memory_of(b, play([a, b, c], 2))
        assert memory.origins == 3
        assert [int((memory.weights[:, origin] > 0).sum()) for origin in range(3)] == [40, 40, 20]


def test_origins_are_those_of_the_first_release_with_a_site(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=1, sites=["a", "b"], round_deadline_seconds=1, method=METHOD)
    with joined(running, "b", "a") as (b, a):
        b.wait_for(PHASE_OPEN, 1)
        b.upload(make_bank(1))
        b.wait_for(PHASE_OPEN, 2)
        a.upload(make_bank(2), 2)
        memory = memory_of(b, b.wait_for(PHASE_OPEN, 3).memory)
        assert [int((memory.weights[:, origin] > 0).sum()) for origin in range(2)] == [20, 20]
        assert (memory.weights[:20, 0] > 0).all()
