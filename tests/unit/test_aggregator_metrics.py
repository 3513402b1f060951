"""What the aggregator shows of rounds, banks and releases is what has become of them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from feddymem.federation import NextMemory
from feddymem.method import Method
from feddymem.outliers import Outlier
from feddymem.release_checks import CHECKS
from feddymem.v1.federation_pb2 import PHASE_OPEN
from feddymem.v1.operator_pb2 import ReleaseCheck
from feddymem.v1.release_pb2 import Release
from services.aggregator import clock, metrics, rounds
from services.aggregator.merging import Merging
from services.aggregator.releases import Releases
from services.aggregator.settings import FederationSettings
from services.aggregator.state import State
from services.aggregator.uploads import Uploads
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import bank_to_wire
from services.runtime.publisher import Publisher
from tests.integration.fake_site import make_bank
from tests.samples import growth, sample, total
from tests.unit.one_federation import METHOD, SETTINGS, join, opened, upload
from tests.unit.test_calibrating import HELD_OUT, SITES, driven, merged, said, there, until, until_released

TWO_ROUNDS = SETTINGS.model_copy(update={"method": METHOD.model_copy(update={"rounds": 2})})
HOUR = 3600.0


async def is_shown(name: str, wanted: float) -> None:
    async with asyncio.timeout(30):
        while total(name, federation="parts") != wanted:  # noqa: ASYNC110 - there is no event for a metric
            await asyncio.sleep(0)


class Merged:
    """Watches the merging, and makes outliers or errors of it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.results: list[NextMemory] = []
        self.outliers: tuple[Outlier, ...] = ()
        self.errors: list[Exception] = []
        merge = Merging.next_memory

        def watched(inputs: Merging, uploads: Uploads, releases: Releases, method: Method) -> NextMemory:
            if self.errors:
                raise self.errors.pop()
            told = len(self.results) + 1  # of so few items nothing is left to merge
            found = dataclasses.replace(
                merge(inputs, uploads, releases, method),
                outliers=self.outliers,
                iterations=10 + told,
                inertia=0.5 * told,
            )
            self.results.append(found)
            return found

        patch.setattr(Merging, "next_memory", watched)


@pytest.fixture
def merging(monkeypatch: pytest.MonkeyPatch) -> Merged:
    return Merged(monkeypatch)


async def test_a_round_takes_from_its_opening_to_its_release_and_its_merging_only_a_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = 0.0
    now = SimpleNamespace(time=lambda: time.time() + late, monotonic=lambda: time.monotonic() + late)
    for module in (clock, rounds):
        monkeypatch.setattr(module, "time", now)
    settings = TWO_ROUNDS.model_copy(update={"round_deadline_seconds": 10 * HOUR})
    names = [f"{what}_duration_seconds_{part}" for what in ("round", "aggregation") for part in ("sum", "count")]
    more, started = growth(*names, federation="parts"), time.monotonic()
    with opened(tmp_path, settings) as federation:
        join(federation, "a")
        join(federation, "b")
        metrics.ROUND.labels("parts").set(0)  # whatever other tests have left
        async with driven(federation):
            await is_shown("federation_round", 1)
            await upload(federation, "a")
            late = HOUR
            assert more() == [0, 0, 0, 0]
            await upload(federation, "b")
            await until(federation, PHASE_OPEN, 2)
            await is_shown("federation_round", 2)
        took = time.monotonic() - started
    round_sum, rounds_ended, merge_sum, merges = more()
    assert (rounds_ended, merges) == (1, 1)
    assert HOUR < round_sum <= HOUR + took
    assert 0 < merge_sum <= took


async def test_what_came_of_the_last_merging_is_shown(tmp_path: Path, merging: Merged) -> None:
    with opened(tmp_path, TWO_ROUNDS) as federation:
        join(federation, "a")
        join(federation, "b")
        async with driven(federation):
            for number in (1, 2):
                await until(federation, PHASE_OPEN, number)
                await upload(federation, "a", number)
                await upload(federation, "b", number)
                await until_released(federation, number)
                found = merging.results[-1]
                assert sample("aggregation_iterations", federation="parts") == 10 + number
                assert sample("aggregation_inertia", federation="parts") == 0.5 * number
                assert sample("global_memory_items", federation="parts") == len(found.memory)


