"""One federation at the aggregator: who takes part, which banks are accepted, what operators say."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from feddymem.feature_space import FeatureSpace
from feddymem.memory import InvalidBankError
from feddymem.v1 import feature_space_pb2
from feddymem.v1.federation_pb2 import (
    PHASE_OPEN,
    BankHeader,
    CalibrateRequest,
    FederationStatus,
    JoinRequest,
    Phase,
    SiteStatus,
)
from feddymem.v1.operator_pb2 import Standing
from services.aggregator import metrics
from services.aggregator.banks import check_manifests, check_values
from services.aggregator.calibrating import check_sketches
from services.aggregator.members import Members, Presence, check_images
from services.aggregator.releases import Releases
from services.aggregator.rounds import Rounds
from services.aggregator.settings import FederationSettings
from services.aggregator.state import AcceptedBank, State
from services.aggregator.uploads import Uploads
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import items_of
from services.runtime.errors import Refusal, exists, precondition
from services.runtime.logs import get_logger
from services.runtime.messages import feature_space_from_message, method_to_message
from services.runtime.publisher import Publisher
from services.runtime.words import word_of

_log = get_logger()


class Federation:
    """What may be asked of one federation. Lives on one event loop; all its state is on disk.

    Args:
        name: its name.
        settings: what the operator has set.
        state: of this and other federations.
        folder: for its banks.
        arrays: for its releases, and those of others.
        publisher: serves them.
    """

    def __init__(
        self,
        name: str,
        settings: FederationSettings,
        state: State,
        folder: Path,
        arrays: ArrayStore,
        publisher: Publisher,
    ) -> None:
        metrics.show_settings(name, settings.quorum, settings.round_deadline_seconds)
        self.name, self.settings = name, settings
        self._state = state
        self.members = Members(name, settings, state)
        self.releases = Releases(name, settings, state, arrays, publisher)
        self.uploads = Uploads(folder, lambda site, number: state.bank(name, number, site) is not None)
        self.rounds = Rounds(name, settings, state, self.members, self.uploads, self.releases, arrays)

    def join(self, request: JoinRequest) -> None:
        """A site joins; see federation.proto."""
        self.members.join(request)
        _log.info("site_joined", federation=self.name, site=request.site, images=request.images)
        self.rounds.changed()

    @contextmanager
    def presence(self, site: str, instance: str) -> Iterator[Presence]:
        """The site counts as present inside the block; see `Members.presence`."""
        with self.members.presence(site, instance) as presence:
            self.rounds.changed()
            try:
                yield presence
            finally:
                self.rounds.changed()

    def check_header(self, header: BankHeader) -> bool:
        """Checks a bank before any of its data moves; whether this very bank is accepted already.

        Raises:
            Refusal: FAILED_PRECONDITION, ALREADY_EXISTS or INVALID_ARGUMENT; see federation.proto.
        """
        self.members.require_joined(header.site, header.instance)
        fingerprint = self._require_feature_space().fingerprint
        if header.fingerprint != fingerprint:
            self._count_refused("fingerprint")
            raise precondition(
                f"bank has fingerprint {header.fingerprint[:64]}, federation {self.name!r} has {fingerprint}; "
                "call Join with the feature space of the bank to see what differs"
            )
        accepted = self._state.bank(self.name, header.round, header.site)
        # Of rounds long closed, headers are not kept: what has no arrays is equal to nothing.
        if accepted is not None and header.arrays and list(accepted.header.arrays) == list(header.arrays):
            return True
        if self.rounds.phase != PHASE_OPEN or header.round != self.rounds.number:
            self._count_refused("late")
            raise precondition(
                f"round {header.round} of federation {self.name!r} is not open (round {self.rounds.number} is "
                f"{word_of(Phase.Name(self.rounds.phase))}); join its next round"
            )
        if accepted is not None:
            self._count_refused("duplicate")
            raise exists(f"another bank of site {header.site!r} is accepted for round {header.round} already")
        with self._counted_if_invalid():
            check_images(header.images)
            check_manifests(header.arrays, self.settings.method, self._space())
        return False

    async def accept(self, header: BankHeader) -> None:
        """Checks the values of a bank whose arrays have all arrived, and counts it.

        Raises:
            Refusal, InvalidBankError: as in check_header, or for values that no honest site would make.
        """
        space = self._space()
        with self._counted_if_invalid():
            items = await asyncio.to_thread(self._check_values, header, space)
        if self.check_header(header):  # again: the round may have closed, or another stream may have been first
            return
        received = self.uploads.received_bytes(header)
        self._state.put_bank(AcceptedBank(header, received))
        metrics.BANKS_ACCEPTED.labels(self.name).inc()
        metrics.BANK_BYTES.labels(self.name).inc(received)
        _log.info("bank_accepted", federation=self.name, site=header.site, round=header.round, items=items)
        self.rounds.bank_accepted(header.site)

    def calibrate(self, said: CalibrateRequest) -> None:
        """A site says how the candidate scores its held-out images; see federation.proto."""
        self.members.require_joined(said.site, said.instance)
        before = self._state.calibration(self.name, said.round, said.site)
        if before == said:
            return
        candidate = self.rounds.candidate
        named = said.round, said.items_sha256
        if candidate is None or named != (candidate.version, items_of(candidate.arrays).sha256):
            raise precondition(
                f"no candidate of items {said.items_sha256[:32].hex() or 'unnamed'} of round {said.round} is being "
                f"calibrated in federation {self.name!r}; watch its rounds"
            )
        if said.site not in self.rounds.calibrating():
            raise precondition(
                f"no bank of site {said.site!r} counts in round {said.round} of federation {self.name!r}, and so its "
                "calibration does not either; take part in the next round"
            )
        site = self._state.site(self.name, said.site)
        assert site is not None, "it has joined"
        check_sketches(said, site.images, self.rounds.base != 0)
        if before is not None:
            raise exists(f"another calibration of site {said.site!r} is accepted for round {said.round} already")
        self._state.put_calibration(said)
        metrics.CALIBRATIONS_ACCEPTED.labels(self.name).inc()
        _log.info(
            "calibration_accepted",
            federation=self.name,
            site=said.site,
            round=said.round,
            images=sum(said.candidate.scores.counts),
        )
        self.rounds.changed()

    def activate(self, version: int, expected: int | None) -> None:
        """Activates a release, see operator.proto.

        A round whose base was damaged on the disk starts from the active release then.
        """
        self.releases.activate(version, expected)
        self.rounds.release_activated()

    def set_standing(self, site: str, standing: Standing.ValueType) -> None:
        """Says how a site's banks are treated; see operator.proto."""
        self.members.set_standing(site, standing)
        self.rounds.changed(at_once=True)

    def remove(self, site: str) -> None:
        """Forgets a site; see operator.proto."""
        self.members.remove(site, self.releases.newest + 1)
        self.rounds.forget_banks()
        self.rounds.changed(at_once=True)

    def status(self, only: str | None = None) -> FederationStatus:
        """What `feddymem status` shows: of all sites, or of one only."""
        held_out = self.releases.held_out_images(self.releases.newest)
        known = self._state.sites(self.name)
        sites = []
        for name, site in known.items():
            if only not in (None, name):
                continue
            banks = self._state.last_banks(self.name, name)
            sites.append(
                SiteStatus(
                    site=name,
                    present=self.members.present(name),
                    last_round=banks[-1].round if banks else 0,
                    images=site.images,
                    bytes_per_round=[bank.received_bytes for bank in banks],
                    standing=self.members.standing(name),
                    quarantine=banks[-1].quarantine if banks else "",
                    held_out_images=held_out.get(name, 0),
                )
            )
        return FederationStatus(
            federation=self.name,
            phase=self.rounds.phase,
            round=self.rounds.number,
            method=method_to_message(self.settings.method),
            quorum=self.settings.quorum,
            sites=sites,
            release=self.releases.active,
            feature_space=self._state.feature_space(self.name),
            waits_for=self.rounds.waits_for(),
            releases=self.releases.versions,
            release_held=self.releases.held,
            failed_releases=self.releases.failed(named=only is None),
            shadow_release=self.releases.shadow,
            false_alarm_rate=self.releases.false_alarm_rate,
        )

    @contextmanager
    def _counted_if_invalid(self) -> Iterator[None]:
        try:
            yield
        except (Refusal, InvalidBankError):
            self._count_refused("invalid")
            raise

    def _count_refused(self, reason: str) -> None:
        metrics.BANKS_REFUSED.labels(self.name, reason).inc()

    def _check_values(self, header: BankHeader, space: FeatureSpace) -> int:
        bank = self.uploads.bank(header)
        check_values(bank, header.images, space)
        return len(bank)

    def _space(self) -> FeatureSpace:
        return feature_space_from_message(self._require_feature_space())

    def _require_feature_space(self) -> feature_space_pb2.FeatureSpace:
        space = self._state.feature_space(self.name)
        if space is None:
            raise precondition(f"no site has joined federation {self.name!r} yet; call Join first")
        return space
