"""A round's candidate: who is waited for, what is taken, what goes live, and what is left of it all after a restart."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from feddymem.calibration import site_key
from feddymem.v1.federation_pb2 import PHASE_AGGREGATING, PHASE_CALIBRATING, PHASE_DONE, CalibrateRequest, Phase
from feddymem.v1.operator_pb2 import STANDING_ADMITTED, STANDING_BANNED
from feddymem.v1.release_pb2 import Release
from services.aggregator import rounds
from services.aggregator.calibrating import calibrated
from services.aggregator.federation import Federation
from services.runtime.errors import Refusal
from tests.integration.fake_site import calibration_message
from tests.unit.one_federation import METHOD, SETTINGS, join, opened, upload

HELD_OUT = SETTINGS.model_copy(update={"method": METHOD.model_copy(update={"hold_out_share": 0.2, "rounds": 2})})
SITES = ("a", "b", "c")
SCORES = [float(score) for score in range(40, 50)]


def said(
    federation: Federation, site: str, scores: Sequence[float] = SCORES, base: Sequence[float] | None = None
) -> CalibrateRequest:
    """What a site says of the present candidate."""
    candidate = federation.rounds.candidate
    assert candidate is not None
    before = None
    if federation.rounds.base:
        before = calibration_message(scores if base is None else base)
    return CalibrateRequest(
        federation="parts",
        site=site,
        instance=site,
        round=candidate.version,
        items_sha256=candidate.arrays[0].sha256,
        candidate=calibration_message(scores),
        base=before,
    )


async def until(federation: Federation, phase: Phase.ValueType, number: int = 1) -> None:
    async with asyncio.timeout(30):
        while (federation.rounds.phase, federation.rounds.number) != (phase, number):
            await federation.rounds.news.wait(0.1)


async def until_released(federation: Federation, version: int) -> Release:
    async with asyncio.timeout(30):
        while (release := federation.releases.find(version)) is None:
            await federation.rounds.news.wait(0.1)
    return release


@asynccontextmanager
async def driven(federation: Federation) -> AsyncIterator[None]:
    """The rounds go on inside the block."""
    running = asyncio.ensure_future(federation.rounds.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def merged(federation: Federation, sites: Sequence[str] = SITES, number: int = 1) -> None:
    """All sites have sent their banks, and are there; the round has a candidate."""
    for site in sites:
        await upload(federation, site, number)
    await until(federation, PHASE_CALIBRATING, number)


def there(federation: Federation, stack: ExitStack, sites: Sequence[str] = SITES) -> None:
    """These sites join, and stay."""
    for site in sites:
        join(federation, site)
        stack.enter_context(federation.presence(site, site))


async def test_a_release_has_what_each_site_tells_and_waits_for_all(tmp_path: Path) -> None:
    with opened(tmp_path, HELD_OUT) as federation, ExitStack() as stack:
        there(federation, stack)
        async with driven(federation):
            await merged(federation)
            state = federation.rounds.state()
            assert state.candidate.version == 1
            assert not state.HasField("memory")
            for left, site in zip((3, 2, 1), SITES, strict=True):
                assert federation.rounds.waits_for() == f"calibrations of {left} more sites"
                assert federation.releases.newest == 0
                federation.calibrate(said(federation, site))
            release = await until_released(federation, 1)
        assert release.calibration.false_alarm_rate == 0.05
        told = {site.site_sha256.hex(): site.calibration for site in release.calibration.sites}
        assert told == {site_key("parts", site): calibration_message(SCORES) for site in SITES}
        assert [site.held_out_images for site in federation.status().sites] == [10, 10, 10]
        assert federation.releases.active == 1


async def test_a_site_has_as_many_images_as_it_joined_with_whatever_its_bank_was_made_from(tmp_path: Path) -> None:
    """The bank is made from fewer: without those that are held out."""
    with opened(tmp_path, HELD_OUT) as federation, ExitStack() as stack:
        there(federation, stack)
        join(federation, "a", images=12)
        async with driven(federation):
            await merged(federation)
            assert [site.images for site in federation.status().sites] == [12, 10, 10]
            federation.calibrate(said(federation, "a", range(12)))
            with pytest.raises(Refusal, match="11 images are held out; site 'b' joined with 10 in all; join again"):
                federation.calibrate(said(federation, "b", range(11)))


async def test_a_site_that_has_gone_is_waited_for_as_long_as_its_bank_would_be(tmp_path: Path) -> None:
    hasty = HELD_OUT.model_copy(update={"grace_seconds": 0.3})
    with opened(tmp_path, hasty) as federation, ExitStack() as stack:
        there(federation, stack, ("a", "b"))
        join(federation, "c")
        async with driven(federation):
            await merged(federation)
            federation.calibrate(said(federation, "a"))
            federation.calibrate(said(federation, "b"))
            release = await until_released(federation, 1)
    assert len(release.calibration.sites) == 2


async def test_sites_that_say_nothing_are_waited_for_until_the_deadline(tmp_path: Path) -> None:
    hasty = HELD_OUT.model_copy(update={"calibration_deadline_seconds": 0.3})
    with opened(tmp_path, hasty) as federation, ExitStack() as stack:
        there(federation, stack)
        async with driven(federation):
            await merged(federation)
            federation.calibrate(said(federation, "b"))
            release = await until_released(federation, 1)
    assert [site.site_sha256.hex() for site in release.calibration.sites] == [site_key("parts", "b")]


async def test_what_is_said_while_a_candidate_is_checked_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checking, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        checking.set()
        assert go_on.wait(30)
        return calibrated(*arguments)

    monkeypatch.setattr(rounds, "calibrated", slow)
    hasty = HELD_OUT.model_copy(update={"calibration_deadline_seconds": 0.01})
    with opened(tmp_path, hasty) as federation, ExitStack() as stack:
        there(federation, stack)
        async with driven(federation):
            await merged(federation)
            assert await asyncio.to_thread(checking.wait, 30)
            for site in ("a", "b"):
                federation.calibrate(said(federation, site))
            go_on.set()
            release = await until_released(federation, 1)
    told = {site.site_sha256.hex() for site in release.calibration.sites}
    assert told == {site_key("parts", site) for site in ("a", "b")}


async def test_a_release_tells_the_alarms_that_its_threshold_makes_of_held_out_images(tmp_path: Path) -> None:
    lenient = HELD_OUT.model_copy(update={"false_alarm_rate": 0.3})
    with opened(tmp_path, lenient) as federation, ExitStack() as stack:
        there(federation, stack)
        async with driven(federation):
            await merged(federation)
            for site, scores in zip(SITES, (SCORES, SCORES[:7], []), strict=True):
                federation.calibrate(said(federation, site, scores))
            await until_released(federation, 1)
        found = federation.releases.details(1).sites
    # With the image that is judged, 3 of 11 and 2 of 8 are alarms, of which that one would be the last.
    assert [(site.site, site.alarms) for site in found] == [("a", 2), ("b", 1), ("c", 0)]
    assert [site.guaranteed_rate for site in found[:2]] == [3 / 11, 2 / 8]


async def test_without_a_hold_out_the_phase_is_not_there(tmp_path: Path) -> None:
    phases = set()
    with opened(tmp_path) as federation, ExitStack() as stack:
        there(federation, stack)
        async with driven(federation):
            for site in SITES:
                await upload(federation, site)
            async with asyncio.timeout(30):
                while federation.rounds.phase != PHASE_DONE:
                    await federation.rounds.news.wait(0.1)
                    phases.add(federation.rounds.phase)
        release = await until_released(federation, 1)
    assert PHASE_CALIBRATING not in phases
    assert not release.calibration.sites


async def test_where_no_image_is_held_out_the_release_goes_live_all_the_same(tmp_path: Path) -> None:
    with opened(tmp_path, HELD_OUT) as federation, ExitStack() as stack:
        there(federation, stack)
        async with driven(federation):
            await merged(federation)
            for site in SITES:
                federation.calibrate(said(federation, site, []))
            await until_released(federation, 1)
        assert federation.releases.active == 1
        details = federation.releases.details(1)
    assert [(site.site, site.threshold, site.alarms) for site in details.sites] == [(site, 0, 0) for site in SITES]


@pytest.mark.parametrize(
    ("change", "status", "text"),
    [
        ({"round": 2}, grpc.StatusCode.FAILED_PRECONDITION, "round 2"),
        ({"items_sha256": b"x" * 32}, grpc.StatusCode.FAILED_PRECONDITION, "is being calibrated"),
        ({"instance": "another"}, grpc.StatusCode.FAILED_PRECONDITION, "has not joined"),
        ({"site": "late", "instance": "late"}, grpc.StatusCode.FAILED_PRECONDITION, "no bank of site 'late' counts"),
        ({"base": calibration_message(SCORES)}, grpc.StatusCode.INVALID_ARGUMENT, "has no `base`"),
        ({"candidate": calibration_message(range(1, 12))}, grpc.StatusCode.INVALID_ARGUMENT, "11 images are held out"),
    ],
    ids=["round", "candidate", "instance", "no bank", "base", "images"],
)
async def test_what_does_not_fit_is_refused_and_nothing_of_it_is_kept(
    tmp_path: Path, change: dict[str, object], status: grpc.StatusCode, text: str
) -> None:
    with opened(tmp_path, HELD_OUT) as federation, ExitStack() as stack:
        there(federation, stack)
        async with driven(federation):
            await merged(federation)
            join(federation, "late")
            wrong = said(federation, "a")
            wrong.MergeFrom(CalibrateRequest(**{**change, "candidate": None}))  # type: ignore[arg-type]
            if "candidate" in change:
                wrong.candidate.CopyFrom(change["candidate"])  # type: ignore[arg-type]
            with pytest.raises(Refusal, match=text) as refused:
                federation.calibrate(wrong)
            assert refused.value.status is status
            assert federation._state.calibrations("parts", 1) == {}
            federation.calibrate(said(federation, "a"))


@pytest.mark.parametrize(
    ("levels", "counts"), [([2, 1], [1, 1]), ([1], [0]), ([9000], [1]), ([1], [2])], ids=["order", "0", "grid", "peaks"]
)
async def test_sketches_that_no_images_make_are_refused(tmp_path: Path, levels: list[int], counts: list[int]) -> None:
    with opened(tmp_path, HELD_OUT) as federation, ExitStack() as stack:
        there(federation, stack)
        async with driven(federation):
            await merged(federation)
            wrong = said(federation, "a", [1.0])
            del wrong.candidate.scores.levels[:], wrong.candidate.scores.counts[:]
            wrong.candidate.scores.levels.extend(levels)
            wrong.candidate.scores.counts.extend(counts)
            with pytest.raises(Refusal) as refused:
                federation.calibrate(wrong)
    assert refused.value.status is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_same_again_is_taken_again_and_another_one_is_not(tmp_path: Path) -> None:
    with opened(tmp_path, HELD_OUT) as federation, ExitStack() as stack:
        there(federation, stack)
        async with driven(federation):
            await merged(federation)
            first = said(federation, "a")
            federation.calibrate(first)
            federation.calibrate(first)
            with pytest.raises(Refusal, match="another calibration") as refused:
                federation.calibrate(said(federation, "a", [1.0, 2.0]))
            assert refused.value.status is grpc.StatusCode.ALREADY_EXISTS
            for site in ("b", "c"):
                federation.calibrate(said(federation, site))
            await until_released(federation, 1)
            federation.calibrate(first)  # who was not told that it counts may ask when the round is over
            first.candidate.CopyFrom(calibration_message([1.0]))
            with pytest.raises(Refusal, match="is being calibrated"):
                federation.calibrate(first)


@pytest.mark.parametrize("says", ["ban", "remove"])
async def test_what_an_operator_says_meanwhile_makes_another_candidate(tmp_path: Path, says: str) -> None:
    with opened(tmp_path, HELD_OUT) as federation, ExitStack() as stack:
        there(federation, stack, ("a", "b"))
        join(federation, "c")
        async with driven(federation):
            await merged(federation)
            first = federation.rounds.candidate
            assert first is not None
            federation.calibrate(said(federation, "a"))
            federation.calibrate(said(federation, "c"))
            if says == "ban":
                federation.set_standing("c", STANDING_BANNED)
            else:
                federation.remove("c")
            async with asyncio.timeout(30):
                while federation.rounds.candidate in (None, first):
                    await federation.rounds.news.wait(0.1)
            assert federation._state.calibrations("parts", 1) == {}
            for site in ("a", "b"):
                federation.calibrate(said(federation, site))
            release = await until_released(federation, 1)
        kept = {array.sha256.hex() for array in release.arrays}
        assert {path.name for path in (tmp_path / "releases").iterdir()} == kept
    assert release.provenance.sites == 2
    assert len(release.calibration.sites) == 2


async def test_what_was_said_of_a_candidate_that_comes_out_the_same_counts(tmp_path: Path) -> None:
    with opened(tmp_path, HELD_OUT) as federation, ExitStack() as stack:
        there(federation, stack)
        async with driven(federation):
            await merged(federation)
            federation.calibrate(said(federation, "a"))
            federation.set_standing("a", STANDING_ADMITTED)
            await until(federation, PHASE_AGGREGATING)
            await until(federation, PHASE_CALIBRATING)
            assert federation.rounds.waits_for() == "calibrations of 2 more sites"


async def test_a_candidate_goes_on_after_a_restart_with_what_was_said(tmp_path: Path) -> None:
    with opened(tmp_path, HELD_OUT) as federation, ExitStack() as stack:
        there(federation, stack)
        async with driven(federation):
            await merged(federation)
            federation.calibrate(said(federation, "a"))
            candidate = federation.rounds.candidate
    with opened(tmp_path, HELD_OUT) as federation, ExitStack() as stack:
        assert federation.rounds.candidate == candidate
        there(federation, stack)
        async with driven(federation):
            for site in ("b", "c"):
                federation.calibrate(said(federation, site))
            release = await until_released(federation, 1)
    assert len(release.calibration.sites) == 3


async def test_a_site_banned_just_before_a_restart_is_not_in_the_release(tmp_path: Path) -> None:
    with opened(tmp_path, HELD_OUT) as federation, ExitStack() as stack:
        there(federation, stack)
        async with driven(federation):
            await merged(federation)
        federation._state.put_standing("parts", "c", STANDING_BANNED)  # and was killed
    with opened(tmp_path, HELD_OUT) as federation, ExitStack() as stack:
        there(federation, stack, ("a", "b"))
        async with driven(federation):
            async with asyncio.timeout(30):
                while federation.rounds.candidate is None or federation.rounds.candidate.provenance.sites != 2:
                    await federation.rounds.news.wait(0.1)
            for site in ("a", "b"):
                federation.calibrate(said(federation, site))
            release = await until_released(federation, 1)
    assert release.provenance.sites == 2


async def test_a_candidate_whose_arrays_are_damaged_is_made_again(tmp_path: Path) -> None:
    with opened(tmp_path, HELD_OUT) as federation, ExitStack() as stack:
        there(federation, stack)
        async with driven(federation):
            await merged(federation)
            candidate = federation.rounds.candidate
            assert candidate is not None
            path = tmp_path / "releases" / candidate.arrays[0].sha256.hex()
            path.write_bytes(path.read_bytes()[:-1])
            for site in SITES:
                federation.calibrate(said(federation, site))
            release = await until_released(federation, 1)
        assert path.exists()
    assert len(release.calibration.sites) == 3


async def two_rounds(federation: Federation, scores: Sequence[float], base: Sequence[float]) -> None:
    """The second release, of which site c says so."""
    for site in SITES:
        federation.calibrate(said(federation, site))
    await until_released(federation, 1)
    await merged(federation, number=2)
    for site in ("a", "b"):
        federation.calibrate(said(federation, site))
    federation.calibrate(said(federation, "c", scores, base))
    await until_released(federation, 2)


async def test_a_release_that_fails_a_check_is_kept_and_not_activated(tmp_path: Path) -> None:
    three = HELD_OUT.model_copy(update={"method": HELD_OUT.method.model_copy(update={"rounds": 3})})
    with opened(tmp_path, three) as federation, ExitStack() as stack:
        there(federation, stack)
        async with driven(federation):
            await merged(federation)
            await two_rounds(federation, [1.2 * score for score in SCORES], SCORES)
            assert (federation.releases.newest, federation.releases.active) == (2, 1)
            [failed] = federation.status().failed_releases
            assert (failed.version, "not_worse: c: the median score" in failed.reason) == (2, True)
            [seen_by_site] = federation.status("a").failed_releases
            assert seen_by_site.reason == "not_worse"
            federation.activate(0, None)
            assert federation.releases.active == 1
            await merged(federation, number=3)
            assert federation.rounds.base == 1
            federation.activate(2, 1)
            assert (federation.releases.active, federation.releases.held) == (2, True)
    with opened(tmp_path, three) as federation:
        assert [(each.version, each.failed[:9]) for each in federation.releases.kept()] == [(1, ""), (2, "not_worse")]
        federation.activate(0, 2)
        assert federation.releases.active == 1


async def test_a_rise_within_the_margin_goes_live(tmp_path: Path) -> None:
    with opened(tmp_path, HELD_OUT) as federation, ExitStack() as stack:
        there(federation, stack)
        async with driven(federation):
            await merged(federation)
            await two_rounds(federation, [1.05 * score for score in SCORES], SCORES)
            assert federation.releases.active == 2
            assert [check.passed for check in federation.releases.details(2).checks] == [True] * 4
