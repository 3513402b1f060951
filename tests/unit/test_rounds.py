"""What the operator says while a round is merged counts; who watches hears of moves at once and of the rest soon."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from feddymem.feature_space import FeatureSpace
from feddymem.federation import NextMemory
from feddymem.method import Method
from feddymem.outliers import Outlier
from feddymem.v1.federation_pb2 import PHASE_DONE, PHASE_OPEN, BankHeader
from feddymem.v1.operator_pb2 import STANDING_BANNED
from feddymem.v1.release_pb2 import Release
from services.aggregator import news
from services.aggregator.clock import monotonic
from services.aggregator.federation import Federation
from services.aggregator.merging import Merging
from services.aggregator.releases import Releases
from services.aggregator.settings import FederationSettings
from services.aggregator.state import State
from services.aggregator.uploads import Uploads
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import bank_to_wire
from services.runtime.errors import Refusal
from services.runtime.publisher import Publisher
from tests.integration.fake_site import make_bank
from tests.unit.one_federation import METHOD, SETTINGS, join, opened, upload

SITES = ("a", "b", "c")
METHOD_OF_TWO_ROUNDS = METHOD.model_copy(update={"rounds": 2})


class Slow:
    """Merges, but only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.merging, self._go_on = threading.Event(), threading.Event()
        self.merged: list[set[str]] = []
        merge = Merging.next_memory

        def slow(inputs: Merging, uploads: Uploads, releases: Releases, method: Method) -> NextMemory:
            self.merged.append(set(inputs.banks))
            self.merging.set()
            assert self._go_on.wait(30)
            return merge(inputs, uploads, releases, method)

        monkeypatch.setattr(Merging, "next_memory", slow)

    def go_on(self) -> None:
        self._go_on.set()


async def test_a_bank_of_a_site_that_is_removed_while_its_values_are_checked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checking, go_on = threading.Event(), threading.Event()
    check = Federation._check_values

    def slow(federation: Federation, header: BankHeader, space: FeatureSpace) -> int:
        checking.set()
        assert go_on.wait(30)
        return check(federation, header, space)

    monkeypatch.setattr(Federation, "_check_values", slow)
    with opened(tmp_path) as federation:
        for site in SITES:
            join(federation, site)
        uploaded = asyncio.ensure_future(upload(federation, "c"))
        assert await asyncio.to_thread(checking.wait, 30)
        federation.remove("c")
        go_on.set()
        with pytest.raises(Refusal, match="has not joined"):
            await uploaded
        assert federation._state.bank("parts", 1, "c") is None


@pytest.mark.parametrize(
    "says",
    [lambda federation: federation.set_standing("c", STANDING_BANNED), lambda federation: federation.remove("c")],
    ids=["ban", "remove"],
)
async def test_who_is_banned_or_removed_while_a_round_is_merged_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: Callable[[Federation], None]
) -> None:
    slow = Slow(monkeypatch)
    with opened(tmp_path) as federation:
        for site in SITES:
            join(federation, site)
        driven = asyncio.ensure_future(federation.rounds.run())
        for site in SITES:
            await upload(federation, site)
        await asyncio.to_thread(slow.merging.wait, 30)
        says(federation)
        slow.go_on()
        async with asyncio.timeout(30):
            while federation.rounds.phase != PHASE_DONE:
                await federation.rounds.news.wait()
            await driven
        assert slow.merged == [{"a", "b", "c"}, {"a", "b"}]
        release = federation.releases.find(1)
        assert release is not None
        assert release.provenance.sites == 2


async def test_banks_that_are_too_few_without_outliers_are_judged_again_with_what_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[set[str]] = []
    merge = Merging.next_memory

    def judging(inputs: Merging, uploads: Uploads, releases: Releases, method: Method) -> NextMemory:
        judged.append(set(inputs.banks))
        outliers = (Outlier("a", "items are odd"), Outlier("b", "items are odd")) if len(judged) == 1 else ()
        return dataclasses.replace(merge(inputs, uploads, releases, method), outliers=outliers)

    monkeypatch.setattr(Merging, "next_memory", judging)
    with opened(tmp_path) as federation:
        join(federation, "a")
        join(federation, "b")
        driven = asyncio.ensure_future(federation.rounds.run())
        await upload(federation, "a")
        await upload(federation, "b")
        async with asyncio.timeout(30):
            while federation.rounds.waits_for() != "2 more banks, for the quorum of 2; 2 in quarantine":
                await federation.rounds.news.wait()
            join(federation, "c")
            await upload(federation, "c")
            await driven
    assert judged == [{"a", "b"}, {"a", "b", "c"}]


