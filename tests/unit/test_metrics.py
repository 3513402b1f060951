"""What is counted is what has happened."""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from feddymem.feature_space import FeatureSpace
from feddymem.method import Method
from feddymem.outliers import Outlier
from feddymem.v1.federation_pb2 import BankHeader, JoinRequest
from feddymem.v1.operator_pb2 import STANDING_ADMITTED, STANDING_BANNED
from services.aggregator import metrics as aggregator_metrics
from services.aggregator.federation import Federation
from services.aggregator.settings import FederationSettings
from services.aggregator.state import AcceptedBank, State
from services.inference import metrics as inference_metrics
from services.inference.outcomes import counted
from services.runtime import metrics
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import bank_to_wire
from services.runtime.errors import Refusal, invalid, precondition
from services.runtime.identity import Role
from services.runtime.messages import feature_space_to_message
from services.runtime.publisher import Publisher
from tests.feature_spaces import SPACE
from tests.integration.fake_site import make_bank
from tests.samples import sample, total

SETTINGS = FederationSettings(quorum=2, round_deadline_seconds=60, method=Method(rounds=1, item_type="float16"))


@contextmanager
def opened(folder: Path, name: str, settings: FederationSettings = SETTINGS) -> Iterator[Federation]:
    state, store = State(folder), ArrayStore(folder / "releases")
    publisher = Publisher(store, frozenset(), lambda _who, _federation: True)
    try:
        yield Federation(name, settings, state, folder / "banks", store, publisher)
    finally:
        state.close()


def join(federation: Federation, site: str, space: FeatureSpace = SPACE) -> None:
    message = feature_space_to_message(space)
    federation.join(JoinRequest(federation=federation.name, site=site, instance=site, feature_space=message, images=10))


def header(federation: Federation, site: str, **changes: object) -> BankHeader:
    arrays = [array.manifest for array in bank_to_wire(make_bank(1), "float16")]
    fields = {"round": 1, "fingerprint": SPACE.fingerprint, "images": 10, "arrays": arrays, **changes}
    return BankHeader(federation=federation.name, site=site, instance=site, **fields)  # type: ignore[arg-type]


def sites(name: str, what: str = "present") -> dict[str, float | None]:
    shown = {site: sample(f"site_{what}", federation=name, site=site) for site in "abc"}
    return {site: found for site, found in shown.items() if found is not None}


def known(name: str) -> tuple[float | None, float | None]:
    return sample("sites_known", federation=name), sample("sites_present", federation=name)


async def test_sites_are_shown_by_name_while_they_are_to_take_part(tmp_path: Path) -> None:
    with opened(tmp_path, "sites") as federation:
        assert known("sites") == (0, 0)
        for site in "abc":
            join(federation, site)
        with federation.presence("a", "a"):
            assert sites("sites") == {"a": 1, "b": 0, "c": 0}
            assert known("sites") == (3, 1)
        assert sites("sites") == {"a": 0, "b": 0, "c": 0}
        federation.set_standing("b", STANDING_BANNED)
        federation.remove("c")
        assert sites("sites") == {"a": 0}
        assert known("sites") == (1, 0)
        join(federation, "c")
        assert sites("sites") == {"a": 0, "c": 0}


async def test_sites_of_the_list_are_shown_before_they_have_come(tmp_path: Path) -> None:
    with opened(tmp_path, "listed", SETTINGS.model_copy(update={"sites": ("a", "b")})):
        assert sites("listed") == {"a": 0, "b": 0}
        assert known("listed") == (2, 0)


async def test_so_many_sites_are_shown_by_name_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregator_metrics, "NAMED_SITES", 2)
    with opened(tmp_path, "many") as federation:
        for site in "abc":
            join(federation, site)
        assert sites("many").keys() == {"a", "b"}
        assert known("many") == (3, 0)
        federation.remove("a")
        join(federation, "c")
        assert sites("many").keys() == {"b", "c"}


async def test_a_quarantine_is_shown_until_the_bank_counts(tmp_path: Path) -> None:
    with opened(tmp_path, "quarantine") as federation:
        for site in "abc":
            join(federation, site)
        federation.members.show_quarantine({"b"}, ["a", "b", "c"])
        assert sites("quarantine", "quarantined") == {"a": 0, "b": 1, "c": 0}
        federation.set_standing("b", STANDING_ADMITTED)
        assert sites("quarantine", "quarantined")["b"] == 0
        federation.members.show_quarantine({"c"}, ["a", "c"])
        federation.members.show_quarantine(set(), ["c"])
        assert sites("quarantine", "quarantined") == {"a": 0, "b": 0, "c": 0}


async def test_a_quarantine_is_shown_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path, "restart") as federation:
        join(federation, "a")
        federation._state.put_bank(AcceptedBank(header(federation, "a"), 1))
        federation.rounds._quarantine([Outlier("a", "unlike the others")], ["a"])
    aggregator_metrics.SITE_QUARANTINED.remove("restart", "a")
    with opened(tmp_path, "restart"):
        assert sites("restart", "quarantined") == {"a": 1}


