"""What a power cut leaves: a file is on the disk before it has its name, and its name before anybody is told of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from feddymem.v1.array_pb2 import Array
from feddymem.v1.federation_pb2 import BankHeader
from services.aggregator.backup import backup
from services.aggregator.database import DATABASE
from services.aggregator.state import State
from services.cli.certs import _write_key
from services.edge_client.state import EdgeState, Outcome
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import chunks
from services.runtime.files import make_folder, read_record, write_atomically, write_record

DATA = bytes(range(200)) * 3
SHA256 = hashlib.sha256(DATA).digest()
NAME = SHA256.hex()
MANIFEST = Array(name="items", shape=[len(DATA)], sha256=SHA256, size_bytes=len(DATA))
Entry = tuple[str | int, ...]


class Journal:
    """What was asked of the disk below a folder, in order: ("synced", file, its bytes by then), ("synced", folder),
    ("renamed", from, to), ("made", folder), ("removed", file)."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self.entries: list[Entry] = []
        self._watch(patch, "fsync", self._synced)
        self._watch(patch, "replace", lambda old, new: ("renamed", self._name(old), self._name(new)))
        self._watch(patch, "rename", lambda old, new: ("renamed", self._name(old), self._name(new)))
        self._watch(patch, "mkdir", lambda path, *_mode: ("made", self._name(path)))
        self._watch(patch, "unlink", lambda path: ("removed", self._name(path)))

    def _watch(self, patch: pytest.MonkeyPatch, name: str, entry: Callable[..., Entry]) -> None:
        do = getattr(os, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            noted = entry(*arguments)
            done = do(*arguments, **options)
            self.entries.append(noted)  # only what has come to an end
            return done

        patch.setattr(os, name, watched)

    def _synced(self, descriptor: int) -> Entry:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        return ("synced", self._name(path)) if path.is_dir() else ("synced", self._name(path), path.stat().st_size)

    def _name(self, path: str | Path) -> str:
        return os.path.relpath(path, self._folder)


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journal:
    return Journal(tmp_path, monkeypatch)


def written(name: str, size: int, folder: str = ".") -> list[Entry]:
    """How a file comes to be: its content, its name, and its name for good."""
    path = os.path.normpath(f"{folder}/{name}")
    return [("synced", f"{path}.part", size), ("renamed", f"{path}.part", path), ("synced", folder)]


@pytest.mark.parametrize("before", [False, True])
def test_a_small_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, journal: Journal, before: bool) -> None:
    if before:
        (tmp_path / "file").write_bytes(b"old")
    write_atomically(tmp_path / "file", b"content")
    assert journal.entries == written("file", len(b"content"))
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_record_is_written_as_any_small_file(tmp_path: Path, journal: Journal) -> None:
    write_record(tmp_path / "record", b"content")
    assert journal.entries == written("record", hashlib.sha256().digest_size + len(b"content"))
    assert read_record(tmp_path / "record") == b"content"


def test_of_a_small_file_that_cannot_be_written_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_a_new_folder_is_on_the_disk_before_anything_is_in_it(tmp_path: Path, journal: Journal) -> None:
    for _ in range(2):  # the second time, there is nothing to do
        make_folder(tmp_path / "a" / "b" / "c")
        assert journal.entries == [
            *(("made", "a"), ("synced", ".")),
            *(("made", "a/b"), ("synced", "a")),
            *(("made", "a/b/c"), ("synced", "a/b")),
        ]


def store_in(folder: Path, journal: Journal) -> ArrayStore:
    store = ArrayStore(folder)
    assert ("synced", ".") in journal.entries  # the folder's own name
    journal.entries.clear()
    return store


def test_an_array_that_is_put_is_on_the_disk_before_it_has_its_name(tmp_path: Path, journal: Journal) -> None:
    store = store_in(tmp_path / "arrays", journal)
    for _ in range(2):  # one that is here already is not written again
        store.put(SHA256, DATA)
        assert journal.entries == written(NAME, len(DATA), "arrays")


@pytest.mark.parametrize("cut", [0, 1, len(DATA) - 1])
def test_an_array_that_has_arrived_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, journal: Journal, cut: int
) -> None:
    store = store_in(tmp_path / "arrays", journal)
    [whole] = chunks(SHA256, DATA)
    if cut:
        (tmp_path / "arrays" / f"{NAME}.part").write_bytes(DATA[:cut])
    store.append(MANIFEST, whole)
    assert journal.entries == written(NAME, len(DATA), "arrays")


def test_an_array_of_a_process_that_died_before_it_had_its_name_may_not_be_on_the_disk_yet(
    tmp_path: Path, journal: Journal
) -> None:
    store = store_in(tmp_path / "arrays", journal)
    (tmp_path / "arrays" / f"{NAME}.part").write_bytes(DATA)
    assert store.held_bytes(MANIFEST) == len(DATA)
    assert journal.entries == written(NAME, len(DATA), "arrays")


def test_an_edge_client_removes_what_its_last_outcome_used_only_when_the_next_is_on_the_disk(
    tmp_path: Path, journal: Journal
) -> None:
    state = EdgeState(tmp_path)
    state.claim("federation parts, site a")
    for number, data in enumerate((b"old", b"new"), 1):
        array = Array(name="items", sha256=hashlib.sha256(data).digest(), size_bytes=len(data))
        state.arrays.put(array.sha256, data)
        journal.entries.clear()
        state.put(Outcome(BankHeader(instance=state.instance, round=number, arrays=[array]), round=number))
    size = (tmp_path / "outcome").stat().st_size
    old = hashlib.sha256(b"old").hexdigest()
    assert journal.entries == [*written("outcome", size), ("removed", f"arrays/{old}")]


def test_what_the_aggregators_database_writes_is_on_the_disk_when_a_statement_returns(tmp_path: Path) -> None:
    with closing(State(tmp_path)) as state:
        [mode], [synchronous] = (
            state._db.execute(f"PRAGMA {name}").fetchone() for name in ("journal_mode", "synchronous")
        )
    assert (mode, synchronous) == ("wal", 2)  # FULL: with less, the log of a commit may still be on its way


def test_a_backup_is_on_the_disk_before_it_has_its_name(tmp_path: Path, journal: Journal) -> None:
    with closing(State(tmp_path / "state")):
        pass
    journal.entries.clear()
    backup(tmp_path / "state", tmp_path / "backups" / "monday")
    made, synced, *entries = journal.entries
    assert (made, synced) == (("made", "backups"), ("synced", "."))
    [renamed] = [entry for entry in entries if entry[0] == "renamed"]
    copy, target = renamed[1:]
    assert target == "backups/monday"
    size = (tmp_path / "backups" / "monday" / DATABASE).stat().st_size
    wanted = [("synced", f"{copy}/{DATABASE}", size), ("synced", copy), renamed, ("synced", "backups")]
    assert [entry for entry in entries if entry in wanted] == wanted


def test_a_private_key_is_on_the_disk_before_it_has_its_name_and_its_owners_alone(
    tmp_path: Path, journal: Journal
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "tls.key.part").write_bytes(b"left by a process that was killed")
    (tmp_path / "tls.key.part").chmod(0o644)
    _write_key(tmp_path / "tls.key", key)
    stat = (tmp_path / "tls.key").stat()
    assert stat.st_mode & 0o777 == 0o600
    assert journal.entries == [("removed", "tls.key.part"), *written("tls.key", stat.st_size)]
    read = load_pem_private_key((tmp_path / "tls.key").read_bytes(), None)
    assert isinstance(read, ec.EllipticCurvePrivateKey)
    assert read.private_numbers() == key.private_numbers()
