"""Releases on disk: what this service can score with, whoever else is there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from feddymem.generator import MemoryGenerator
from feddymem.memory import MemoryBank
from feddymem.v1.release_pb2 import RELEASE_KIND_GLOBAL_MEMORY, RELEASE_KIND_MEMORY_GENERATOR, Release
from feddymem.verdicts import ReleaseLimits
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import bank_from_wire
from services.runtime.errors import as_refusal, invalid
from services.runtime.files import make_folder, read_record, write_record
from services.runtime.logs import get_logger
from services.runtime.messages import calibration_from_message, feature_space_from_message, generator_from_wire

_log = get_logger()


@dataclass(frozen=True, eq=False)
class Kept:
    """A release with what its arrays hold: read from disk once, so that no later damage there reaches what scores.

    Attributes:
        release: the release.
        content: its global memory, or its memory generator.
        limits: what its calibration says of scores; None for a release without one.
    """

    release: Release
    content: MemoryBank | MemoryGenerator
    limits: ReleaseLimits | None = None


class ReleaseStore:
    """A folder of releases, and beside it one of their arrays."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "releases"
        make_folder(self._folder)
        self.arrays = ArrayStore(folder / "arrays")
        self._lost: set[str] = set()

    def load(self) -> list[Kept]:
        """What an earlier run left, in the order in which it came.

        A release that is damaged is taken away: its publisher sends it again.
        """
        found = []
        for path in sorted(self._folder.glob("*.binpb"), key=lambda path: path.stat().st_mtime_ns):
            data = read_record(path)
            if data is None:
                self._lost.add(_key_of(path))
                continue
            release = Release.FromString(data)
            try:
                found.append(self.open(release))
            except Exception as error:
                refusal = as_refusal(error)
                if refusal is None:
                    raise
                _log.error("release_on_disk_refused", **_name(release), reason=refusal.text)
                self._lost.add(_key_of(path))
                path.unlink()
        # Nor the parts of arrays that were on their way: whoever resumes them now may be about to send a later release.
        self.arrays.keep_only({array.sha256 for kept in found for array in kept.release.arrays}, keep_parts=False)
        return found

    def lost(self, federation: str, site: str) -> bool:
        """Whether `load` found a release of a federation or site damaged, and it has not come again."""
        return not self._lost.isdisjoint({_key(federation, ""), _key(federation, site)})

    def open(self, release: Release) -> Kept:
        """A release whose arrays are in the store.

        Raises:
            Refusal: a kind that this version does not know, arrays that are damaged, missing or do not fit, or a
                calibration that no sites make.
            InvalidBankError: values that no honest publisher would send.
        """
        if release.kind not in (RELEASE_KIND_GLOBAL_MEMORY, RELEASE_KIND_MEMORY_GENERATOR):
            raise invalid(
                f"release of {release.federation!r} has kind {release.kind}, which this version does not know"
            )
        space = feature_space_from_message(release.feature_space)
        arrays = ((array, self.arrays.read(array.sha256)) for array in release.arrays)
        if release.kind == RELEASE_KIND_GLOBAL_MEMORY:
            return Kept(release, bank_from_wire(arrays), _limits(release))
        return Kept(release, generator_from_wire(space, arrays))

    def write(self, release: Release) -> None:
        """Keeps a release; on disk when it returns."""
        path = self._path(release)
        write_record(path, release.SerializeToString(deterministic=True))
        self._lost.discard(_key_of(path))

    def has(self, release: Release) -> bool:
        """Whether `write` has kept a release, as it is now."""
        return read_record(self._path(release)) == release.SerializeToString(deterministic=True)

    def forget(self, replaced: Iterable[Release], kept: Iterable[Release]) -> None:
        """Removes what only replaced releases used."""
        kept = list(kept)
        paths = {self._path(release) for release in kept}
        used = {array.sha256 for release in kept for array in release.arrays}
        for release in replaced:
            if self._path(release) not in paths:
                self._path(release).unlink(missing_ok=True)
            for array in release.arrays:
                if array.sha256 not in used:
                    self.arrays.discard(array.sha256)

    def _path(self, release: Release) -> Path:
        return self._folder / f"{_key(release.federation, release.site)}-{release.kind}-{release.version:010}.binpb"


def _limits(release: Release) -> ReleaseLimits | None:
    if not release.HasField("calibration"):
        return None
    return ReleaseLimits(release.federation, calibration_from_message(release.calibration))


def _key(federation: str, site: str) -> str:
    """Hashed, because names come from other processes and must not become paths."""
    return hashlib.sha256(f"{federation}\0{site}".encode()).hexdigest()[:32]


def _key_of(path: Path) -> str:
    return path.name.partition("-")[0]


def _name(release: Release) -> dict[str, object]:
    return {"federation": release.federation, "site": release.site, "release": release.version}
