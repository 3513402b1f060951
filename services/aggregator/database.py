"""The aggregator's SQLite file: its tables, their form, and writes that happen wholly or not at all."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DATABASE = "aggregator.sqlite3"
_VERSION = 4
_SCHEMA = """
CREATE TABLE IF NOT EXISTS federation (name TEXT PRIMARY KEY, feature_space BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS site (
    federation TEXT, name TEXT, instance TEXT NOT NULL, images INTEGER NOT NULL, PRIMARY KEY (federation, name)
);
CREATE TABLE IF NOT EXISTS standing (
    federation TEXT, site TEXT, standing INTEGER NOT NULL, PRIMARY KEY (federation, site)
);
CREATE TABLE IF NOT EXISTS round (
    federation TEXT, number INTEGER, opened REAL NOT NULL, base INTEGER NOT NULL, PRIMARY KEY (federation, number)
);
CREATE TABLE IF NOT EXISTS bank (
    federation TEXT, round INTEGER, site TEXT, header BLOB NOT NULL, received_bytes INTEGER NOT NULL,
    quarantine TEXT NOT NULL DEFAULT '', PRIMARY KEY (federation, round, site)
);
CREATE INDEX IF NOT EXISTS bank_of_site ON bank (federation, site, round);
CREATE TABLE IF NOT EXISTS release (
    federation TEXT, version INTEGER, message BLOB NOT NULL, PRIMARY KEY (federation, version)
);
CREATE TABLE IF NOT EXISTS candidate (
    federation TEXT, round INTEGER, message BLOB NOT NULL, inputs BLOB NOT NULL, made REAL NOT NULL,
    PRIMARY KEY (federation, round)
);
CREATE TABLE IF NOT EXISTS calibration (
    federation TEXT, round INTEGER, site TEXT, message BLOB NOT NULL, PRIMARY KEY (federation, round, site)
);
CREATE TABLE IF NOT EXISTS release_check (
    federation TEXT, version INTEGER, number INTEGER, message BLOB NOT NULL, PRIMARY KEY (federation, version, number)
);
CREATE TABLE IF NOT EXISTS origin (federation TEXT, number INTEGER, site TEXT, PRIMARY KEY (federation, number));
CREATE TABLE IF NOT EXISTS removed (federation TEXT, site TEXT, PRIMARY KEY (federation, site));
CREATE TABLE IF NOT EXISTS held (federation TEXT PRIMARY KEY, version INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS shadow (federation TEXT PRIMARY KEY, version INTEGER NOT NULL);
"""


@contextmanager
def database_of(folder: Path) -> Iterator[None]:
    """Names the file in a folder where SQLite cannot read or write it in the block.

    Raises:
        OSError: it cannot; the text says which file, why, and what to do.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(
            f"{folder / DATABASE}: {error}; if it is damaged, put a backup in the place of {folder} (docs/runbooks.md, "
            '"Lose the aggregator\'s disk")'
        ) from error


class Database:
    """The file in a folder, which is made where it is missing. What a statement writes is on disk when it returns.

    Raises:
        ValueError: the folder is that of another version of this program.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(folder / DATABASE, isolation_level=None, check_same_thread=False)
        self._check_version(folder)
        self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=FULL")
        self._connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={_VERSION}; COMMIT;")

    def _check_version(self, folder: Path) -> None:
        [version] = self.execute("PRAGMA user_version").fetchone()
        [tables] = self.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if tables and version != _VERSION:
            raise ValueError(
                f"state_dir: {folder} holds state of form {version}, this version needs form {_VERSION}; give an empty "
                "folder, and edge clients and inference services too"
            )

    def execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Runs one statement; the rows that it finds."""
        return self._connection.execute(statement, values)

    def executemany(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Runs one statement for each row of values."""
        self._connection.executemany(statement, rows)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block, or nothing of it."""
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite itself takes back what found the disk full
                self.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()
