"""A copy of an aggregator's state as of one moment, made while it runs."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from services.aggregator.database import DATABASE
from services.aggregator.state import BANKS, RELEASES, State
from services.runtime.array_store import ArrayStore
from services.runtime.files import make_folder, sync_folder

_ATTEMPTS = 10
"""Rounds that may end while one backup is made; each removes arrays that the database named before."""


class BackupError(RuntimeError):
    """There is no backup; the text says why."""


def backup(state_dir: Path, target: Path) -> None:
    """Copies an aggregator's state folder; the aggregator may run meanwhile.

    The database is copied first, then the arrays that it names, which are written before the database names them.

    Args:
        state_dir: the aggregator's.
        target: the copy, whole or not there at all; a `state_dir` to start an aggregator with.

    Raises:
        BackupError: no aggregator's state, something is at the target already, or the database or an array is
            missing or damaged.
        OSError: the target cannot be written.
    """
    if not (state_dir / DATABASE).exists():
        raise BackupError(f"{state_dir} is not the state folder of an aggregator: it has no {DATABASE}")
    if target.exists():
        raise BackupError(f"{target} is there already; name a new folder")
    make_folder(target.parent)
    for _ in range(_ATTEMPTS):
        with TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as part:
            copy = Path(part) / "state"
            copy.mkdir()
            try:
                missing = _copy(state_dir, copy)
            except sqlite3.Error as error:
                raise BackupError(
                    f"{state_dir / DATABASE} cannot be copied to {target}: {error}; if it is damaged, keep the backups "
                    'that you have: docs/runbooks.md, "Lose the aggregator\'s disk", needs one'
                ) from error
            if missing is None:
                copy.rename(target)
                sync_folder(target.parent)
                return
    raise BackupError(f"{missing} is missing or damaged; the state is not whole")


def _copy(source: Path, target: Path) -> Path | None:
    """Copies database and arrays; the first array that is not there, or not what its name says."""
    with (
        closing(sqlite3.connect(f"{(source / DATABASE).absolute().as_uri()}?mode=ro", uri=True)) as origin,
        closing(sqlite3.connect(target / DATABASE)) as copy,
    ):
        origin.backup(copy)
    for folder, sha256 in _arrays(target):
        path = source / folder / sha256.hex()
        data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).digest() != sha256:
            return path
        ArrayStore(target / folder).put(sha256, data)
    _sync(target / DATABASE)
    sync_folder(target)  # its name; arrays take care of theirs
    return None


def _arrays(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Folders and hashes of all arrays that a database names."""
    with closing(State(folder)) as state:
        for name in state.federations:
            releases = state.releases(name)
            for release in (*releases, *state.candidates(name)):
                yield from ((Path(RELEASES), array.sha256) for array in release.arrays)
            newest = max((release.version for release in releases), default=0)
            for site, bank in state.banks(name, newest + 1).items():
                yield from ((Path(BANKS) / name / site, array.sha256) for array in bank.header.arrays)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
