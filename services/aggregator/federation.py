"""One federation at the aggregator: which round is open, what its banks are merged to."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import feddymem
from feddymem.feature_space import FeatureSpace
from feddymem.federation import MAX_ORIGINS, MEMORY_TYPE, NextMemory, next_memory
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
from feddymem.v1.release_pb2 import RELEASE_KIND_GLOBAL_MEMORY, Provenance, Release
from services.aggregator import metrics
from services.aggregator.banks import check_manifests, check_values
from services.aggregator.members import Members, check_images
from services.aggregator.releases import Releases
from services.aggregator.settings import FederationSettings
from services.aggregator.state import AcceptedBank, OpenedRound, State
from services.aggregator.uploads import Uploads
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import bank_to_wire
from services.runtime.changes import Changes
from services.runtime.errors import Refusal, exists, precondition
from services.runtime.logs import get_logger
from services.runtime.messages import feature_space_from_message, method_to_message
from services.runtime.publisher import Publisher

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
        self.changes = Changes()
        self.members = Members(name, settings, state)
        self.releases = Releases(name, settings, state, arrays, publisher)
        self.uploads = Uploads(folder, lambda site, number: site in state.banks(name, number))
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
        self.changes.notify()

    @contextmanager
    def presence(self, site: str, instance: str) -> Iterator[None]:
        """The site counts as present inside the block."""
        with self.members.presence(site, instance):
            self.changes.notify()
            try:
                yield
            finally:
                self.changes.notify()

    def rounds(self) -> WatchRoundsResponse:
        """The state of the rounds, as sites are told it."""
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
        accepted = self._state.banks(self.name, header.round).get(header.site)
        if accepted is not None and list(accepted.header.arrays) == list(header.arrays):
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
        self.changes.notify()

    def activate(self, version: int) -> int:
        """Activates a release, see operator.proto; the version that is active now."""
        self.releases.activate(version)
        return self.releases.active

    def set_standing(self, site: str, standing: Standing.ValueType) -> None:
        """Says how a site's banks are treated; see operator.proto."""
        self.members.set_standing(site, standing)
        self.changes.notify()

    def remove(self, site: str) -> None:
        """Forgets a site; see operator.proto."""
        self.members.remove(site, self.releases.newest + 1)
        self._forget_banks()
        self.changes.notify()

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
                await self.changes.wait(AGGREGATION_RETRY_SECONDS)
        _log.info("federation_done", federation=self.name, release=self.releases.newest)

    async def _drive_round(self) -> None:
        """Opens a round, waits until it is complete and makes its release; or, where outliers leave too few banks,
        returns, to be called again."""
        while self.phase == PHASE_WAITING:
            await self.changes.wait()
        opened = self._state.open_round(self.name, self.round, self.releases.active)
        metrics.ROUND.labels(self.name).set(self.round)
        _log.info("round_open", federation=self.name, round=self.round, base=opened.base)
        self.changes.notify()
        while (seconds := self._seconds_to_wait()) > 0:
            await self.changes.wait(None if seconds == float("inf") else seconds)
        await self._aggregate(opened)

    def _seconds_to_wait(self) -> float:
        """How long the round is to stay open, as things are: 0 where it is complete, endless without a quorum."""
        banks = self._banks()
        if self._counted(banks) < self.settings.quorum:
            return float("inf")
        longest = max((s for site, s in self.members.waited_for().items() if site not in banks), default=0.0)
        return min(longest, self._seconds_left())

    def _banks(self) -> dict[str, AcceptedBank]:
        """Banks of the open round whose sites may take part, those in quarantine among them."""
        banks = self._state.banks(self.name, self.round)
        return {site: bank for site, bank in banks.items() if self.members.counts(site)}

    def _counted(self, banks: Mapping[str, AcceptedBank]) -> int:
        return sum(not bank.quarantine or self.members.admitted(site) for site, bank in banks.items())

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
        banks = self._banks()
        counted = self._counted(banks)
        if counted < quorum:
            held = f"; {len(banks) - counted} in quarantine" if counted < len(banks) else ""
            return f"{quorum - counted} more banks, for the quorum of {quorum}{held}"
        return f"banks of {sum(site not in banks for site in self.members.waited_for())} more sites"

    async def _aggregate(self, opened: OpenedRound) -> None:
        banks = self._banks()
        self._aggregating = True
        self.changes.notify()
        try:
            with metrics.AGGREGATION_SECONDS.labels(self.name).time():
                merged = await self._merge(banks, opened)
                self._quarantine(merged.outliers)
                if len(banks) - len(merged.outliers) < self.settings.quorum:
                    return
                release = await self._make_release(merged, banks)
        finally:
            self._aggregating = False
            self.changes.notify()
        self.releases.add(release)
        self._forget_banks()
        metrics.BANKS_QUARANTINED.labels(self.name).inc(len(merged.outliers))
        metrics.ROUND_SECONDS.labels(self.name).observe(time.time() - opened.opened)
        _log.info("released", federation=self.name, version=release.version, sites=release.provenance.sites)
        self.changes.notify()

    async def _merge(self, banks: Mapping[str, AcceptedBank], opened: OpenedRound) -> NextMemory:
        sites = self._state.bank_sites(self.name)
        banned, trusted = self._banned_origins(sites), {site for site in banks if self.members.admitted(site)}
        method = self.settings.method

        def merge() -> NextMemory:
            received = {site: self.uploads.bank(bank.header) for site, bank in banks.items()}
            memory = self.releases.memory(opened.base)
            if memory is not None and banned:
                memory = memory.without(banned)
            return next_memory(memory, received, sites, method, trusted)

        return await asyncio.to_thread(merge)

    def _quarantine(self, outliers: Iterable[Outlier]) -> None:
        """Writes which banks of the round do not count; all were judged anew, with those that have come since."""
        reasons = {outlier.site: outlier.reason for outlier in outliers}
        self._state.set_quarantine(self.name, self.round, reasons)
        for site, reason in reasons.items():
            _log.warning("bank_quarantined", federation=self.name, site=site, round=self.round, reason=reason)

    async def _make_release(self, merged: NextMemory, banks: Mapping[str, AcceptedBank]) -> Release:
        wire = bank_to_wire(merged.memory, MEMORY_TYPE)
        for array in wire:
            await asyncio.to_thread(self._arrays.put, array.manifest.sha256, array.data)
        outliers = {outlier.site for outlier in merged.outliers}
        headers = [bank.header for site, bank in banks.items() if site not in outliers]
        items = [next(a for a in header.arrays if a.name == "items") for header in headers]
        release = Release(
            federation=self.name,
            version=self.round,
            kind=RELEASE_KIND_GLOBAL_MEMORY,
            feature_space=self._state.feature_space(self.name),
            arrays=[array.manifest for array in wire],
            needs_generator=self.settings.method.generator,
            provenance=Provenance(
                sites=len(headers),
                images=sum(header.images for header in headers),
                items=sum(array.shape[0] for array in items),
                banks_sha256=sorted(hashlib.sha256(array.sha256).hexdigest() for array in items),
                program_version=feddymem.__version__,
                quarantined=len(outliers),
            ),
        )
        release.created.GetCurrentTime()
        return release

    def _banned_origins(self, sites: list[str]) -> list[int]:
        """Origins of banned sites in the global memory; none where sites share origins, or it has only one."""
        if not self.settings.method.origins or len(sites) > MAX_ORIGINS:
            return []
        return [origin for origin, site in enumerate(sites) if self.members.standing(site) == STANDING_BANNED]

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
