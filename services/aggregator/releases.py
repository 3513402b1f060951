"""The releases of one federation: which there are, which is active, which go."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from feddymem.calibration import site_key
from feddymem.memory import MemoryBank
from feddymem.v1.federation_pb2 import FailedRelease
from feddymem.v1.operator_pb2 import GetReleaseResponse, KeptRelease, ReleaseCheck, SiteAlarms
from feddymem.v1.release_pb2 import RELEASE_KIND_GLOBAL_MEMORY, Release
from services.aggregator import metrics
from services.aggregator.settings import FederationSettings
from services.aggregator.state import Candidate, State
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import bank_from_wire, items_of
from services.runtime.errors import Refusal, data_loss, not_found, precondition
from services.runtime.logs import get_logger
from services.runtime.messages import calibration_from_message
from services.runtime.publisher import Publisher

_log = get_logger()


class DamagedReleaseError(RuntimeError):
    """A release cannot be read any more."""


class Releases:
    """Keeps a federation's newest releases, the active one, and what the open round has made, before it is one.

    Attributes:
        candidate: of the open round; None while there is none.
    """

    def __init__(
        self, name: str, settings: FederationSettings, state: State, arrays: ArrayStore, publisher: Publisher
    ) -> None:
        self._name, self._settings, self._state = name, settings, state
        self._arrays, self._publisher = arrays, publisher
        self._kept = {release.version: release for release in state.releases(name)}
        self._checks = state.checks(name)
        self.candidate = state.candidate(name, self.newest + 1) if self.newest < settings.method.rounds else None
        self._shadow_shown: int | None = None
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
        return self._state.held(self._name) or self._newest_passed

    @property
    def shadow(self) -> int:
        """Version of the release that scores in the shadow of the active one; 0 for none."""
        return self._state.shadow(self._name) or 0

    @property
    def false_alarm_rate(self) -> float:
        """Share of normal images that may be called anomalous: that of the active release; without a calibrated one, of
        the next."""
        active = self.find(self.active)
        if active is None or not active.HasField("calibration"):
            return self._settings.false_alarm_rate
        return active.calibration.false_alarm_rate

    def failures(self, version: int, named: bool = True) -> str:
        """Which checks a release has failed, and why, in words; empty if none.

        Args:
            version: of the release.
            named: whether to say why, which names sites.
        """
        failed = [check for check in self._checks.get(version, ()) if not check.passed]
        return "; ".join(f"{check.name}: {check.finding}" if named else check.name for check in failed)

    def failed(self, named: bool) -> list[FailedRelease]:
        """The kept releases that have failed a check, oldest first; why, with names of sites or without."""
        failed = {version: self.failures(version, named) for version in self.versions}
        return [FailedRelease(version=version, reason=reason) for version, reason in failed.items() if reason]

    def kept(self) -> list[KeptRelease]:
        """What an operator chooses from: all that can be activated, oldest first."""
        return [self._describe(self._kept[version]) for version in self.versions]

    def details(self, version: int) -> GetReleaseResponse:
        """One release with all that is known of it; see operator.proto.

        Raises:
            Refusal: NOT_FOUND if it is not kept.
        """
        release = self._require(version)
        return GetReleaseResponse(
            release=self._describe(release),
            checks=self._checks.get(version, ()),
            sites=self._alarms(release),
            false_alarm_rate=release.calibration.false_alarm_rate,
        )

    def held_out_images(self, version: int) -> dict[str, int]:
        """Images that each site has held out for a release, by name; of sites that have said so."""
        said = self._state.calibrations(self._name, version)
        return {site: sum(each.candidate.scores.counts) for site, each in said.items()}

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
        try:
            arrays = self._require(version).arrays
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

    def put_candidate(self, candidate: Candidate) -> None:
        """The open round has a candidate from now on, whose arrays are in the store and served."""
        self._state.put_candidate(candidate)
        self.candidate = candidate
        self._serve()

    def drop_candidate(self) -> None:
        """The open round's candidate was never there."""
        assert self.candidate is not None, "a candidate is dropped"
        gone = self.candidate.release
        self._state.remove_candidate(self._name, gone.version)
        self.candidate = None
        self._serve()
        self._discard(gone)

    def add(self, release: Release, origins: Sequence[str], checks: Sequence[ReleaseCheck] = ()) -> None:
        """A round's release exists from now on, and is active unless it has failed a check or another one is held; see
        `State.put_release`."""
        self._state.put_release(release, origins, checks)
        self._kept[release.version] = release
        self._checks[release.version] = list(checks)
        self.candidate = None
        for check in checks:
            if not check.passed:
                metrics.CHECKS_FAILED.labels(self._name, check.name).inc()
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
        if version:
            self._require(version)
        wanted = version or self._newest_passed
        if self.active and not wanted:
            raise precondition(
                f"no kept release of federation {self._name!r} has passed its checks; activate one by its number"
            )
        self._require_readable(wanted)  # else inference services would stay with what they have
        self._state.set_held(self._name, version)
        self._publish()

    def set_shadow(self, version: int) -> None:
        """See operator.proto.

        Raises:
            Refusal: NOT_FOUND, FAILED_PRECONDITION or DATA_LOSS, see there.
        """
        if version:
            self._require(version)
            if version == self.active:
                raise precondition(
                    f"release {version} of federation {self._name!r} is the active one; name another one"
                )
            self._require_readable(version)
        self._state.set_shadow(self._name, version)
        self._publish()

    @property
    def _newest_passed(self) -> int:
        return max((version for version in self._kept if not self.failures(version)), default=0)

    def _require(self, version: int) -> Release:
        if version not in self._kept:
            kept = ", ".join(map(str, self.versions)) or "none"
            raise not_found(f"federation {self._name!r} has no release {version}; it has {kept}")
        return self._kept[version]

    def _require_readable(self, version: int) -> None:
        if not self.readable(version):
            raise data_loss(f"release {version} of federation {self._name!r} is damaged on the disk; name another one")

    def _alarms(self, release: Release) -> list[SiteAlarms]:
        """How a release scores each site's held-out images, by name."""
        calibration = calibration_from_message(release.calibration)
        said = self._state.calibrations(self._name, release.version)
        alarms = []
        for site, each in said.items():
            key = site_key(self._name, site)
            if key not in calibration.scores.sites:
                continue
            limit = calibration.scores.limit(key, calibration.rate)
            scores = calibration.scores.sites[key].scores
            alarms.append(
                SiteAlarms(
                    site=site,
                    calibration=each.candidate,
                    threshold=limit.threshold if limit else 0,
                    alarms=int((scores >= limit.threshold).sum()) if limit else 0,
                    guaranteed_rate=limit.rate if limit else 0,
                )
            )
        return alarms

    def _describe(self, release: Release) -> KeptRelease:
        opened = self._state.opened_round(self._name, release.version)
        reasons = self._state.quarantine(self._name, release.version)
        return KeptRelease(
            version=release.version,
            created=release.created,
            base=0 if opened is None else opened.base,
            sites=sorted(site for site, reason in reasons.items() if not reason),
            images=release.provenance.images,
            items=items_of(release.arrays).shape[0],
            failed=self.failures(release.version),
            held_out_images=sum(sum(site.calibration.scores.counts) for site in release.calibration.sites),
        )

    def _publish(self) -> None:
        """Publishes what is active and what scores in its shadow, where that is another one than before."""
        self._end_shadow()
        active, newest = self.find(self.active), self.find(self.newest)
        metrics.RELEASE.labels(self._name).set(self.active)
        withheld = newest is not None and newest is not active and bool(self.failures(newest.version))
        metrics.RELEASE_WITHHELD.labels(self._name).set(withheld)
        if newest is not None:
            metrics.RELEASE_CREATED.labels(self._name).set(newest.created.ToMilliseconds() / 1000)
        if active is not None:
            metrics.MEMORY_ITEMS.labels(self._name).set(items_of(active.arrays).shape[0])
            self._publisher.publish(active, self._kept.values())
        shadow = self._state.shadow(self._name)
        if shadow != self._shadow_shown:
            self._shadow_shown = shadow
            self._publisher.publish(self._as_shadow(self.shadow))
        self._serve()

    def _serve(self) -> None:
        candidate = () if self.candidate is None else (self.candidate.release,)
        self._publisher.serve(self._name, (*self._kept.values(), *candidate))

    def _as_shadow(self, version: int) -> Release:
        """The message that has a release score in the shadow; of version 0: that has none do so any more."""
        if not version:
            return Release(federation=self._name, kind=RELEASE_KIND_GLOBAL_MEMORY, shadow=True)
        shadow = Release(shadow=True)
        shadow.MergeFrom(self._kept[version])
        return shadow

    def _end_shadow(self) -> None:
        """Ends the shadow of a release that has become the active one, or is not kept any more."""
        if self.shadow and (self.shadow == self.active or self.shadow not in self._kept):
            self._state.set_shadow(self._name, 0)

    def _prune(self) -> None:
        """Removes all but the newest and the active one. Only while no round is open, which would need its base."""
        wanted = {self.active, *self.versions[-self._settings.keep_releases :]}
        for version in [version for version in self._kept if version not in wanted]:
            self._state.prune_release(self._name, version)
            self._checks.pop(version, None)
            self._discard(self._kept.pop(version))

    def _discard(self, gone: Release) -> None:
        """Removes those arrays of what is kept no more that no kept release has."""
        used = {array.sha256 for release in self._kept.values() for array in release.arrays}
        for array in gone.arrays:
            if array.sha256 not in used:
                self._arrays.discard(array.sha256)
