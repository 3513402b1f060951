"""One federation at the aggregator: which round is open, what its banks are merged to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from feddymem.feature_space import FeatureSpace
from feddymem.memory import InvalidBankError
from feddymem.outliers import Outlier
from feddymem.v1 import feature_space_pb2
from feddymem.v1.federation_pb2 import (
    PHASE_AGGREGATING,
    PHASE_DONE,
    PHASE_OPEN,
    PHASE_WAITING,
    BankHeader,
    FederationStatus,
    GlobalMemory,
    JoinRequest,
    Phase,
    SiteStatus,
    WatchRoundsResponse,
)
from feddymem.v1.operator_pb2 import STANDING_BANNED, Standing
from feddymem.v1.release_pb2 import Release
from services.aggregator import metrics
from services.aggregator.banks import check_manifests, check_values
from services.aggregator.members import Members, Presence, check_images
from services.aggregator.merging import DamagedBankError, Merging, banned_origins, make_release
from services.aggregator.releases import DamagedReleaseError, Releases
from services.aggregator.settings import FederationSettings
from services.aggregator.state import AcceptedBank, OpenedRound, State
from services.aggregator.uploads import Uploads
from services.runtime.array_store import ArrayStore
from services.runtime.changes import Changes
from services.runtime.errors import Refusal, exists, precondition
from services.runtime.logs import get_logger
from services.runtime.messages import feature_space_from_message, method_to_message
from services.runtime.publisher import Publisher

WAITS_FOR_SECONDS = 2
"""Time within which watchers hear what a round waits for: a thousand sites need not hear of each bank at once."""
AGGREGATION_RETRY_SECONDS = 10
"""Pause before a round that failed is tried again: whoever has made room on the disk sees soon that it was enough."""

_log = get_logger()


class Federation:
    """Drives the rounds of one federation. Lives on one event loop; all its state is on disk.

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
        self.name, self.settings = name, settings
        self._state, self._arrays = state, arrays
        self._aggregating = False
        self._changes, self.news = Changes(), Changes()
        self._rounds: WatchRoundsResponse | None = None
        self._told: tuple[int, int] | None = None
        self._telling: asyncio.TimerHandle | None = None
        self.members = Members(name, settings, state)
        self.releases = Releases(name, settings, state, arrays, publisher)
        self.uploads = Uploads(folder, lambda site, number: state.bank(name, number, site) is not None)
        self._base_damaged = False
        self._forget_banks()

    @property
    def phase(self) -> Phase.ValueType:
        """Where the federation stands."""
        if self._aggregating:
            return PHASE_AGGREGATING
        if self.releases.newest >= self.settings.method.rounds:
            return PHASE_DONE
        return PHASE_OPEN if len(self.members.joined) >= self.settings.quorum else PHASE_WAITING

    @property
    def round(self) -> int:
        """Number of the current round, from 1; the last one when the federation is done."""
        return min(self.releases.newest + 1, self.settings.method.rounds)

    def join(self, request: JoinRequest) -> None:
        """A site joins; see federation.proto."""
        self.members.join(request)
        _log.info("site_joined", federation=self.name, site=request.site, images=request.images)
        self._changed()

    @contextmanager
    def presence(self, site: str, instance: str) -> Iterator[Presence]:
        """The site counts as present inside the block; see `Members.presence`."""
        with self.members.presence(site, instance) as presence:
            self._changed()
            try:
                yield presence
            finally:
                self._changed()

    def rounds(self) -> WatchRoundsResponse:
        """The state of the rounds, as sites are told it; `news` says when to look again."""
        if self._rounds is None:  # made once for all that watch
            self._rounds = self._make_rounds()
        return self._rounds

    def _make_rounds(self) -> WatchRoundsResponse:
        phase = self.phase
        opened = self._state.opened_round(self.name, self.round)
        during = opened if phase in (PHASE_OPEN, PHASE_AGGREGATING) else None
        base = self.releases.find(self.releases.active if during is None else during.base)
        return WatchRoundsResponse(
            phase=phase,
            round=self.round,
            seconds_left=self._seconds_left() if phase == PHASE_OPEN else 0,
            memory=None if base is None else GlobalMemory(version=base.version, arrays=base.arrays),
            waits_for=self._waits_for(),
        )

    def check_header(self, header: BankHeader) -> bool:
        """Checks a bank before any of its data moves; whether this very bank is accepted already.

        Raises:
            Refusal: FAILED_PRECONDITION, ALREADY_EXISTS or INVALID_ARGUMENT; see federation.proto.
        """
        self.members.require_joined(header.site, header.instance)
        fingerprint = self._require_feature_space().fingerprint
        if header.fingerprint != fingerprint:
            raise precondition(
                f"bank has fingerprint {header.fingerprint[:64]}, federation {self.name!r} has {fingerprint}; "
                "call Join with the feature space of the bank to see what differs"
            )
        accepted = self._state.bank(self.name, header.round, header.site)
        # Of rounds long closed, headers are not kept: what has no arrays is equal to nothing.
        if accepted is not None and header.arrays and list(accepted.header.arrays) == list(header.arrays):
            return True
        if self.phase != PHASE_OPEN or header.round != self.round:
            metrics.BANKS_REFUSED.labels(self.name, "late").inc()
            raise precondition(
                f"round {header.round} of federation {self.name!r} is not open (round {self.round} is "
                f"{Phase.Name(self.phase).removeprefix('PHASE_').lower()}); join its next round"
            )
        if accepted is not None:
            raise exists(f"another bank of site {header.site!r} is accepted for round {header.round} already")
        check_images(header.images)
        check_manifests(header.arrays, self.settings.method, self._space())
        return False

    async def accept(self, header: BankHeader) -> None:
        """Checks the values of a bank whose arrays have all arrived, and counts it.

        Raises:
            Refusal, InvalidBankError: as in check_header, or for values that no honest site would make.
        """
        space = self._space()
        try:
            items = await asyncio.to_thread(self._check_values, header, space)
        except (Refusal, InvalidBankError):
            metrics.BANKS_REFUSED.labels(self.name, "invalid").inc()
            raise
        if self.check_header(header):  # again: the round may have closed, or another stream may have been first
            return
        received = self.uploads.received_bytes(header)
        self._state.put_bank(AcceptedBank(header, received))
        metrics.BANKS_ACCEPTED.labels(self.name).inc()
        metrics.BANK_BYTES.labels(self.name).inc(received)
        _log.info("bank_accepted", federation=self.name, site=header.site, round=header.round, items=items)
        self._changed()

    def activate(self, version: int) -> int:
        """Activates a release, see operator.proto; the version that is active now.

        A round whose base was damaged on the disk starts from the active release then.
        """
        self.releases.activate(version)
        if self._base_damaged:
            self._state.set_base(self.name, self.round, self.releases.active)
        self._changed()
        return self.releases.active

    def set_standing(self, site: str, standing: Standing.ValueType) -> None:
        """Says how a site's banks are treated; see operator.proto."""
        self.members.set_standing(site, standing)
        self._changed(at_once=True)

    def remove(self, site: str) -> None:
        """Forgets a site; see operator.proto."""
        self.members.remove(site, self.releases.newest + 1)
        self._forget_banks()
        self._changed(at_once=True)

    def status(self, only: str | None = None) -> FederationStatus:
        """What `feddymem status` shows: of all sites, or of one only."""
        last = self._state.last_banks(self.name)
        known = self._state.sites(self.name)
        sites = []
        for name, site in known.items():
            if only not in (None, name):
                continue
            last_round, quarantine = last.get(name, (0, ""))
            sites.append(
                SiteStatus(
                    site=name,
                    present=self.members.present(name),
                    last_round=last_round,
                    images=site.images,
                    bytes_per_round=self._state.bytes_per_round(self.name, name),
                    standing=self.members.standing(name),
                    quarantine=quarantine,
                )
            )
        return FederationStatus(
            federation=self.name,
            phase=self.phase,
            round=self.round,
            method=method_to_message(self.settings.method),
            quorum=self.settings.quorum,
            sites=sites,
            release=self.releases.active,
            feature_space=self._state.feature_space(self.name),
            waits_for=self._waits_for(),
            releases=self.releases.versions,
            release_held=self.releases.held,
        )

    async def run(self) -> None:
        """Drives round after round until the federation is done."""
        while self.phase != PHASE_DONE:
            try:
                await self._drive_round()
            except Exception as error:  # noqa: BLE001 - the other federations go on, and so does this one, later
                metrics.AGGREGATIONS_FAILED.labels(self.name).inc()
                _log.error("aggregation_failed", federation=self.name, round=self.round, exc_info=error)
                await self._changes.wait(AGGREGATION_RETRY_SECONDS)
        _log.info("federation_done", federation=self.name, release=self.releases.newest)

    async def _drive_round(self) -> None:
        """Opens a round, waits until it is complete and makes its release; or returns without one, to be called again,
        where too few banks count then, or the operator has said something else meanwhile."""
        while self.phase == PHASE_WAITING:
            await self._changes.wait()
        opened = self._open_round()
        while (seconds := self._seconds_to_wait()) > 0:
            await self._changes.wait(None if seconds == float("inf") else seconds)
        with self._merging(), metrics.AGGREGATION_SECONDS.labels(self.name).time():
            released = await self._release()
        if released:
            self._forget_banks()
            metrics.ROUND_SECONDS.labels(self.name).observe(time.time() - opened.opened)
            self._changed()

    def _open_round(self) -> OpenedRound:
        opened = self._state.opened_round(self.name, self.round)
        if opened is None:
            opened = self._state.open_round(self.name, self.round, self.releases.active)
            _log.info("round_open", federation=self.name, round=self.round, base=opened.base)
        metrics.ROUND.labels(self.name).set(self.round)
        self._changed()
        return opened

    def _seconds_to_wait(self) -> float:
        """How long the round is to stay open, as things are: 0 where it is complete, endless without a quorum."""
        banks = self._quarantines()
        if self._counted(banks) < self.settings.quorum:
            return float("inf")
        longest = max((s for site, s in self.members.waited_for().items() if site not in banks), default=0.0)
        return min(longest, self._seconds_left())

    def _quarantines(self) -> dict[str, str]:
        """Why each bank of the open round does not count (empty if it does), of sites that may take part."""
        reasons = self._state.quarantine(self.name, self.round)
        return {site: reason for site, reason in reasons.items() if self.members.counts(site)}

    def _counted(self, quarantines: Mapping[str, str]) -> int:
        return sum(not reason or self.members.admitted(site) for site, reason in quarantines.items())

    def _seconds_left(self) -> float:
        opened = self._state.opened_round(self.name, self.round)
        elapsed = 0.0 if opened is None else time.time() - opened.opened
        return max(0.0, self.settings.round_deadline_seconds - elapsed)

    def _waits_for(self) -> str:
        """Says what the round waits for; without names, because sites are told it, too."""
        quorum = self.settings.quorum
        if self.phase == PHASE_WAITING:
            return f"{quorum - len(self.members.joined)} more to join, for the quorum of {quorum}"
        if self.phase != PHASE_OPEN:
            return ""
        banks = self._quarantines()
        counted = self._counted(banks)
        if counted < quorum:
            held = f"; {len(banks) - counted} in quarantine" if counted < len(banks) else ""
            return f"{quorum - counted} more banks, for the quorum of {quorum}{held}"
        return f"banks of {sum(site not in banks for site in self.members.waited_for())} more sites"

    @contextmanager
    def _merging(self) -> Iterator[None]:
        """The federation aggregates inside the block. What cannot be read there is made good, as far as it can be."""
        self._aggregating = True
        self._changed()
        try:
            yield
            self._base_damaged = False
        except DamagedBankError as error:
            self._state.remove_bank(self.name, self.round, error.header.site)
            self.uploads.discard(error.header)
            self.members.call_back(error.header.site)
            raise
        except DamagedReleaseError:
            self._base_damaged = True
            raise
        finally:
            self._aggregating = False
            self._changed(at_once=True)

    async def _release(self) -> bool:
        """Makes the release of the round; whether there is one."""
        inputs = self._inputs()
        merged = await asyncio.to_thread(inputs.next_memory, self.uploads, self.releases, self.settings.method)
        if self._inputs() != inputs:  # the operator has banned or removed a site meanwhile, or admitted one
            return False
        self._quarantine(merged.outliers)
        if len(inputs.banks) - len(merged.outliers) < self.settings.quorum:
            return False
        draft = Release(
            federation=self.name,
            version=self.round,
            feature_space=self._state.feature_space(self.name),
            needs_generator=self.settings.method.generator,
        )
        release = await make_release(merged, inputs.banks, draft, self._arrays)
        if self._inputs() != inputs:
            return False
        self.releases.add(release, inputs.origins)
        metrics.BANKS_QUARANTINED.labels(self.name).inc(len(merged.outliers))
        _log.info("released", federation=self.name, version=release.version, sites=release.provenance.sites)
        return True

    def _inputs(self) -> Merging:
        opened = self._state.opened_round(self.name, self.round)
        assert opened is not None, "a round is opened before it is merged"
        accepted = self._state.banks(self.name, self.round)
        banks = {site: bank.header for site, bank in accepted.items() if self.members.counts(site)}
        known = self._state.origins(self.name)
        origins = (*known, *sorted(banks.keys() - set(known)))
        banned = frozenset(site for site in origins if self.members.standing(site) == STANDING_BANNED)
        return Merging(
            base=opened.base,
            banks=banks,
            origins=origins,
            banned=banned_origins(origins, banned, self.settings.method),
            trusted=frozenset(site for site in banks if self.members.admitted(site)),
        )

    def _quarantine(self, outliers: Iterable[Outlier]) -> None:
        """Writes which banks of the round do not count; all were judged anew, with those that have come since."""
        reasons = {outlier.site: outlier.reason for outlier in outliers}
        self._state.set_quarantine(self.name, self.round, reasons)
        for site, reason in reasons.items():
            _log.warning("bank_quarantined", federation=self.name, site=site, round=self.round, reason=reason)

    def _changed(self, at_once: bool = False) -> None:
        """Wakes who drives the rounds, and who watches them: at once where phase or round have moved, or it is about
        who may take part; else together with what else comes within WAITS_FOR_SECONDS."""
        self._rounds = None
        self._changes.notify()
        now = self.phase, self.round
        if at_once or now != self._told:
            self._told = now
            self._tell()
        elif self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(WAITS_FOR_SECONDS, self._tell)

    def _tell(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        self.news.notify()

    def _forget_banks(self) -> None:
        """Removes the arrays of banks that no round needs any more."""
        self.uploads.keep_only(bank.header for bank in self._state.banks(self.name, self.releases.newest + 1).values())

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
