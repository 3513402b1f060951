"""Writes of the aggregator's state that are several statements: wherever one fails, nothing of them is there."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from feddymem.v1.array_pb2 import Array
from feddymem.v1.federation_pb2 import BankHeader, CalibrateRequest
from feddymem.v1.operator_pb2 import ReleaseCheck
from feddymem.v1.release_pb2 import Release
from services.aggregator.database import DATABASE, Database
from services.aggregator.state import AcceptedBank, Candidate, Site, State

ROUND = 4
OLD, NEW = b"o" * 32, b"n" * 32


class KilledError(BaseException):
    """Nothing that a caller would catch."""


class Faults:
    """Fails the writes of the database from one of them on, each row of several being one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.written, self.failing, self.error = 0, -1, BaseException()
        execute, executemany = Database.execute, Database.executemany

        def execute_one(database: Database, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
            if statement.startswith(("INSERT", "UPDATE", "DELETE")):
                self._count()
            return execute(database, statement, values)

        def execute_many(database: Database, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
            executemany(database, statement, self._counted(rows))

        patch.setattr(Database, "execute", execute_one)
        patch.setattr(Database, "executemany", execute_many)

    def _counted(self, rows: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        for row in rows:
            self._count()
            yield row

    def _count(self) -> None:
        if self.written == self.failing:
            raise self.error
        self.written += 1


def filled(folder: Path) -> State:
    """A state in which each of the writes below has something to change in each of its tables."""
    state = State(folder)
    for site in ("a", "b", "gone"):
        state.put_site("parts", Site(site, "first", 7))
    state.remove_site("parts", "gone", ROUND)
    for number in (ROUND - 1, ROUND):
        state.open_round("parts", number, number - 1)
        for site in ("a", "b"):
            state.put_bank(AcceptedBank(BankHeader(federation="parts", round=number, site=site, images=7), 10))
    state.put_release(Release(federation="parts", version=ROUND - 1), ["a"], [ReleaseCheck(name="alarms")])
    for number in (ROUND - 1, ROUND):
        for site in ("a", "b"):
            said = CalibrateRequest(federation="parts", round=number, site=site, items_sha256=OLD)
            state.put_calibration(said)
    state.put_candidate(candidate(OLD))
    state.set_quarantine("parts", ROUND, {"a": "items are odd"})
    return state


def candidate(items: bytes) -> Candidate:
    release = Release(federation="parts", version=ROUND, arrays=[Array(name="items", sha256=items)])
    return Candidate(release, b"inputs", 1.0)


def release_made(state: State) -> None:
    checks = [ReleaseCheck(name="alarms"), ReleaseCheck(name="detections")]
    state.put_release(candidate(OLD).release, ["a", "b"], checks)


WRITES: dict[str, tuple[int, Callable[[State], None]]] = {
    "put_site": (2, lambda state: state.put_site("parts", Site("gone", "second", 9))),
    "remove_site": (3, lambda state: state.remove_site("parts", "a", ROUND)),
    "set_quarantine": (3, lambda state: state.set_quarantine("parts", ROUND, {"b": "noise", "c": "noise"})),
    "put_candidate": (3, lambda state: state.put_candidate(candidate(NEW))),
    "put_release": (7, release_made),
    "prune_release": (3, lambda state: state.prune_release("parts", ROUND - 1)),
}
"""Of each write, its statements, and rows of statements."""


def on_disk(folder: Path) -> list[str]:
    """All that another process would find."""
    with closing(sqlite3.connect(folder / DATABASE)) as connection:
        return list(connection.iterdump())


@pytest.mark.parametrize("error", [sqlite3.OperationalError("disk I/O error"), KilledError()])
@pytest.mark.parametrize("write", WRITES)
def test_whatever_statement_fails_nothing_is_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str, error: BaseException
) -> None:
    statements, call = WRITES[write]
    with closing(filled(tmp_path)) as state:
        faults = Faults(monkeypatch)
        faults.error = error
        before = on_disk(tmp_path)
        for failing in range(statements):
            faults.written, faults.failing = 0, failing
            with pytest.raises(type(error)):
                call(state)
            assert on_disk(tmp_path) == before, f"after {failing} of {statements} statements"
        faults.written, faults.failing = 0, -1
        call(state)
        assert faults.written == statements
        assert on_disk(tmp_path) != before


def test_a_release_closes_its_round_and_an_origin_is_for_good(tmp_path: Path) -> None:
    with closing(filled(tmp_path)) as state:
        assert state.origins("parts") == ["a"]
        release_made(state)
        assert state.origins("parts") == ["a", "b"]
        assert [release.version for release in state.releases("parts")] == [ROUND - 1, ROUND]
        assert [check.name for check in state.checks("parts")[ROUND]] == ["alarms", "detections"]
        assert state.candidates("parts") == []
        assert [bank.header.images for bank in state.banks("parts", ROUND - 1).values()] == [0, 0]
        assert [bank.header.images for bank in state.banks("parts", ROUND).values()] == [7, 7]
        state.put_release(Release(federation="parts", version=ROUND + 1), ["b", "a", "c"])
        assert state.origins("parts") == ["a", "b", "c"]


def test_of_a_pruned_release_nothing_is_left_and_of_others_all(tmp_path: Path) -> None:
    with closing(filled(tmp_path)) as state:
        release_made(state)
        state.prune_release("parts", ROUND - 1)
        assert [release.version for release in state.releases("parts")] == [ROUND]
        assert list(state.checks("parts")) == [ROUND]
        assert state.calibrated("parts", ROUND - 1) == set()
        assert state.calibrated("parts", ROUND) == {"a", "b"}


@pytest.mark.parametrize(("items", "kept"), [(OLD, {"a", "b"}), (NEW, set())])
def test_what_was_said_of_another_candidate_is_forgotten(tmp_path: Path, items: bytes, kept: set[str]) -> None:
    with closing(filled(tmp_path)) as state:
        state.put_candidate(candidate(items))
        assert state.calibrated("parts", ROUND) == kept
        assert state.calibrated("parts", ROUND - 1) == {"a", "b"}