async def test_a_release_is_published_though_old_ones_cannot_be_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, store = State(tmp_path), ArrayStore(tmp_path / "releases")
    published: list[int] = []
    monkeypatch.setattr(Publisher, "publish", lambda _self, release, _others: published.append(release.version))
    publisher = Publisher(store, frozenset(), lambda _who, _federation: True)
    releases = Releases("parts", FederationSettings(keep_releases=1), state, store, publisher)
    arrays = [array.manifest for array in bank_to_wire(make_bank(), "float16")]

    def full(_state: State, _federation: str, _version: int) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as disk:
        disk.setattr(State, "prune_release", full)
        for version in (1, 2):
            releases.add(Release(federation="parts", version=version, arrays=arrays), ["a"])
        assert (published[-1], releases.versions) == (2, [1, 2])
    releases.add(Release(federation="parts", version=3, arrays=arrays), ["a"])
    assert (published[-1], releases.versions, [each.version for each in state.releases("parts")]) == (3, [3], [3])
    state.close()


async def test_what_is_pruned_takes_no_array_of_a_release_that_is_kept_along(tmp_path: Path) -> None:
    state, store = State(tmp_path), ArrayStore(tmp_path / "releases")
    publisher = Publisher(store, frozenset(), lambda _who, _federation: True)
    releases = Releases("parts", FederationSettings(keep_releases=1), state, store, publisher)
    first, second, third = (bank_to_wire(make_bank(seed), "float16") for seed in range(3))
    [items, *others] = first
    for version, arrays in enumerate((first, [items, *second[1:]], third), 1):
        for array in arrays:
            store.put(array.manifest.sha256, array.data)
        release = Release(federation="parts", version=version, arrays=[array.manifest for array in arrays])
        releases.add(release, ["a"])
        assert (releases.versions, releases.readable(version)) == ([version], True)
        assert (items.manifest.sha256 in store) == (version < 3)
        assert all((array.manifest.sha256 in store) == (version == 1) for array in others)
    state.close()


async def test_releases_are_activated_when_all_rounds_are_over_and_the_base_of_the_last_is_gone(tmp_path: Path) -> None:
    with opened(
        tmp_path, SETTINGS.model_copy(update={"keep_releases": 1, "method": METHOD_OF_TWO_ROUNDS})
    ) as federation:
        join(federation, "a")
        join(federation, "b")
        driven = asyncio.ensure_future(federation.rounds.run())
        async with asyncio.timeout(30):
            for number in (1, 2):
                while federation.rounds.base != number - 1 or federation.rounds.phase != PHASE_OPEN:
                    await federation.rounds.news.wait()
                await upload(federation, "a", number)
                await upload(federation, "b", number)
            await driven
        assert (federation.releases.versions, federation.rounds.base) == ([2], 1)
        assert not federation.releases.readable(1)
        held = []
        for version in (2, 0):
            federation.activate(version, expected=2)
            held.append(federation.releases.held)
        assert held == [True, False]
        assert federation.rounds.base == 1, "what a closed round started from stays what it was"


async def test_a_clock_that_is_set_changes_no_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds_left(federation: Federation, wrong_by: float) -> float:
        monkeypatch.setattr(time, "time", lambda: now() + wrong_by)
        federation.rounds.changed()
        return federation.rounds.state().seconds_left

    now, deadline = time.time, SETTINGS.round_deadline_seconds
    with opened(tmp_path) as federation:
        join(federation, "a")
        join(federation, "b")
        driven = asyncio.ensure_future(federation.rounds.run())
        await asyncio.sleep(0)
        for wrong_by in (-3600, 7200):
            assert deadline - 60 < seconds_left(federation, wrong_by) <= deadline
        driven.cancel()
        await asyncio.gather(driven, return_exceptions=True)
    with opened(tmp_path) as federation:
        monotonic.cache_clear()  # as a restart
        assert deadline - 60 < seconds_left(federation, -3600) <= deadline, "it cannot be known better"
        monotonic.cache_clear()
        assert deadline - 1260 < seconds_left(federation, 1200) <= deadline - 1200, "the time without us counts"


async def test_watchers_hear_of_moves_at_once_and_of_banks_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(news, "WAITS_FOR_SECONDS", 0.5)
    with opened(tmp_path) as federation:
        join(federation, "a")
        driven = asyncio.ensure_future(federation.rounds.run())
        moved = asyncio.ensure_future(federation.rounds.news.wait(30))
        await asyncio.sleep(0)
        join(federation, "b")  # the quorum: the round opens
        assert federation.rounds.state().phase == PHASE_OPEN
        assert await moved
        soon = asyncio.ensure_future(federation.rounds.news.wait(30))
        await upload(federation, "a")
        assert not soon.done()
        assert federation.rounds.state().waits_for == "1 more banks, for the quorum of 2"
        assert await soon
        driven.cancel()
        await asyncio.gather(driven, return_exceptions=True)
