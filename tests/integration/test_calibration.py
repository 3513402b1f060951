"""A round's candidate is calibrated by its sites: real processes over real sockets, and what operators see of it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import yaml

from feddymem.v1.federation_pb2 import PHASE_CALIBRATING, PHASE_OPEN
from feddymem.v1.operator_pb2 import GetReleaseRequest, GetReleaseResponse
from feddymem.v1.operator_pb2_grpc import OperatorServiceStub
from feddymem.v1.release_pb2 import Release, WatchReleasesRequest, WatchReleasesResponse
from services.demo.processes import Fleet, RunningService
from tests.chaos.federation import SETTINGS, SITES, Trial, write_images
from tests.integration.conftest import StartAggregator
from tests.integration.fake_site import TIMEOUT_SECONDS, FakeSite, make_bank
from tests.integration.refusals import refused
from tests.integration.test_operator import METHOD, activate, arrays, feddymem, joined, operate, status

CALIBRATED = METHOD | {"hold_out_share": 0.2}
SCORES = [float(score) for score in range(40, 50)]
_WATCH_SECONDS = 180
"""Of a watch beside which commands are called, each a process of its own."""


def play(sites: list[FakeSite], number: int, worse: float = 1) -> None:
    """A round in which all sites upload and calibrate; the last one finds its images scored so many times as high."""
    sites[0].wait_for(PHASE_OPEN, number)
    for seed, site in enumerate(sites):
        site.upload(make_bank(10 * number + seed), number)
    for site in sites:
        factor = worse if site is sites[-1] and number > 1 else 1
        site.calibrate([factor * score for score in SCORES], SCORES, number)
    sites[0].wait_for(PHASE_OPEN, number + 1)


def metric(running: RunningService, name: str) -> float:
    """The sum of a metric's series."""
    with urllib.request.urlopen(f"http://{running.metrics}/metrics") as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


def test_a_candidate_can_be_had_by_its_sites_before_it_is_a_release(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=2, method=CALIBRATED)
    with joined(running, "a", "b") as (a, b):
        a.upload(make_bank(1))
        b.upload(make_bank(2))
        event = a.wait_for(PHASE_CALIBRATING, 1)
        assert event.waits_for == "calibrations of 2 more sites"
        assert (event.candidate.version, event.HasField("memory")) == (1, False)
        assert all(len(a.download(array.sha256)) == array.size_bytes for array in event.candidate.arrays)
        code, text = refused(lambda: a.upload(make_bank(3)))
        assert (code, "round 1 is calibrating" in text) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        a.calibrate(SCORES)
        b.calibrate([])
        assert b.wait_for(PHASE_OPEN, 2).memory == event.candidate
        release = a.current_release()
    assert sum(sum(site.calibration.scores.counts) for site in release.calibration.sites) == len(SCORES)
    assert [site.held_out_images for site in status(running).sites] == [len(SCORES), 0]


def test_a_release_that_fails_a_check_is_kept_and_an_operator_may_activate_it(
    start_aggregator: StartAggregator, fleet: Fleet
) -> None:
    settings = {"quorum": 2, "method": CALIBRATED, "worse_margin": 0.1}
    running = start_aggregator(**settings)
    with joined(running, "a", "b") as (a, b):
        play([a, b], 1)
        play([a, b], 2, worse=1.2)
        assert a.wait_for(PHASE_OPEN, 3).memory.version == 1
        assert a.current_release().version == 1
        now = status(running)
        assert (now.release, list(now.releases)) == (1, [1, 2])
        [failed] = now.failed_releases
        assert (failed.version, "not_worse: b: the median score" in failed.reason) == (2, True)
        assert metric(running, "feddymem_release_withheld") == 1
        assert metric(running, "feddymem_release_checks_failed_total") == 1
        shown = " ".join(feddymem("status", "--server", running.grpc).stdout.split())
        assert "release 2 has failed a check: not_worse" in shown
        code, said = operate(running, "show", "2", of="release")
        assert (code, "not_worse" in said, "failed" in said) == (0, True, True)
        assert re.search(r" 2 +. newest, +.*failed ", operate(running, "list", of="release")[1], re.DOTALL)
        assert operate(running, "show", "7", of="release")[0] == 3
        said = operate(running, "show", "2", "--json", of="release")[1]
        details = json.loads(said)
        assert [check["name"] for check in details["checks"] if not check["passed"]] == ["not_worse"]
        assert [site["site"] for site in details["sites"]] == ["a", "b"]
        assert activate(running, "newest")[1] == "release 1 of parts is active; before: 1\n"
        code, said = activate(running, "2")
        assert (code, said.startswith("release 2 of parts is active and stays so; before: 1\n")) == (0, True)
        assert f"feddymem: it has failed a check: {failed.reason}\n" in said
        assert metric(running, "feddymem_release_withheld") == 0
    fleet.kill("aggregator", signal.SIGKILL)
    running = start_aggregator(**settings, false_alarm_rate=0.2)
    assert (status(running).release, len(status(running).failed_releases)) == (2, 1)
    assert status(running).false_alarm_rate == 0.05  # release 2 is calibrated for it
    assert operate(running, "rollback", of="release")[1] == "release 1 of parts is active and stays so; before: 2\n"


def following(watch: Iterator[WatchReleasesResponse], wanted: Callable[[Release], bool]) -> Release:
    """The next release of a watch that is wanted."""
    return next(response.release for response in watch if wanted(response.release))


