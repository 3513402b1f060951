"""What an operator decides, by the command over a socket: releases, sites, backups. And what goes by itself."""

from __future__ import annotations

import datetime
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import pytest

from feddymem.memory import MemoryBank
from feddymem.v1.feature_space_pb2 import FeatureSpace
from feddymem.v1.federation_pb2 import PHASE_DONE, PHASE_OPEN, FederationStatus, GlobalMemory
from feddymem.v1.operator_pb2 import STANDING_ADMITTED, STANDING_BANNED, STANDING_JUDGED
from feddymem.v1.release_pb2 import Release, WatchReleasesRequest
from services.aggregator.database import DATABASE
from services.aggregator.state import State
from services.cli.status import get_status
from services.demo.processes import Fleet, RunningService
from services.runtime.arrays import bank_from_wire, bank_to_wire
from tests.integration.conftest import StartAggregator
from tests.integration.fake_site import TIMEOUT_SECONDS, FakeSite, make_bank
from tests.integration.refusals import refused

METHOD = {"bank_items": 30, "memory_items": 100, "rounds": 9, "item_type": "float16", "hold_out_share": 0}


def feddymem(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def operate(running: RunningService, action: str, *names: str, of: str = "operator") -> tuple[int, str]:
    """Exit code and what was said."""
    run = feddymem(of, action, "parts", *names, "--server", running.grpc)
    assert "Traceback" not in run.stderr
    return run.returncode, run.stdout + run.stderr


def activate(running: RunningService, version: str, *flags: str) -> tuple[int, str]:
    return operate(running, "activate", version, *flags, of="release")


def status(running: RunningService) -> FederationStatus:
    [federation] = get_status(running.grpc).federations
    return federation


@contextmanager
def joined(running: RunningService, *names: str) -> Iterator[list[FakeSite]]:
    """Sites that have joined, in an open round."""
    with grpc.insecure_channel(running.grpc) as channel:
        sites = [FakeSite(channel, name) for name in names]
        for site in sites:
            site.join()
        yield sites


def play(sites: list[FakeSite], round_number: int) -> GlobalMemory:
    """All sites upload their banks of a round; the global memory that the next one starts from."""
    sites[0].wait_for(PHASE_OPEN, round_number)
    for number, site in enumerate(sites):
        assert site.upload(make_bank(10 * round_number + number), round_number)[-1].HasField("accepted")
    return sites[0].wait_for(PHASE_OPEN, round_number + 1).memory


def memory_of(site: FakeSite, memory: GlobalMemory) -> MemoryBank:
    return bank_from_wire((array, site.download(array.sha256)) for array in memory.arrays)


def test_a_release_is_rolled_back_and_the_next_round_starts_from_it(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=2, method=METHOD)
    with joined(running, "a", "b") as sites:
        play(sites, 1)
        play(sites, 2)
        watched = sites[0].releases.WatchReleases(WatchReleasesRequest(), timeout=TIMEOUT_SECONDS)
        assert next(watched).release.version == 2
        assert activate(running, "1") == (0, "release 1 of parts is active and stays so; before: 2\n")
        assert next(watched).release.version == 1
        assert sites[0].wait_for(PHASE_OPEN, 3).memory.version == 2  # the sites have begun with it
        play(sites, 3)
        now = status(running)
        assert (now.release, now.release_held, list(now.releases)) == (1, True, [1, 2, 3])
        assert sites[0].wait_for(PHASE_OPEN, 4).memory.version == 1
        memory = memory_of(sites[0], play(sites, 4))
        assert len(memory) == 40  # held: the active release, of 2 banks of 20 items
        assert activate(running, "newest") == (0, "release 4 of parts is active; before: 1\n")
        assert next(watched).release.version == 4
        assert len(memory_of(sites[0], play(sites, 5))) == 80  # its round had begun
        assert len(memory_of(sites[0], play(sites, 6))) == 100
        watched.cancel()


def test_releases_are_listed_with_what_an_operator_chooses_by(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=1, keep_releases=2, method=METHOD)
    assert operate(running, "list", of="release")[1].splitlines()[0].strip() == "parts: release none is active"
    with joined(running, "a", "b") as (a, b):
        play([a, b], 1)
        play([a, b], 2)
        assert operate(running, "rollback", of="release") == (
            0,
            "release 1 of parts is active and stays so; before: 2\n",
        )
        b.upload(make_bank(30), 3)
        assert operate(running, "ban", "b")[0] == 0
        play([a], 3)
        play([a], 4)
    before = datetime.datetime.now(datetime.UTC)
    code, said = operate(running, "list", "--json", of="release")
    listed = json.loads(said)
    assert (code, listed["active"], listed["held"]) == (0, 1, True)
    rows = [(each["version"], each["base"], each["sites"], each["images"]) for each in listed["releases"]]
    assert rows == [(1, 0, ["a", "b"], "20"), (3, 2, ["a"], "10"), (4, 1, ["a"], "10")]
    made = [datetime.datetime.fromisoformat(each["created"]) for each in listed["releases"]]
    assert made == sorted(made)
    assert before - made[-1] < datetime.timedelta(minutes=1)
    assert listed["releases"][0]["items"] == "40"
    table = operate(running, "list", of="release")[1]
    assert "parts: release 1 is active, and stays so" in table
    assert re.search(r" 1 +. active .* 4 +. newest ", table, re.DOTALL)


def test_a_rollback_that_somebody_was_faster_than_changes_nothing(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=1, method=METHOD)
    code, said = operate(running, "rollback", of="release")
    assert (code, "kept: none" in said) == (3, True)
    with joined(running, "a") as sites:
        for number in (1, 2, 3):
            play(sites, number)
        bad = ["--if-active", "3"]
        play(sites, 4)  # ends while an operator looks at release 3
        code, said = operate(running, "rollback", *bad, of="release")
        assert (code, "release 4 of federation 'parts' is active by now, not 3" in said) == (3, True)
        assert activate(running, "2", *bad)[0] == 3
        assert (status(running).release, status(running).release_held) == (4, False)
        bad = ["--if-active", "4"]
        assert (
            operate(running, "rollback", *bad, of="release")[1]
            == "release 3 of parts is active and stays so; before: 4\n"
        )
        assert operate(running, "rollback", *bad, of="release")[0] == 3  # the other operator says the same
        assert status(running).release == 3
        assert operate(running, "rollback", of="release")[0] == 0
        assert operate(running, "rollback", of="release")[0] == 0
        code, said = operate(running, "rollback", of="release")
        assert (code, said) == (
            3,
            "feddymem: no release of parts before 1 is kept and has passed its checks (kept: 1, 2, 3, 4); "
            "`release activate` takes one that has not; nothing was changed\n",
        )
        assert activate(running, "newest", "--if-active", "1") == (0, "release 4 of parts is active; before: 1\n")


def test_what_does_not_exist_is_named(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=1, method=METHOD)
    code, said = activate(running, "7")
    assert (code, "no release 7; it has none" in said) == (3, True)
    code, said = activate(running, "-")
    assert (code, "'-'" in said) == (2, True)
    code, said = operate(running, "remove", "nobody")
    assert (code, "'nobody'" in said) == (3, True)
    run = feddymem("operator", "ban", "boats", "a", "--server", running.grpc)
    assert (run.returncode, "'boats'" in run.stderr) == (3, True)


def test_a_rollback_and_what_was_said_of_sites_outlive_a_kill(fleet: Fleet, start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=2, method=METHOD)
    with joined(running, "a", "b") as sites:
        play(sites, 1)
        play(sites, 2)
    assert activate(running, "1")[0] == 0
    assert operate(running, "ban", "c")[0] == 0
    assert operate(running, "admit", "b")[0] == 0
    fleet.kill("aggregator")
    running = start_aggregator(quorum=2, method=METHOD)
    now = status(running)
    assert (now.release, now.release_held, list(now.releases)) == (1, True, [1, 2])
    assert [site.standing for site in now.sites] == [STANDING_JUDGED, STANDING_ADMITTED]
    with joined(running, "a") as [site]:
        assert site.current_release().version == 1
        assert refused(FakeSite(site.channel, "c").join)[0] is grpc.StatusCode.PERMISSION_DENIED


def test_a_banned_site_is_out_and_so_is_what_the_memory_has_of_it(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=1, sites=["a", "b"], method=METHOD)
    with joined(running, "a", "b") as (a, b):
        play([a, b], 1)
        stream = b.watch()
        next(stream)
        assert operate(running, "ban", "b") == (0, "b is banned from parts\n")
        code, said = refused(lambda: list(stream))
        assert (code, "'b' is banned" in said) == (grpc.StatusCode.PERMISSION_DENIED, True)
        assert refused(b.join)[0] is grpc.StatusCode.PERMISSION_DENIED
        assert refused(lambda: b.upload(make_bank(8), 2))[0] is grpc.StatusCode.PERMISSION_DENIED
        assert [site.standing for site in status(running).sites] == [STANDING_JUDGED, STANDING_BANNED]
        memory = memory_of(a, play([a], 2))
        assert (len(memory), memory.weights[:, 1].max()) == (40, 0)
        assert operate(running, "judge", "b")[0] == 0
        b.join()
        assert memory_of(a, play([a, b], 3)).weights[:, 1].max() > 0


def test_a_round_does_not_wait_for_a_site_that_was_removed(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=1, method=METHOD)
    with joined(running, "a", "b") as (a, b):
        a.wait_for(PHASE_OPEN, 1)
        a.upload(make_bank(1))
        assert status(running).waits_for == "banks of 1 more sites"
        assert operate(running, "remove", "b") == (0, "b is removed from parts\n")
        a.wait_for(PHASE_OPEN, 2)
        assert [site.site for site in status(running).sites] == ["a"]
        assert refused(lambda: b.upload(make_bank(2), 2))[0] is grpc.StatusCode.FAILED_PRECONDITION
        b.join()
        play([a, b], 2)


def test_a_site_of_the_list_that_was_removed_is_not_waited_for_either(
    fleet: Fleet, start_aggregator: StartAggregator
) -> None:
    settings = {"quorum": 1, "sites": ["a", "b"], "method": METHOD}
    running = start_aggregator(**settings)
    with joined(running, "a", "b") as (a, b):
        play([a, b], 1)
        assert operate(running, "remove", "b")[0] == 0
        play([a], 2)
    fleet.kill("aggregator")
    running = start_aggregator(**settings)
    with joined(running, "a") as [a]:
        play([a], 3)
    with joined(running, "a", "b") as (a, b):
        a.upload(make_bank(40), 4)
        assert status(running).waits_for == "banks of 1 more sites"
        b.upload(make_bank(41), 4)
        a.wait_for(PHASE_OPEN, 5)


def test_a_bank_of_a_site_that_was_removed_does_not_count(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=2, method=METHOD)
    with joined(running, "a", "b", "c") as (a, b, c):
        a.wait_for(PHASE_OPEN, 1)
        b.upload(make_bank(2))
        assert operate(running, "remove", "b")[0] == 0
        a.upload(make_bank(1))
        c.upload(make_bank(3))
        assert current_release_when(a, 1).provenance.sites == 2
        assert memory_of(a, a.wait_for(PHASE_OPEN, 2).memory).origins == 2


def current_release_when(site: FakeSite, version: int) -> Release:
    site.wait_for(PHASE_OPEN, version + 1)
    return site.current_release()


def test_a_round_waits_for_who_has_gone_only_so_long(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=1, grace_seconds=1, method=METHOD)
    with joined(running, "a", "b") as (a, b):
        stream = b.watch()
        next(stream)
        a.wait_for(PHASE_OPEN, 1)
        a.upload(make_bank(1))
        assert status(running).phase == PHASE_OPEN
        stream.cancel()
        a.wait_for(PHASE_OPEN, 2)
        code, said = refused(lambda: b.upload(make_bank(2), 1))
        assert (code, "next round" in said) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        assert b.upload(make_bank(2), 2)[-1].HasField("accepted")


def test_one_site_alone_is_a_clear_state(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=3, method=METHOD)
    with joined(running, "a") as [site]:
        assert next(site.watch()).waits_for == "2 more to join, for the quorum of 3"
    assert status(running).waits_for == "2 more to join, for the quorum of 3"
    shown = feddymem("status", "--server", running.grpc).stdout
    assert "waits for 2 more to join" in " ".join(shown.split())


def arrays(running: RunningService, folder: str) -> set[str]:
    return {path.name for path in (running.log.parent / "state" / folder).rglob("*") if path.is_file()}


def test_old_releases_go_and_what_is_active_stays(fleet: Fleet, start_aggregator: StartAggregator) -> None:
    settings = {"quorum": 2, "keep_releases": 2, "method": METHOD | {"rounds": 5}}
    running = start_aggregator(**settings)
    with joined(running, "a", "b") as sites:
        play(sites, 1)
        play(sites, 2)
        assert activate(running, "1")[0] == 0
        play(sites, 3)
        play(sites, 4)
        assert list(status(running).releases) == [1, 3, 4]
        for number, site in enumerate(sites):
            site.upload(make_bank(50 + number), 5)
        sites[0].wait_for(PHASE_DONE, 5)
        assert list(status(running).releases) == [1, 4, 5]
        assert len(arrays(running, "releases")) == 9
        assert arrays(running, "banks") == set()
        assert len(sites[0].current_release().arrays) == 3
    fleet.kill("aggregator")
    leftover = running.log.parent / "state" / "releases" / ("0" * 64)
    leftover.write_bytes(b"of a release that was never made")
    running = start_aggregator(**settings)
    assert (len(arrays(running, "releases")), leftover.exists()) == (9, False)
    assert [len(site.bytes_per_round) for site in status(running).sites] == [5, 5]


def test_another_site_s_bank_cannot_be_referred_to_nor_read(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=3, method=METHOD)
    bank = make_bank(1)
    sent = bank_to_wire(bank, "float16")
    with joined(running, "a", "b", "c") as (a, thief, _c):
        a.wait_for(PHASE_OPEN, 1)
        a.upload(bank)
        for array in sent:
            assert refused(lambda array=array: thief.download(array.manifest.sha256))[0] is grpc.StatusCode.NOT_FOUND  # type: ignore[misc]
        code, said = refused(lambda: thief.send(thief.header(sent), []))
        assert (code, "items" in said) == (grpc.StatusCode.UNAVAILABLE, True)
        assert [site.last_round for site in status(running).sites] == [1, 0, 0]
        assert len(arrays(running, "banks")) == 3


def test_what_is_left_of_a_broken_upload_goes_with_the_next(start_aggregator: StartAggregator) -> None:
    running = start_aggregator(quorum=2, method=METHOD)
    with joined(running, "a", "b") as (a, _b):
        a.wait_for(PHASE_OPEN, 1)
        for seed in range(5):
            one = bank_to_wire(make_bank(seed), "float16")
            assert refused(lambda one=one: a.send(a.header(one), one[:1]))[0] is grpc.StatusCode.UNAVAILABLE  # type: ignore[misc]
        assert len(arrays(running, "banks")) == 1
        assert a.upload(make_bank(9))[-1].HasField("accepted")
        assert len(arrays(running, "banks")) == 3


def test_a_backup_made_while_a_round_is_open_goes_on_where_it_was(
    fleet: Fleet, start_aggregator: StartAggregator, tmp_path: Path
) -> None:
    running = start_aggregator(quorum=2, method=METHOD)
    target = tmp_path / "copy"
    with joined(running, "a", "b") as (a, b):
        play([a, b], 1)
        a.upload(make_bank(20), 2)
        run = feddymem("backup", str(running.log.parent / "state"), str(target))
        assert (run.returncode, run.stderr) == (0, "")
        b.upload(make_bank(21), 2)
        expected = a.wait_for(PHASE_OPEN, 3).memory
        instance = b.instance
    fleet.kill("aggregator")
    state = running.log.parent / "state"
    shutil.rmtree(state)
    shutil.copytree(target, state)
    running = start_aggregator(quorum=2, method=METHOD)
    assert [site.last_round for site in status(running).sites] == [2, 1]
    with grpc.insecure_channel(running.grpc) as channel:
        b = FakeSite(channel, "b")
        b.instance = instance
        b.upload(make_bank(21), 2)
        assert b.wait_for(PHASE_OPEN, 3).memory == expected


def test_a_backup_that_is_not_whole_is_none(start_aggregator: StartAggregator, tmp_path: Path) -> None:
    running = start_aggregator(quorum=1, method=METHOD)
    with joined(running, "a") as sites:
        play(sites, 1)
    state = running.log.parent / "state"
    damaged = next((state / "releases").iterdir())
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for source, said in ((state, damaged.name), (tmp_path / "nowhere", DATABASE)):
        run = feddymem("backup", str(source), str(tmp_path / "copy"))
        assert (run.returncode, said in run.stderr) == (1, True)
    assert not (tmp_path / "copy").exists()
    (tmp_path / "copy").mkdir()
    assert "is there already" in feddymem("backup", str(state), str(tmp_path / "copy")).stderr


def test_state_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    sqlite3.connect(tmp_path / "state" / DATABASE).execute("CREATE TABLE site (x)").connection.close()
    federations = '{"parts": {}}'
    run = feddymem("aggregator", "--state-dir", str(tmp_path / "state"), "--federations", federations)
    assert (run.returncode, "form 0" in run.stderr, "Traceback" in run.stderr) == (1, True, False)


@pytest.mark.parametrize("damage", ["no database", "a page"])
def test_a_damaged_database_is_named_with_what_to_do(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "state"
    with closing(State(folder)) as state:
        state.set_feature_space("parts", FeatureSpace(backbone="any"))
    content = (folder / DATABASE).read_bytes()
    kept = 4096 if damage == "a page" else 0  # the first one says that it is a database, and which tables it has
    (folder / DATABASE).write_bytes(content[:kept] + b"\xff" * (len(content) - kept))
    for command in (
        ("aggregator", "--state-dir", str(folder), "--federations", '{"parts": {}}'),
        ("backup", str(folder), str(tmp_path / "copy")),
    ):
        run = feddymem(*command)
        assert (run.returncode, "Traceback" in run.stderr) == (1, False), run.stderr
        assert f"{folder / DATABASE}" in run.stderr
        assert "docs/runbooks.md" in run.stderr
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("action", ["admit", "judge", "ban"])
def test_a_site_s_standing_can_be_said_before_it_joins(start_aggregator: StartAggregator, action: str) -> None:
    running = start_aggregator(quorum=1, method=METHOD)
    assert operate(running, action, "a")[0] == 0
    assert operate(running, action, "-a")[0] == 2
