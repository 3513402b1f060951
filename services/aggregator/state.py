"""The aggregator's state on disk: SQLite beside content-addressed arrays, written before it is acknowledged."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from feddymem.v1.feature_space_pb2 import FeatureSpace
from feddymem.v1.federation_pb2 import BankHeader
from feddymem.v1.release_pb2 import Release

_SCHEMA = """
CREATE TABLE IF NOT EXISTS federation (name TEXT PRIMARY KEY, feature_space BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS site (
    federation TEXT, name TEXT, instance TEXT NOT NULL, images INTEGER NOT NULL, PRIMARY KEY (federation, name)
);
CREATE TABLE IF NOT EXISTS round (
    federation TEXT, number INTEGER, opened REAL NOT NULL, PRIMARY KEY (federation, number)
);
CREATE TABLE IF NOT EXISTS bank (
    federation TEXT, round INTEGER, site TEXT, header BLOB NOT NULL, received_bytes INTEGER NOT NULL,
    PRIMARY KEY (federation, round, site)
);
CREATE TABLE IF NOT EXISTS release (
    federation TEXT, version INTEGER, message BLOB NOT NULL, PRIMARY KEY (federation, version)
);
"""


@dataclass(frozen=True)
class Site:
    """A site that has joined.

    Attributes:
        name: name of the site.
        instance: the edge client that speaks for it.
        images: normal images behind its bank.
    """

    name: str
    instance: str
    images: int


@dataclass(frozen=True)
class AcceptedBank:
    """A bank that counts in its round.

    Attributes:
        header: the bank's header; its arrays are in the array store.
        received_bytes: bytes that it took to receive.
    """

    header: BankHeader
    received_bytes: int


class State:
    """Reads and writes; every write is on disk when it returns."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(folder / "aggregator.sqlite3", isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Closes the database."""
        self._db.close()

    def feature_space(self, federation: str) -> FeatureSpace | None:
        """The federation's feature space; None until a first site has joined."""
        row = self._db.execute("SELECT feature_space FROM federation WHERE name = ?", (federation,)).fetchone()
        return FeatureSpace.FromString(row[0]) if row else None

    def set_feature_space(self, federation: str, space: FeatureSpace) -> None:
        """Fixes the federation's feature space."""
        self._db.execute(
            "INSERT INTO federation VALUES (?, ?)", (federation, space.SerializeToString(deterministic=True))
        )

    def sites(self, federation: str) -> dict[str, Site]:
        """Sites that have joined, by name."""
        rows = self._db.execute(
            "SELECT name, instance, images FROM site WHERE federation = ? ORDER BY name", (federation,)
        )
        return {name: Site(name, instance, images) for name, instance, images in rows}

    def put_site(self, federation: str, site: Site) -> None:
        """A site has joined, or joined again."""
        self._db.execute(
            "INSERT OR REPLACE INTO site VALUES (?, ?, ?, ?)", (federation, site.name, site.instance, site.images)
        )

    def open_round(self, federation: str, number: int) -> float:
        """Opens a round unless it is open; when it was opened, in seconds since the epoch."""
        self._db.execute("INSERT OR IGNORE INTO round VALUES (?, ?, ?)", (federation, number, time.time()))
        return float(
            self._db.execute(
                "SELECT opened FROM round WHERE federation = ? AND number = ?", (federation, number)
            ).fetchone()[0]
        )

    def banks(self, federation: str, number: int) -> dict[str, AcceptedBank]:
        """Banks of a round, by site."""
        rows = self._db.execute(
            "SELECT site, header, received_bytes FROM bank WHERE federation = ? AND round = ? ORDER BY site",
            (federation, number),
        )
        return {site: AcceptedBank(BankHeader.FromString(header), received) for site, header, received in rows}

    def bank_sites(self, federation: str) -> list[str]:
        """Sites that a bank was ever accepted of, in the order of their first rounds; new ones come last."""
        rows = self._db.execute(
            "SELECT site FROM bank WHERE federation = ? GROUP BY site ORDER BY MIN(round), site", (federation,)
        )
        return [site for (site,) in rows]

    def bytes_per_round(self, federation: str, site: str) -> dict[int, int]:
        """Bytes that each of a site's banks took to receive, by round."""
        rows = self._db.execute(
            "SELECT round, received_bytes FROM bank WHERE federation = ? AND site = ? ORDER BY round",
            (federation, site),
        )
        return dict(rows.fetchall())

    def put_bank(self, bank: AcceptedBank) -> None:
        """A bank counts in its round from now on."""
        header = bank.header
        self._db.execute(
            "INSERT INTO bank VALUES (?, ?, ?, ?, ?)",
            (
                header.federation,
                header.round,
                header.site,
                header.SerializeToString(deterministic=True),
                bank.received_bytes,
            ),
        )

    def arrays_in_use(self) -> set[bytes]:
        """Hashes of all arrays of accepted banks and releases."""
        headers = [BankHeader.FromString(row[0]) for row in self._db.execute("SELECT header FROM bank")]
        releases = [Release.FromString(row[0]) for row in self._db.execute("SELECT message FROM release")]
        arrays = [array for header in headers for array in header.arrays]
        arrays += [array for release in releases for array in release.arrays]
        return {array.sha256 for array in arrays}

    def releases(self, federation: str) -> list[Release]:
        """All releases of a federation, oldest first."""
        rows = self._db.execute("SELECT message FROM release WHERE federation = ? ORDER BY version", (federation,))
        return [Release.FromString(row[0]) for row in rows]

    def put_release(self, release: Release) -> None:
        """A release exists from now on; its arrays are in the store already."""
        self._db.execute(
            "INSERT INTO release VALUES (?, ?, ?)",
            (release.federation, release.version, release.SerializeToString(deterministic=True)),
        )
