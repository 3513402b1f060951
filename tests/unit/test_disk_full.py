"""A full disk: what does not fit is refused, what is there stays whole, and there is no more to do than to make room.

Writing to /dev/full fails as on a full disk; a part of an array is a link to it.
"""

from __future__ import annotations

import errno
import resource
import sqlite3
from pathlib import Path

import grpc
import numpy as np
import pytest

from feddymem.v1.federation_pb2 import BankHeader
from services.aggregator.state import AcceptedBank, Site, State
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import WireArray, chunks, encode
from services.runtime.errors import as_refusal, is_disk_full

ARRAY = encode("items", np.ones((300, 1000), np.float32))


def no_room_for(array: WireArray, folder: Path) -> Path:
    """What stands for a full disk; it has room again when this is removed."""
    link = folder / f"{array.manifest.sha256.hex()}.part"
    link.symlink_to("/dev/full")
    return link


def send(store: ArrayStore) -> None:
    for chunk in chunks(ARRAY.manifest.sha256, ARRAY.data, store.held_bytes(ARRAY.manifest)):
        store.append(ARRAY.manifest, chunk)


def test_an_upload_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    store = ArrayStore(tmp_path)
    full = no_room_for(ARRAY, tmp_path)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left on device") as caught:
            send(store)
        assert is_disk_full(caught.value)
        assert ARRAY.manifest.sha256 not in store
    full.unlink()
    send(store)
    assert store.read(ARRAY.manifest.sha256) == ARRAY.data


def test_what_did_not_fit_as_a_whole_leaves_nothing_behind(tmp_path: Path) -> None:
    store = ArrayStore(tmp_path)
    no_room_for(ARRAY, tmp_path)
    with pytest.raises(OSError, match="No space left on device"):
        store.put(ARRAY.manifest.sha256, ARRAY.data)
    assert list(tmp_path.iterdir()) == []
    store.put(ARRAY.manifest.sha256, ARRAY.data)
    assert store.read(ARRAY.manifest.sha256) == ARRAY.data


def test_state_that_does_not_fit_is_not_half_there(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.put_site("parts", Site("berlin", "first", 7))
    [pages] = state._db.execute("PRAGMA page_count").fetchone()
    state._db.execute(f"PRAGMA max_page_count = {pages}")
    large = BankHeader(federation="parts", site="berlin", round=1, instance="x" * 100_000)
    with pytest.raises(sqlite3.OperationalError, match="full") as caught:
        state.put_bank(AcceptedBank(large, 1))
    assert is_disk_full(caught.value)
    assert (state.banks("parts", 1), state.sites("parts")) == ({}, {"berlin": Site("berlin", "first", 7)})
    state._db.execute("PRAGMA max_page_count = 1000000")
    state.put_bank(AcceptedBank(large, 1))
    state.close()
    assert State(tmp_path).banks("parts", 1) == {"berlin": AcceptedBank(large, 1)}


def test_state_over_a_limit_that_is_no_full_disk_is_the_same(tmp_path: Path) -> None:
    """As a quota: SQLite tells it as a write that failed."""
    state = State(tmp_path)
    state.put_site("parts", Site("berlin", "first", 7))
    large = AcceptedBank(BankHeader(federation="parts", site="berlin", round=1, instance="x" * 100_000), 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    longest = max(path.stat().st_size for path in tmp_path.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (longest, before[1]))
    try:
        with pytest.raises(sqlite3.OperationalError) as caught:
            state.put_bank(large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.sqlite_errorcode == sqlite3.SQLITE_IOERR_WRITE
    assert is_disk_full(caught.value)
    assert state.banks("parts", 1) == {}
    state.put_bank(large)
    state.close()
    assert State(tmp_path).banks("parts", 1) == {"berlin": large}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded")], ids=str
)
def test_callers_are_told_to_come_again(error: OSError) -> None:
    refusal = as_refusal(error)
    assert refusal is not None
    assert refusal.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "disk of this service is full" in refusal.text


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "Permission denied"), sqlite3.OperationalError("no such table"), ValueError()]
)
def test_other_faults_are_no_full_disk(error: Exception) -> None:
    assert not is_disk_full(error)
    assert as_refusal(error) is None