def test_a_release_in_the_shadow_is_published_beside_the_active_one(
    start_aggregator: StartAggregator, fleet: Fleet
) -> None:
    settings = {"quorum": 2, "method": CALIBRATED, "keep_releases": 2}
    running = start_aggregator(**settings)
    with joined(running, "a", "b") as sites:
        play(sites, 1)
        play(sites, 2, worse=1.2)
        watch = sites[0].releases.WatchReleases(WatchReleasesRequest(), timeout=_WATCH_SECONDS)
        first = next(watch).release
        assert (first.version, first.shadow) == (1, False)
        code, said = operate(running, "shadow", "1", of="release")
        assert (code, "is the active one" in said) == (3, True)
        assert operate(running, "shadow", "x", of="release")[0] == 2
        assert operate(running, "shadow", "2", of="release") == (
            0,
            "release 2 of parts scores in the shadow; before: none\n",
        )
        shadow = next(watch).release
        assert (shadow.version, shadow.shadow, len(shadow.arrays)) == (2, True, 3)
        assert status(running).shadow_release == 2
        watch.cancel()
    fleet.kill("aggregator", signal.SIGKILL)
    running = start_aggregator(**settings)
    with joined(running, "a", "b") as sites:
        watch = sites[0].releases.WatchReleases(WatchReleasesRequest(), timeout=_WATCH_SECONDS)
        assert [(r.release.version, r.release.shadow) for r in (next(watch), next(watch))] == [(1, False), (2, True)]
        assert activate(running, "2")[0] == 0  # and so it is in the shadow of nothing
        ended = following(watch, lambda release: release.shadow)
        assert (ended.version, len(ended.arrays), status(running).shadow_release) == (0, 0, 0)
        assert operate(running, "shadow", "1", of="release")[0] == 0
        play(sites, 3)
        assert list(status(running).releases) == [2, 3]
        assert status(running).shadow_release == 0  # it has been pruned
        watch.cancel()


def test_a_backup_has_the_candidate_and_what_was_said_of_it(
    start_aggregator: StartAggregator, fleet: Fleet, tmp_path: Path
) -> None:
    settings = {"quorum": 2, "method": CALIBRATED}
    running = start_aggregator(**settings)
    state = running.log.parent / "state"
    with joined(running, "a", "b") as (a, b):
        a.upload(make_bank(1))
        b.upload(make_bank(2))
        a.calibrate(SCORES)
        instance = b.instance
        run = feddymem("backup", str(state), str(tmp_path / "copy"))
        assert (run.returncode, run.stderr) == (0, "")
    fleet.kill("aggregator", signal.SIGKILL)
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "copy", state)
    running = start_aggregator(**settings)
    assert len(arrays(running, "releases")) == 3
    with grpc.insecure_channel(running.grpc) as channel:
        b = FakeSite(channel, "b")
        b.instance = instance
        b.calibrate(SCORES)
        b.wait_for(PHASE_OPEN, 2)
        assert len(b.current_release().calibration.sites) == 2


def details(trial: Trial, version: int) -> GetReleaseResponse:
    """As the aggregator tells an operator."""
    with grpc.insecure_channel(trial.fleet.address("aggregator")) as channel:
        request = GetReleaseRequest(federation="parts", version=version)
        return OperatorServiceStub(channel).GetRelease(request, timeout=TIMEOUT_SECONDS)


@pytest.fixture
def images_of_one(images: dict[str, Path]) -> dict[str, Path]:
    """The second site has one image."""
    for path in sorted(images[SITES[1]].iterdir())[1:]:
        path.unlink()
    return images


def test_a_site_with_one_image_holds_none_out_and_keeps_nobody_waiting(
    tmp_path: Path, images_of_one: dict[str, Path]
) -> None:
    trial = Trial(tmp_path / "trial", images_of_one)
    try:
        trial.run({})
        for version in (1, 2):
            release = details(trial, version) if version in trial.status().releases else None
            if release is not None:
                held_out = {site.site: sum(site.calibration.scores.counts) for site in release.sites}
                assert held_out == {SITES[0]: 2, SITES[1]: 0}
                assert [check.passed for check in release.checks] == [True] * 4
        assert [site.held_out_images for site in trial.status().sites] == [2, 0]
        assert [site.images for site in trial.status().sites] == [5, 1]
        for site in SITES:
            assert len(trial.events(site, "calibration_accepted")) == 2
    finally:
        trial.close()


def test_a_candidate_stays_at_its_sites_as_what_the_next_round_starts_from(
    trial: Trial,
) -> None:
    trial.run({})
    sent = trial.events("aggregator", "released")
    assert len(sent) == 2
    kept = {path.name for path in (trial.fleet.state(SITES[0]) / "arrays").iterdir() if path.is_file()}
    with grpc.insecure_channel(trial.fleet.address("aggregator")) as channel:
        last = FakeSite(channel, SITES[0]).current_release()
    assert {array.sha256.hex() for array in last.arrays} <= kept


def test_a_memory_that_an_operator_has_made_too_small_does_not_go_live(tmp_path: Path) -> None:
    """Real images, scored by real edge clients with a memory of 60 items, and then with one of 3."""
    images = write_images(tmp_path / "images", 24)
    trial = Trial(tmp_path / "trial", images)
    config = tmp_path / "trial" / "aggregator.yaml"

    def allow(rounds: int, memory_items: int) -> None:
        method = {**SETTINGS["method"], "rounds": rounds, "memory_items": memory_items}  # type: ignore[dict-item]
        config.write_text(
            yaml.safe_dump({"federations": {"parts": {**SETTINGS, "keep_releases": 5, "method": method}}})
        )

    try:
        allow(1, 60)
        for name in ("aggregator", *SITES):
            trial.start(name)
        trial.wait_release(1)
        trial.fleet.kill("aggregator")
        allow(2, 3)
        trial.start("aggregator")
        trial.wait_release(2)
        now = trial.status()
        assert now.release == 1
        assert [failed.version for failed in now.failed_releases] == [2]
        assert "not_worse" in now.failed_releases[0].reason
    finally:
        trial.close()
