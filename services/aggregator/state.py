"""The aggregator's state on disk: SQLite beside content-addressed arrays, written before it is acknowledged."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from feddymem.v1.feature_space_pb2 import FeatureSpace
from feddymem.v1.federation_pb2 import BankHeader, CalibrateRequest
from feddymem.v1.operator_pb2 import STANDING_JUDGED, ReleaseCheck, Standing
from feddymem.v1.release_pb2 import Release
from services.aggregator.database import Database
from services.runtime.arrays import items_of

RELEASES = "releases"
"""Folder of the arrays of all releases, beside the database."""
BANKS = "banks"
"""Folder of a folder for each federation, with a folder for each site, with the arrays of its bank."""
_BANKS_SHOWN = 100
"""Of a site in the status of a federation, which thousand sites may have after thousands of rounds."""


@dataclass(frozen=True)
class Site:
    """A site that has joined.

    Attributes:
        name: name of the site.
        instance: the edge client that speaks for it.
        images: normal images that it had when it joined, those held out of its banks among them.
    """

    name: str
    instance: str
    images: int


@dataclass(frozen=True)
class AcceptedBank:
    """A bank that was accepted for its round.

    Attributes:
        header: the bank's header; of closed rounds but the last, an empty one.
        received_bytes: bytes that it took to receive.
        quarantine: why it does not count; empty if it does.
    """

    header: BankHeader
    received_bytes: int
    quarantine: str = ""


@dataclass(frozen=True)
class PastBank:
    """What is kept for good of a bank that was accepted.

    Attributes:
        round: number of its round.
        received_bytes: bytes that it took to receive.
        quarantine: why it does not count; empty if it does.
    """

    round: int
    received_bytes: int
    quarantine: str


@dataclass(frozen=True)
class OpenedRound:
    """A round from its opening on.

    Attributes:
        opened: when, in seconds since the epoch.
        base: version of the release that it starts from; 0 for none.
    """

    opened: float
    base: int


@dataclass(frozen=True)
class Candidate:
    """The global memory that a round has made, before it is a release.

    Attributes:
        release: what it becomes; without calibration.
        inputs: SHA-256 of what it was made from; if that has changed since, it is none any more.
        made: when, in seconds since the epoch.
    """

    release: Release
    inputs: bytes
    made: float


class State:
    """Reads and writes; every write is on disk when it returns.

    Raises:
        ValueError: the folder is that of another version of this program.
    """

    def __init__(self, folder: Path) -> None:
        self._db = Database(folder)

    def close(self) -> None:
        """Closes the database."""
        self._db.close()

    @property
    def federations(self) -> list[str]:
        """Names of the federations that a site has ever joined, whether they are served now or not."""
        return [name for (name,) in self._db.execute("SELECT name FROM federation ORDER BY name")]

    def feature_space(self, federation: str) -> FeatureSpace | None:
        """The federation's feature space; None until a first site has joined."""
        row = self._db.execute("SELECT feature_space FROM federation WHERE name = ?", (federation,)).fetchone()
        return FeatureSpace.FromString(row[0]) if row else None

    def set_feature_space(self, federation: str, space: FeatureSpace) -> None:
        """A federation has this feature space from now on."""
        self._db.execute(
            "INSERT OR REPLACE INTO federation VALUES (?, ?)", (federation, space.SerializeToString(deterministic=True))
        )

    def has_banks(self, federation: str) -> bool:
        """Whether a bank was ever accepted, but for those of sites that were removed before their round closed."""
        [found] = self._db.execute("SELECT EXISTS (SELECT * FROM bank WHERE federation = ?)", (federation,)).fetchone()
        return bool(found)

    def sites(self, federation: str) -> dict[str, Site]:
        """Sites that have joined, by name."""
        rows = self._db.execute(
            "SELECT name, instance, images FROM site WHERE federation = ? ORDER BY name", (federation,)
        )
        return {name: Site(name, instance, images) for name, instance, images in rows}

    def site(self, federation: str, name: str) -> Site | None:
        """A site; None if it has not joined."""
        row = self._db.execute(
            "SELECT name, instance, images FROM site WHERE federation = ? AND name = ?", (federation, name)
        ).fetchone()
        return Site(*row) if row else None

    def put_site(self, federation: str, site: Site) -> None:
        """A site has joined, or joined again."""
        with self._db.transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO site VALUES (?, ?, ?, ?)", (federation, site.name, site.instance, site.images)
            )
            self._db.execute("DELETE FROM removed WHERE federation = ? AND site = ?", (federation, site.name))

    def remove_site(self, federation: str, site: str, round_number: int) -> None:
        """A site has not joined any more, and its bank of a round was never there."""
        with self._db.transaction():
            self._db.execute("INSERT OR REPLACE INTO removed VALUES (?, ?)", (federation, site))
            self._db.execute("DELETE FROM site WHERE federation = ? AND name = ?", (federation, site))
            self._db.execute(
                "DELETE FROM bank WHERE federation = ? AND site = ? AND round = ?", (federation, site, round_number)
            )

    def removed(self, federation: str) -> set[str]:
        """Sites that were removed and have not joined again."""
        rows = self._db.execute("SELECT site FROM removed WHERE federation = ?", (federation,))
        return {site for (site,) in rows}

    def standings(self, federation: str) -> dict[str, Standing.ValueType]:
        """The sites whose standing is not STANDING_JUDGED."""
        rows = self._db.execute("SELECT site, standing FROM standing WHERE federation = ?", (federation,))
        return {site: Standing.ValueType(standing) for site, standing in rows}

    def put_standing(self, federation: str, site: str, standing: Standing.ValueType) -> None:
        """An operator has decided how a site's banks are treated."""
        if standing == STANDING_JUDGED:
            self._db.execute("DELETE FROM standing WHERE federation = ? AND site = ?", (federation, site))
        else:
            self._db.execute("INSERT OR REPLACE INTO standing VALUES (?, ?, ?)", (federation, site, standing))

    def open_round(self, federation: str, number: int, base: int) -> OpenedRound:
        """Opens a round that starts from a release, unless it is open; the round as it was opened."""
        self._db.execute("INSERT OR IGNORE INTO round VALUES (?, ?, ?, ?)", (federation, number, time.time(), base))
        opened = self.opened_round(federation, number)
        assert opened is not None, "it has just been opened"
        return opened

    def opened_round(self, federation: str, number: int) -> OpenedRound | None:
        """A round; None where it has not been opened yet."""
        row = self._db.execute(
            "SELECT opened, base FROM round WHERE federation = ? AND number = ?", (federation, number)
        ).fetchone()
        return OpenedRound(*row) if row else None

    def banks(self, federation: str, number: int) -> dict[str, AcceptedBank]:
        """Banks of a round, by site."""
        rows = self._db.execute(
            "SELECT site, header, received_bytes, quarantine FROM bank WHERE federation = ? AND round = ? "
            "ORDER BY site",
            (federation, number),
        )
        return {site: AcceptedBank(BankHeader.FromString(header), *other) for site, header, *other in rows}

    def bank(self, federation: str, number: int, site: str) -> AcceptedBank | None:
        """A site's bank of a round; None where none is accepted."""
        row = self._db.execute(
            "SELECT header, received_bytes, quarantine FROM bank WHERE federation = ? AND round = ? AND site = ?",
            (federation, number, site),
        ).fetchone()
        return AcceptedBank(BankHeader.FromString(row[0]), *row[1:]) if row else None

    def quarantine(self, federation: str, number: int) -> dict[str, str]:
        """Of each bank of a round, by site, why it does not count; empty if it does."""
        return dict(
            self._db.execute(
                "SELECT site, quarantine FROM bank WHERE federation = ? AND round = ?", (federation, number)
            )
        )

    def origins(self, federation: str) -> list[str]:
        """Sites of whose banks releases were made; a site's place is its origin, for good."""
        rows = self._db.execute("SELECT site FROM origin WHERE federation = ? ORDER BY number", (federation,))
        return [site for (site,) in rows]

    def last_banks(self, federation: str, site: str) -> list[PastBank]:
        """What is kept for good of a site's last banks, oldest first."""
        rows = self._db.execute(
            "SELECT round, received_bytes, quarantine FROM bank WHERE federation = ? AND site = ? "
            "ORDER BY round DESC LIMIT ?",
            (federation, site, _BANKS_SHOWN),
        )
        return [PastBank(*row) for row in rows][::-1]

    def put_bank(self, bank: AcceptedBank) -> None:
        """A bank is accepted for its round from now on."""
        header = bank.header
        values = header.SerializeToString(deterministic=True), bank.received_bytes
        self._db.execute(
            "INSERT INTO bank (federation, round, site, header, received_bytes) VALUES (?, ?, ?, ?, ?)",
            (header.federation, header.round, header.site, *values),
        )

    def remove_bank(self, federation: str, number: int, site: str) -> None:
        """A site's bank of a round was never accepted."""
        self._db.execute("DELETE FROM bank WHERE federation = ? AND round = ? AND site = ?", (federation, number, site))

    def set_base(self, federation: str, number: int, base: int) -> None:
        """A round that is open starts from another release."""
        self._db.execute("UPDATE round SET base = ? WHERE federation = ? AND number = ?", (base, federation, number))

    def set_quarantine(self, federation: str, number: int, reasons: Mapping[str, str]) -> None:
        """Of a round's banks, those of these sites do not count, for these reasons; the others do."""
        with self._db.transaction():
            self._db.execute("UPDATE bank SET quarantine = '' WHERE federation = ? AND round = ?", (federation, number))
            self._db.executemany(
                "UPDATE bank SET quarantine = ? WHERE federation = ? AND round = ? AND site = ?",
                [(reason, federation, number, site) for site, reason in reasons.items()],
            )

    def candidate(self, federation: str, number: int) -> Candidate | None:
        """The candidate of a round that has no release yet; None if there is none."""
        row = self._db.execute(
            "SELECT message, inputs, made FROM candidate WHERE federation = ? AND round = ?", (federation, number)
        ).fetchone()
        return Candidate(Release.FromString(row[0]), *row[1:]) if row else None

    def candidates(self, federation: str) -> list[Release]:
        """All candidates of a federation, of which its current round has one at most."""
        rows = self._db.execute("SELECT message FROM candidate WHERE federation = ?", (federation,))
        return [Release.FromString(row[0]) for row in rows]

    def put_candidate(self, candidate: Candidate) -> None:
        """A round has a candidate from now on; its arrays are in the store already.

        What sites have said of another candidate of the round is forgotten; not of one that was the same.
        """
        release = candidate.release
        place = release.federation, release.version
        others = [
            (*place, site)
            for site, said in self.calibrations(*place).items()
            if said.items_sha256 != items_of(release.arrays).sha256
        ]
        with self._db.transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO candidate VALUES (?, ?, ?, ?, ?)",
                (*place, release.SerializeToString(deterministic=True), candidate.inputs, candidate.made),
            )
            self._db.executemany("DELETE FROM calibration WHERE federation = ? AND round = ? AND site = ?", others)

    def remove_candidate(self, federation: str, number: int) -> None:
        """A round's candidate was never there."""
        self._db.execute("DELETE FROM candidate WHERE federation = ? AND round = ?", (federation, number))

    def calibrations(self, federation: str, number: int) -> dict[str, CalibrateRequest]:
        """What sites have said of the candidate of a round, or of the release that it has become, by site."""
        rows = self._db.execute(
            "SELECT site, message FROM calibration WHERE federation = ? AND round = ? ORDER BY site",
            (federation, number),
        )
        return {site: CalibrateRequest.FromString(message) for site, message in rows}

    def calibrated(self, federation: str, number: int) -> set[str]:
        """Sites that have said how they score the candidate of a round."""
        rows = self._db.execute("SELECT site FROM calibration WHERE federation = ? AND round = ?", (federation, number))
        return {site for (site,) in rows}

    def calibration(self, federation: str, number: int, site: str) -> CalibrateRequest | None:
        """What a site has said of the candidate of a round; None where it has said nothing."""
        row = self._db.execute(
            "SELECT message FROM calibration WHERE federation = ? AND round = ? AND site = ?",
            (federation, number, site),
        ).fetchone()
        return CalibrateRequest.FromString(row[0]) if row else None

    def put_calibration(self, said: CalibrateRequest) -> None:
        """What a site says of the candidate of a round counts from now on."""
        self._db.execute(
            "INSERT INTO calibration VALUES (?, ?, ?, ?)",
            (said.federation, said.round, said.site, said.SerializeToString(deterministic=True)),
        )

    def releases(self, federation: str) -> list[Release]:
        """All releases of a federation that are kept, oldest first."""
        rows = self._db.execute("SELECT message FROM release WHERE federation = ? ORDER BY version", (federation,))
        return [Release.FromString(row[0]) for row in rows]

    def checks(self, federation: str) -> dict[int, list[ReleaseCheck]]:
        """The checks of all releases of a federation that are kept, by version."""
        rows = self._db.execute(
            "SELECT version, message FROM release_check WHERE federation = ? ORDER BY version, number", (federation,)
        )
        checks: dict[int, list[ReleaseCheck]] = {}
        for version, message in rows:
            checks.setdefault(version, []).append(ReleaseCheck.FromString(message))
        return checks

    def put_release(self, release: Release, origins: Sequence[str], checks: Sequence[ReleaseCheck] = ()) -> None:
        """A release exists from now on; its arrays are in the store already. Its round is closed.

        Args:
            release: the release.
            origins: sites by their origin in it; none may have another origin than before.
            checks: what came of its checks.
        """
        with self._db.transaction():
            self._db.execute(
                "INSERT INTO release VALUES (?, ?, ?)",
                (release.federation, release.version, release.SerializeToString(deterministic=True)),
            )
            self._db.executemany(
                "INSERT INTO release_check VALUES (?, ?, ?, ?)",
                [
                    (release.federation, release.version, number, check.SerializeToString(deterministic=True))
                    for number, check in enumerate(checks)
                ],
            )
            self._db.execute("DELETE FROM candidate WHERE federation = ?", (release.federation,))
            self._db.executemany(
                "INSERT OR IGNORE INTO origin VALUES (?, ?, ?)",
                [(release.federation, number, site) for number, site in enumerate(origins)],
            )
            self._db.execute(  # the last round's stay: their senders may not have heard yet that they are accepted
                "UPDATE bank SET header = x'' WHERE federation = ? AND round = ?",
                (release.federation, release.version - 1),
            )

    def prune_release(self, federation: str, version: int) -> None:
        """A release cannot be had any more."""
        with self._db.transaction():
            self._db.execute("DELETE FROM release WHERE federation = ? AND version = ?", (federation, version))
            self._db.execute("DELETE FROM release_check WHERE federation = ? AND version = ?", (federation, version))
            self._db.execute("DELETE FROM calibration WHERE federation = ? AND round = ?", (federation, version))

    def held(self, federation: str) -> int:
        """Version of the release that an operator has activated; 0 where the newest that has passed is active."""
        row = self._db.execute("SELECT version FROM held WHERE federation = ?", (federation,)).fetchone()
        return int(row[0]) if row else 0

    def set_held(self, federation: str, version: int) -> None:
        """An operator has activated a release; 0: the newest."""
        self._db.execute("INSERT OR REPLACE INTO held VALUES (?, ?)", (federation, version))

    def shadow(self, federation: str) -> int | None:
        """Version of the release that scores in the shadow; 0 where one did; None where none ever did."""
        row = self._db.execute("SELECT version FROM shadow WHERE federation = ?", (federation,)).fetchone()
        return int(row[0]) if row else None

    def set_shadow(self, federation: str, version: int) -> None:
        """A release scores in the shadow; 0: none does any more."""
        self._db.execute("INSERT OR REPLACE INTO shadow VALUES (?, ?)", (federation, version))