async def test_an_aggregation_that_fails_is_counted_and_one_that_does_not_is_not(
    tmp_path: Path, merging: Merged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "AGGREGATION_RETRY_SECONDS", 0.001)
    merging.errors = [RuntimeError("out of memory"), RuntimeError("out of memory")]
    more = growth("aggregations_failed_total", "round_duration_seconds_count", federation="parts")
    with opened(tmp_path) as federation:
        join(federation, "a")
        join(federation, "b")
        async with driven(federation):
            await upload(federation, "a")
            await upload(federation, "b")
            await until_released(federation, 1)
    assert more() == [2, 1]


async def test_banks_are_counted_once_with_their_bytes_and_those_left_out_when_their_round_has_closed(
    tmp_path: Path, merging: Merged
) -> None:
    names = "banks_accepted_total", "bank_received_bytes_total", "banks_quarantined_total"
    more = growth(*names, federation="parts")
    merging.outliers = (Outlier("c", "items are odd"),)
    with opened(tmp_path) as federation:
        for site in "abc":
            join(federation, site)
        size = 0
        for count, site in enumerate("abc", 1):
            await upload(federation, site)
            bank = federation._state.bank("parts", 1, site)
            assert bank is not None
            await federation.accept(bank.header)  # as where another stream was first
            size += bank.received_bytes
            assert bank.received_bytes > sum(array.size_bytes for array in bank.header.arrays)
            assert more() == [count, size, 0]
        async with driven(federation):
            release = await until_released(federation, 1)
    assert release.provenance.quarantined == 1
    assert more() == [3, size, 1]


async def test_a_calibration_is_counted_once(tmp_path: Path) -> None:
    more = growth("calibrations_accepted_total", federation="parts")
    with opened(tmp_path, HELD_OUT) as federation, ExitStack() as stack:
        there(federation, stack)
        async with driven(federation):
            await merged(federation)
            for count, site in enumerate(SITES, 1):
                calibration = said(federation, site)
                federation.calibrate(calibration)
                federation.calibrate(calibration)
                assert more() == [count]


def of_releases(federation: str) -> tuple[float | None, ...]:
    names = ("release_version", "global_memory_items", "release_timestamp_seconds", "release_withheld")
    return tuple(sample(name, federation=federation) for name in names)


def test_of_releases_the_active_one_is_shown_and_when_the_newest_was_made(tmp_path: Path) -> None:
    """So that an alert tells of a federation in which nothing new comes about, whatever an operator has activated."""
    name = "shown"
    with closing(State(tmp_path)) as state:
        store = ArrayStore(tmp_path / "releases")
        publisher = Publisher(store, frozenset(), lambda _who, _federation: True)
        releases = Releases(name, FederationSettings(), state, store, publisher)

        def add(version: int, *failed: str) -> None:
            arrays = bank_to_wire(make_bank(version, items=10 * version), "float16")
            for array in arrays:
                store.put(array.manifest.sha256, array.data)
            release = Release(federation=name, version=version, arrays=[array.manifest for array in arrays])
            release.created.FromMilliseconds(1000 * version + 500)
            releases.add(release, ["a"], [ReleaseCheck(name=check, passed=check not in failed) for check in CHECKS])

        def failures() -> dict[str, float]:
            return {check: total("release_checks_failed_total", federation=name, check=check) for check in CHECKS}

        add(1)
        assert of_releases(name) == (1, 10, 1.5, 0)
        add(2)
        assert of_releases(name) == (2, 20, 2.5, 0)
        releases.activate(1, None)
        assert of_releases(name) == (1, 10, 2.5, 0), "held by the operator, which is no failure of a check"
        releases.activate(0, None)
        assert failures() == dict.fromkeys(CHECKS, 0)
        add(3, CHECKS[0])
        assert of_releases(name) == (2, 20, 3.5, 1)
        assert failures() == {**dict.fromkeys(CHECKS, 0), CHECKS[0]: 1}
        releases.activate(3, None)
        assert of_releases(name) == (3, 30, 3.5, 0)
