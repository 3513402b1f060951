"""The releases of one federation: which there are, which is active, which go."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from feddymem.memory import MemoryBank
from feddymem.v1.operator_pb2 import KeptRelease
from feddymem.v1.release_pb2 import Release
from services.aggregator import metrics
from services.aggregator.settings import FederationSettings
from services.aggregator.state import State
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import bank_from_wire
from services.runtime.errors import Refusal, data_loss, not_found, precondition
from services.runtime.logs import get_logger
from services.runtime.publisher import Publisher

_log = get_logger()


class DamagedReleaseError(RuntimeError):
    """A release cannot be read any more."""


class Releases:
    """Keeps a federation's newest releases, and the active one."""

    def __init__(
        self, name: str, settings: FederationSettings, state: State, arrays: ArrayStore, publisher: Publisher
    ) -> None:
        self._name, self._settings, self._state = name, settings, state
        self._arrays, self._publisher = arrays, publisher
        self._kept = {release.version: release for release in state.releases(name)}
        self._publish()

    @property
    def versions(self) -> list[int]:
        """Versions that can be activated, oldest first."""
        return sorted(self._kept)

    @property
    def newest(self) -> int:
        """Version of the newest release, which is the number of the last closed round; 0 for none."""
        return max(self._kept, default=0)

    @property
    def held(self) -> bool:
        """Whether an operator has activated the active release, so that it stays."""
        return self._state.held(self._name) != 0

    @property
    def active(self) -> int:
        """Version of the release that inference services score with; 0 for none."""
        return self._state.held(self._name) or self.newest

    def kept(self) -> list[KeptRelease]:
        """What an operator chooses from: all that can be activated, oldest first."""
        return [self._describe(self._kept[version]) for version in self.versions]

    def find(self, version: int) -> Release | None:
        """A release; None where it is not kept."""
        return self._kept.get(version)

    def memory(self, version: int) -> MemoryBank | None:
        """The global memory of a release; None for version 0, before the first.

        Raises:
            DamagedReleaseError: it cannot be read.
        """
        if version == 0:
            return None
        arrays = self._kept[version].arrays
        try:
            return bank_from_wire((manifest, self._arrays.read(manifest.sha256)) for manifest in arrays)
        except Refusal as refusal:
            raise DamagedReleaseError(
                f"release {version} of federation {self._name!r} cannot be read: {refusal.text}; restore a backup, or "
                "activate another release (`feddymem release activate`), from which the round starts then"
            ) from refusal

    def readable(self, version: int) -> bool:
        """Whether the global memory of a release can be read, or there is none, as before the first."""
        try:
            self.memory(version)
        except DamagedReleaseError:
            return False
        return True

    def add(self, release: Release, origins: Sequence[str]) -> None:
        """A round's release exists from now on, and is active unless another one is held; see `State.put_release`."""
        self._state.put_release(release, origins)
        self._kept[release.version] = release
        self._publish()
        try:
            self._prune()
        except (OSError, sqlite3.Error) as error:  # as where the disk is full; the next release prunes again
            _log.error("prune_failed", federation=self._name, reason=str(error))
        self._publish()

    def activate(self, version: int, expected: int | None) -> None:
        """See operator.proto.

        Raises:
            Refusal: NOT_FOUND, FAILED_PRECONDITION or DATA_LOSS, see there.
        """
        if expected not in (None, self.active):
            raise precondition(
                f"release {self.active or 'none'} of federation {self._name!r} is active by now, not "
                f"{expected or 'none'}; nothing was changed, look again (`feddymem release list`)"
            )
        if version and version not in self._kept:
            kept = ", ".join(map(str, self.versions)) or "none"
            raise not_found(f"federation {self._name!r} has no release {version}; it has {kept}")
        wanted = version or self.newest
        if not self.readable(wanted):  # inference services would stay with what they have
            raise data_loss(
                f"release {wanted} of federation {self._name!r} is damaged on the disk; activate another one"
            )
        self._state.set_held(self._name, version)
        self._publish()

    def _describe(self, release: Release) -> KeptRelease:
        opened = self._state.opened_round(self._name, release.version)
        reasons = self._state.quarantine(self._name, release.version)
        return KeptRelease(
            version=release.version,
            created=release.created,
            base=0 if opened is None else opened.base,
            sites=sorted(site for site, reason in reasons.items() if not reason),
            images=release.provenance.images,
            items=release.arrays[0].shape[0],
        )

    def _publish(self) -> None:
        active = self.find(self.active)
        metrics.RELEASE.labels(self._name).set(self.active)
        newest = self.find(self.newest)
        if newest is not None:
            metrics.RELEASE_CREATED.labels(self._name).set(newest.created.ToMilliseconds() / 1000)
        if active is not None:
            metrics.MEMORY_ITEMS.labels(self._name).set(active.arrays[0].shape[0])
            self._publisher.publish(active, self._kept.values())

    def _prune(self) -> None:
        """Removes all but the newest and the active one. Only while no round is open, which would need its base."""
        wanted = {self.active, *self.versions[-self._settings.keep_releases :]}
        for version in [version for version in self._kept if version not in wanted]:
            self._state.prune_release(self._name, version)
            pruned = self._kept.pop(version)
            used = {array.sha256 for release in self._kept.values() for array in release.arrays}
            for array in pruned.arrays:
                if array.sha256 not in used:
                    self._arrays.discard(array.sha256)
