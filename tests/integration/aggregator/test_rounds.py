"""From banks to releases, round by round."""

from __future__ import annotations

import dataclasses
import signal
from typing import Any

import grpc
import numpy as np

from feddymem.aggregate import aggregate
from feddymem.v1.federation_pb2 import PHASE_DONE, PHASE_OPEN, PHASE_WAITING, GetStatusRequest
from services.demo.processes import Fleet
from services.runtime.arrays import bank_from_wire, bank_to_wire
from tests.feature_spaces import SPACE
from tests.integration.aggregator.conftest import METHOD
from tests.integration.conftest import StartAggregator
from tests.integration.fake_site import TIMEOUT_SECONDS, FakeSite, make_bank
from tests.integration.refusals import refused


def test_two_sites_get_one_global_memory_that_is_the_library_s(sites: tuple[FakeSite, FakeSite]) -> None:
    banks = [make_bank(seed) for seed in (1, 2)]
    for site, bank in zip(sites, banks, strict=True):
        assert site.upload(bank)[-1].HasField("accepted")
    event = sites[0].wait_for(PHASE_OPEN, 2)

    arrived = bank_from_wire((array, sites[0].download(array.sha256)) for array in event.memory.arrays)

    sent = [bank_from_wire((w.manifest, w.data) for w in bank_to_wire(bank, "float16")) for bank in banks]
    expected = aggregate([bank.placed(number, 2) for number, bank in enumerate(sent)], 32).memory
    assert event.memory.version == 1
    np.testing.assert_allclose(arrived.items, expected.items, atol=2e-3)
    np.testing.assert_array_equal(arrived.weights, expected.weights)
    release = sites[0].current_release()
    assert (release.version, release.needs_generator, release.provenance.sites) == (1, True, 2)
    assert release.feature_space.fingerprint == SPACE.fingerprint


def test_the_federation_is_done_after_its_rounds(sites: tuple[FakeSite, FakeSite]) -> None:
    for round_number in (1, 2):
        sites[0].wait_for(PHASE_OPEN, round_number)
        for seed, site in enumerate(sites):
            site.upload(make_bank(10 * round_number + seed), round_number)
    assert sites[1].wait_for(PHASE_DONE, 2).memory.version == 2
    code, text = refused(lambda: sites[0].upload(make_bank(9), 3))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "round 3" in text


def test_before_the_quorum_the_state_is_waiting(channel: grpc.Channel, federation: str) -> None:
    site = FakeSite(channel, "a", federation)
    site.join()
    assert site.wait_for(PHASE_WAITING, 1).seconds_left == 0


def test_a_round_closes_by_its_deadline_and_a_late_bank_is_told_so(start_aggregator: StartAggregator) -> None:
    aggregator = start_aggregator(quorum=1, sites=["a", "b"], round_deadline_seconds=0.5, method=METHOD)
    with grpc.insecure_channel(aggregator.grpc) as channel:
        quick, slow = FakeSite(channel, "a"), FakeSite(channel, "b")
        quick.join()
        slow.join()
        quick.wait_for(PHASE_OPEN, 1)
        quick.upload(make_bank(1))
        slow.wait_for(PHASE_OPEN, 2)
        code, text = refused(lambda: slow.upload(make_bank(2)))
        assert (code, "round 1" in text, "next round" in text) == (grpc.StatusCode.FAILED_PRECONDITION, True, True)
        assert slow.upload(make_bank(2), 2)[-1].HasField("accepted")


def test_a_site_that_comes_late_is_an_origin_behind_those_known(start_aggregator: StartAggregator) -> None:
    """Although its name comes first; what the memory has of the others stays theirs."""
    settings = METHOD | {"memory_items": 100, "rounds": 2}
    aggregator = start_aggregator(quorum=1, sites=["a", "b"], round_deadline_seconds=0.5, method=settings)
    early, late = make_bank(1), make_bank(2)
    with grpc.insecure_channel(aggregator.grpc) as channel:
        b, a = FakeSite(channel, "b"), FakeSite(channel, "a")
        a.join()
        b.join()
        b.wait_for(PHASE_OPEN, 1)
        b.upload(early)
        a.wait_for(PHASE_OPEN, 2)
        a.upload(late, 2)
        arrays = a.wait_for(PHASE_DONE, 2).memory.arrays
        memory = bank_from_wire((array, a.download(array.sha256)) for array in arrays)
    np.testing.assert_array_equal(memory.weights[: len(early)], early.placed(0, 2).weights)
    np.testing.assert_array_equal(memory.weights[len(early) :], late.placed(1, 2).weights)


def test_a_deadline_without_a_quorum_does_not_close_the_round(start_aggregator: StartAggregator) -> None:
    aggregator = start_aggregator(quorum=2, round_deadline_seconds=0.1, method=METHOD)
    with grpc.insecure_channel(aggregator.grpc) as channel:
        a, b = FakeSite(channel, "a"), FakeSite(channel, "b")
        a.join()
        b.join()
        a.wait_for(PHASE_OPEN, 1)
        a.upload(make_bank(1))
        assert b.upload(make_bank(2))[-1].HasField("accepted")
        b.wait_for(PHASE_OPEN, 2)


def test_killed_and_restarted_the_round_goes_on_where_it_was(fleet: Fleet, start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=2, sites=["a", "b"], method=METHOD)
    with grpc.insecure_channel(running.grpc) as channel:
        a = FakeSite(channel, "a")
        b = FakeSite(channel, "b")
        a.join()
        b.join()
        a.wait_for(PHASE_OPEN, 1)
        a.upload(make_bank(1))
    fleet.kill("aggregator", signal.SIGKILL)
    running = start_aggregator(quorum=2, sites=["a", "b"], method=METHOD)
    with grpc.insecure_channel(running.grpc) as channel:
        stub = FakeSite(channel, "b")
        stub.instance = b.instance
        status = stub.rounds.GetStatus(GetStatusRequest(), timeout=TIMEOUT_SECONDS).federations[0]
        assert (status.phase, status.round, status.sites[0].last_round) == (PHASE_OPEN, 1, 1)
        stub.upload(make_bank(2))
        assert stub.wait_for(PHASE_OPEN, 2).memory.version == 1


def test_several_federations_do_not_mix(fleet: Fleet, tmp_path: Any) -> None:
    config = tmp_path / "two.yaml"
    config.write_text("federations: {parts: &one {quorum: 1, method: {rounds: 1, hold_out_share: 0}}, scans: *one}\n")
    running = fleet.start("aggregator", "aggregator", "--config", str(config))
    with grpc.insecure_channel(running.grpc) as channel:
        parts = FakeSite(channel, "a")
        scans = FakeSite(channel, "a", "scans", dataclasses.replace(SPACE, input_size=64))
        for site in (parts, scans):
            site.join()
            site.wait_for(PHASE_OPEN, 1)
        parts.upload(make_bank(1), item_type="uint8")
        parts.wait_for(PHASE_DONE, 1)
        assert not parts.current_release().needs_generator
        status = scans.rounds.GetStatus(GetStatusRequest(federation="scans"), timeout=TIMEOUT_SECONDS).federations[0]
        assert (status.phase, status.release) == (PHASE_OPEN, 0)
