"""One of several sites sends what no product explains: it is left out, the operator sees why, and decides."""

from __future__ import annotations

import dataclasses
import urllib.request

from feddymem.memory import MemoryBank
from feddymem.v1.federation_pb2 import PHASE_OPEN
from services.demo.processes import Fleet, RunningService
from tests.integration.conftest import StartAggregator
from tests.integration.fake_site import FakeSite, make_bank
from tests.integration.test_operator import feddymem, joined, operate, status

METHOD = {"bank_items": 30, "memory_items": 200, "rounds": 9, "item_type": "float16", "hold_out_share": 0}
NAMES = ("a", "b", "c", "d")


def scaled(bank: MemoryBank) -> MemoryBank:
    return dataclasses.replace(bank, items=bank.items * 10)


def shown(running: RunningService, site: str) -> str:
    """What `feddymem status` has in the row of a site."""
    out = feddymem("status", "--server", running.grpc).stdout
    return next(line for line in out.splitlines() if f" {site} " in line)


def metrics_of(running: RunningService) -> str:
    with urllib.request.urlopen(f"http://{running.metrics}/metrics", timeout=10) as answer:
        return str(answer.read(), "utf-8")


def send(sites: list[FakeSite], round_number: int, liar: str = "") -> None:
    sites[0].wait_for(PHASE_OPEN, round_number)
    for number, site in enumerate(sites):
        bank = make_bank(10 * round_number + number)
        assert site.upload(scaled(bank) if site.site == liar else bank, round_number)[-1].HasField("accepted")


def test_an_outlying_bank_is_left_out_until_the_operator_admits_it(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=3, sites=list(NAMES), method=METHOD)
    with joined(running, *NAMES) as sites:
        send(sites, 1, liar="c")
        assert sites[0].wait_for(PHASE_OPEN, 2).memory.version == 1
        made = sites[0].current_release().provenance
        assert (made.sites, made.quarantined, made.items) == (3, 1, 60)
        reasons = {site.site: site.quarantine for site in status(running).sites}
        assert "outlying is more than 3 times" in reasons.pop("c")
        assert set(reasons.values()) == {""}
        assert "quarantine" in shown(running, "c")
        assert "judged" in shown(running, "b")
        assert 'feddymem_banks_quarantined_total{federation="parts"} 1.0' in metrics_of(running)
        assert operate(running, "admit", "c")[0] == 0
        send(sites, 2, liar="c")
        sites[0].wait_for(PHASE_OPEN, 3)
        made = sites[0].current_release().provenance
        assert (made.sites, made.quarantined) == (4, 0)


def test_a_quorum_of_honest_banks_is_waited_for_over_a_kill(fleet: Fleet, start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=3, method=METHOD)
    with joined(running, "a", "b", "c") as sites:
        send(sites, 1, liar="b")
        for event in sites[0].watch():
            if "quarantine" in event.waits_for:
                assert event.waits_for == "1 more banks, for the quorum of 3; 1 in quarantine"
                break
    fleet.kill("aggregator")
    running = start_aggregator(quorum=3, method=METHOD)
    [liar] = [site for site in status(running).sites if site.quarantine]
    assert liar.site == "b"
    with joined(running, "d") as [site]:
        assert site.upload(make_bank(7), 1)[-1].HasField("accepted")
        assert site.wait_for(PHASE_OPEN, 2).memory.version == 1
        made = site.current_release().provenance
        assert (made.sites, made.quarantined) == (3, 1)


def test_who_is_admitted_while_a_round_waits_completes_it(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=3, method=METHOD)
    with joined(running, "a", "b", "c") as sites:
        send(sites, 1, liar="b")
        for event in sites[0].watch():
            if "quarantine" in event.waits_for:
                break
        assert operate(running, "admit", "b")[0] == 0
        assert sites[0].wait_for(PHASE_OPEN, 2).memory.version == 1
        assert sites[0].current_release().provenance.sites == 3


def test_two_sites_are_no_majority(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=2, method=METHOD)
    with joined(running, "a", "b") as sites:
        send(sites, 1, liar="b")
        sites[0].wait_for(PHASE_OPEN, 2)
        assert sites[0].current_release().provenance.sites == 2