async def test_a_round_is_shown_with_what_it_is_measured_by(tmp_path: Path) -> None:
    def phases() -> dict[str, float | None]:
        names = ("waiting", "open", "aggregating", "calibrating", "done")
        return {name: sample("federation_phase", federation="round", phase=name) for name in names}

    with opened(tmp_path, "round") as federation:
        assert phases() == {"waiting": 1, "open": 0, "aggregating": 0, "calibrating": 0, "done": 0}
        assert sample("round_quorum_banks", federation="round") == 2
        assert sample("round_deadline_seconds", federation="round") == 60
        driven = asyncio.ensure_future(federation.rounds.run())
        for site in "ab":
            join(federation, site)
        assert phases()["open"] == 1
        async with asyncio.timeout(30):
            while sample("round_banks", federation="round") is None:  # noqa: ASYNC110 - there is no event for a metric
                await asyncio.sleep(0)
        federation._state.put_bank(AcceptedBank(header(federation, "a"), 1))
        federation.rounds.changed()
        async with asyncio.timeout(30):
            while sample("round_banks", federation="round") != 1:  # noqa: ASYNC110 - likewise
                await asyncio.sleep(0)
        [opened_round] = [federation._state.opened_round("round", 1)]
        assert opened_round is not None
        assert sample("round_opened_timestamp_seconds", federation="round") == opened_round.opened
        driven.cancel()


@pytest.mark.parametrize(
    ("reason", "changes"),
    [("late", {"round": 7}), ("fingerprint", {"fingerprint": "f" * 64}), ("invalid", {"images": 0})],
)
async def test_a_refused_bank_is_counted_by_its_reason(tmp_path: Path, reason: str, changes: dict[str, object]) -> None:
    name = f"refused-{reason}"
    with opened(tmp_path, name) as federation:
        for site in "ab":
            join(federation, site)
        reasons = ("late", "fingerprint", "duplicate", "invalid")
        assert [sample("banks_refused_total", federation=name, reason=each) for each in reasons] == [0] * 4
        for durations in ("round", "aggregation"):  # there before the first, so that the first is an increase
            assert sample(f"{durations}_duration_seconds_count", federation=name) == 0
        with pytest.raises(Refusal):
            federation.check_header(header(federation, "a", **changes))
        assert sample("banks_refused_total", federation=name, reason=reason) == 1


async def test_another_bank_of_a_site_is_counted_as_a_duplicate(tmp_path: Path) -> None:
    with opened(tmp_path, "twice") as federation:
        for site in "ab":
            join(federation, site)
        federation._state.put_bank(AcceptedBank(header(federation, "a"), 1))
        with pytest.raises(Refusal):
            federation.check_header(header(federation, "a", arrays=[]))
        assert sample("banks_refused_total", federation="twice", reason="duplicate") == 1


def outcomes() -> dict[str, float]:
    return {name: total("inspections_total", outcome=name) for name in inference_metrics.ENDED}


@pytest.mark.parametrize(("anomalous", "outcome"), [(True, "anomalous"), (False, "ok"), (None, "ok")])
def test_an_inspection_is_counted_by_its_verdict(anomalous: bool | None, outcome: str) -> None:
    before = outcomes()
    with counted() as ending:
        ending.anomalous = anomalous
    assert outcomes() == {**before, outcome: before[outcome] + 1}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(invalid("no"), "invalid"), (asyncio.CancelledError(), "cancelled"), (RuntimeError("oh"), "failed")],
)
def test_an_inspection_that_ends_otherwise_is_counted_once(error: BaseException, outcome: str) -> None:
    before = outcomes()
    with pytest.raises(type(error)), counted():
        raise error
    assert outcomes() == {**before, outcome: before[outcome] + 1}


def test_scores_are_told_in_typical_distances_and_verdicts_where_there_are_some() -> None:
    found = inference_metrics.of_federation("scores")
    assert found is inference_metrics.of_federation("scores")
    found.count(45.0, 30.0, anomalous=None)
    found.count(60.0, 30.0, anomalous=True)
    found.count(30.0, 30.0, anomalous=False)
    assert sample("inspection_score_ratio_sum", federation="scores") == 4.5
    assert sample("inspection_score_ratio_count", federation="scores") == 3
    verdicts = [sample("verdicts_total", federation="scores", verdict=each) for each in ("normal", "anomalous")]
    assert verdicts == [1, 1]
    found.count(1.0, 0.0, anomalous=None)
    assert math.isfinite(sample("inspection_score_ratio_sum", federation="scores") or math.inf)


def test_connections_to_publishers_are_counted_while_they_last() -> None:
    def connected() -> float:
        return total("publishers_connected", role="site")

    before = connected()
    with metrics.connected_to(Role.SITE), metrics.connected_to(Role.SITE):
        assert connected() == before + 2
    with pytest.raises(Refusal), metrics.connected_to(Role.SITE):
        raise precondition("the line broke")
    assert connected() == before


def test_a_disk_that_cannot_be_asked_takes_no_other_metric_along(tmp_path: Path) -> None:
    server = metrics.serve_metrics("127.0.0.1", 0, tmp_path / "gone")
    server.shutdown()
    server.server_close()
    assert math.isnan(total("state_free_bytes"))
    server = metrics.serve_metrics("127.0.0.1", 0, tmp_path)
    server.shutdown()
    server.server_close()
    assert 0 < total("state_free_bytes") <= total("state_size_bytes")


def test_the_disk_is_shown_with_its_size_and_the_room_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(total=9, used=4, free=3)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    server = metrics.serve_metrics("127.0.0.1", 0, tmp_path)
    server.shutdown()
    server.server_close()
    assert [sample(f"state_{what}_bytes") for what in ("size", "free")] == [9, 3]
    assert set(asked) == {tmp_path}


def test_a_gpus_memory_is_that_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 7)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 9)
    metrics.show_device("cuda")
    found = [sample("gpu_memory_bytes", state=state) for state in ("allocated", "reserved")]
    assert found == [7, 9]
    metrics.GPU_MEMORY.clear()
    metrics.DEVICE.clear()
