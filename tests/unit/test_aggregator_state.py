"""What the aggregator's database costs where a thousand sites have taken part in many rounds: statements look at what
they ask for, not at all that there is."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from feddymem.v1.federation_pb2 import BankHeader
from feddymem.v1.release_pb2 import Release
from services.aggregator.database import DATABASE
from services.aggregator.state import AcceptedBank, Site, State
from tests.unit.one_federation import opened

ROUNDS = 30


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    with closing(State(tmp_path)) as opened_state:
        yield opened_state


def put_banks(state: State, sites: int, rounds: int = ROUNDS) -> None:
    with state._db.transaction():
        rows = [
            (number, f"site-{site}", b"", 1000 * number) for number in range(1, rounds + 1) for site in range(sites)
        ]
        state._db.executemany(
            "INSERT OR IGNORE INTO bank (federation, round, site, header, received_bytes) VALUES ('parts', ?, ?, ?, ?)",
            rows,
        )
    for site in range(sites):
        state.put_site("parts", Site(f"site-{site}", "instance", 10))


def steps(connection: sqlite3.Connection, ask: Callable[[], object]) -> int:
    """What SQLite does for an answer, in hundreds of its instructions."""
    counted = 0

    def count() -> int:
        nonlocal counted
        counted += 1
        return 0

    connection.set_progress_handler(count, 100)
    ask()
    connection.set_progress_handler(None, 0)
    return counted


def test_what_a_status_costs_grows_with_what_it_shows(tmp_path: Path) -> None:
    costs = {}
    for sites in (20, 80):
        with opened(tmp_path / str(sites)) as federation:
            put_banks(federation._state, sites)
            connection = federation._state._db._connection
            costs[sites] = steps(connection, federation.status), steps(connection, lambda: federation.status("site-1"))
            shown = federation.status().sites
            assert [len(site.bytes_per_round) for site in shown] == [ROUNDS] * sites
            assert {(site.last_round, *site.bytes_per_round[-2:]) for site in shown} == {(30, 29_000, 30_000)}
    assert costs[80][0] < 5 * costs[20][0], "of all sites: four times as many"
    assert costs[80][1] < 4 * costs[20][1], "of one: its own banks; only their names are looked at of the others"


def test_a_release_leaves_the_banks_of_rounds_long_closed_alone(state: State) -> None:
    changes = []
    for number in range(1, 5):
        for site in range(3):
            header = BankHeader(federation="parts", round=number, site=f"site-{site}", images=10)
            state.put_bank(AcceptedBank(header, 1000))
        before = state._db._connection.total_changes
        state.put_release(Release(federation="parts", version=number), [])
        changes.append(state._db._connection.total_changes - before)
    assert changes == [1, 4, 4, 4]
    kept = [[bool(bank.header.images) for bank in state.banks("parts", number).values()] for number in range(1, 5)]
    assert kept == [[False] * 3, [False] * 3, [False] * 3, [True] * 3]


def test_a_database_of_before_gets_what_makes_it_fast(tmp_path: Path) -> None:
    with closing(State(tmp_path)) as state:
        put_banks(state, 2)
        state._db.execute("DROP INDEX bank_of_site")
    with closing(State(tmp_path)) as state:
        assert [bank.received_bytes for bank in state.last_banks("parts", "site-1")][-1] == 1000 * ROUNDS
    with closing(sqlite3.connect(tmp_path / DATABASE)) as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
    assert "bank_of_site" in names
