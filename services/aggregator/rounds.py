"""The rounds of one federation: when each one opens, what it waits for, and its release."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from opentelemetry.trace import Link

from feddymem.outliers import Outlier
from feddymem.v1.federation_pb2 import (
    PHASE_AGGREGATING,
    PHASE_CALIBRATING,
    PHASE_DONE,
    PHASE_OPEN,
    PHASE_WAITING,
    CalibrateRequest,
    GlobalMemory,
    Phase,
    WatchRoundsResponse,
)
from feddymem.v1.operator_pb2 import STANDING_BANNED
from feddymem.v1.release_pb2 import Release
from services.aggregator import metrics
from services.aggregator.calibrating import calibrated
from services.aggregator.clock import monotonic
from services.aggregator.members import Members
from services.aggregator.merging import DamagedBankError, Merging, banned_origins, make_release
from services.aggregator.news import News
from services.aggregator.releases import Releases
from services.aggregator.settings import FederationSettings
from services.aggregator.state import Candidate, OpenedRound, State
from services.aggregator.uploads import Uploads
from services.runtime import tracing
from services.runtime.array_store import ArrayStore
from services.runtime.changes import Changes
from services.runtime.errors import Refusal
from services.runtime.logs import get_logger
from services.runtime.unfinished import computed

AGGREGATION_RETRY_SECONDS = 10
"""Pause before a round that failed is tried again, at most (an operator's decision ends it): whoever has made room on
the disk sees soon that it was enough."""
_NOT_LET = "the site might not take part any more"
"""Why a bank does not count that came before its site was banned, or taken off the list."""

_log = get_logger()


class Rounds:
    """Drives the rounds of one federation.

    Args:
        name: name of the federation.
        settings: what the operator has set.
        state: of this and other federations.
        members: sites of the federation.
        uploads: its banks.
        releases: its releases.
        arrays: for the arrays of releases.
    """

    def __init__(
        self,
        name: str,
        settings: FederationSettings,
        state: State,
        members: Members,
        uploads: Uploads,
        releases: Releases,
        arrays: ArrayStore,
    ) -> None:
        self._name, self._settings, self._state = name, settings, state
        self._members, self._uploads, self._releases, self._arrays = members, uploads, releases, arrays
        self._aggregating, self._doubted = False, True
        self._delivered: dict[str, Link] = {}
        self._judged: Merging | None = None
        self._changes, self._decisions, self.news = Changes(), Changes(), News()
        self._shown: WatchRoundsResponse | None = None
        self._told: tuple[int, int] | None = None
        self.forget_banks()
        metrics.show_phase(name, self.phase)

    @property
    def phase(self) -> Phase.ValueType:
        """Where the federation stands."""
        if self._aggregating:
            return PHASE_AGGREGATING
        if self._releases.candidate is not None:  # without held-out images, what there is to do is done at once
            return PHASE_CALIBRATING if self._settings.method.hold_out_share else PHASE_AGGREGATING
        if self._releases.newest >= self._settings.method.rounds:
            return PHASE_DONE
        return PHASE_OPEN if len(self._members.joined) >= self._settings.quorum else PHASE_WAITING

    @property
    def number(self) -> int:
        """Number of the current round, from 1; the last one when the federation is done."""
        return min(self._releases.newest + 1, self._settings.method.rounds)

    @property
    def candidate(self) -> Release | None:
        """The global memory that the round has made; None unless the phase is PHASE_CALIBRATING."""
        candidate = self._releases.candidate
        return candidate.release if candidate is not None and self.phase == PHASE_CALIBRATING else None

    @property
    def base(self) -> int:
        """Version of the release that the current round started from; 0 for none, or for none yet."""
        opened = self._state.opened_round(self._name, self.number)
        return 0 if opened is None else opened.base

    def state(self) -> WatchRoundsResponse:
        """The state of the rounds, as sites are told it; `news` says when to look again."""
        if self._shown is None:  # made once for all that watch
            self._shown = self._make_state()
        return self._shown

    def waits_for(self) -> str:
        """Says what the round waits for; without names, because sites are told it, too."""
        quorum = self._settings.quorum
        if self.phase == PHASE_WAITING:
            return f"{quorum - len(self._members.joined)} more to join, for the quorum of {quorum}"
        if self.phase == PHASE_CALIBRATING:
            return f"calibrations of {len(self._to_calibrate())} more sites"
        if self.phase != PHASE_OPEN:
            return ""
        banks = self._quarantines()
        counted = len(self._counted(banks))
        if counted < quorum:
            held = f"; {len(banks) - counted} in quarantine" if counted < len(banks) else ""
            return f"{quorum - counted} more banks, for the quorum of {quorum}{held}"
        return f"banks of {sum(site not in banks for site in self._members.waited_for())} more sites"

    def changed(self, at_once: bool = False) -> None:
        """Wakes who drives the rounds, and who watches them: at once where phase or round have moved, or where an
        operator has decided something; else soon, together with what else comes until then."""
        self._shown = None
        self._changes.notify()
        if at_once:
            self._doubted = True
            self._decisions.notify()
        now = self.phase, self.number
        metrics.show_phase(self._name, now[0])
        if at_once or now != self._told:
            self._told = now
            self.news.notify()
        else:
            self.news.notify_soon()

    def bank_accepted(self, site: str) -> None:
        """A site's bank of the open round has been accepted, in the trace that is the current one."""
        link = tracing.link_to_current()
        if link is not None:
            self._delivered[site] = link
        self.changed()

    def release_activated(self) -> None:
        """The operator has activated a release: a round whose base was damaged on the disk starts from that one."""
        opened = self._state.opened_round(self._name, self.number)
        # When all rounds are over, that is the last one, which has closed: its base may be gone.
        if opened is not None and self.phase != PHASE_DONE and not self._releases.readable(opened.base):
            self._state.set_base(self._name, self.number, self._releases.active)
        self.changed(at_once=True)

    def forget_banks(self) -> None:
        """Removes the arrays of banks that no round needs any more."""
        needed = self._state.banks(self._name, self._releases.newest + 1)
        self._uploads.keep_only(bank.header for bank in needed.values())

    async def run(self) -> None:
        """Drives round after round until the federation is done."""
        while self.phase != PHASE_DONE:
            try:
                await self._drive_round()
            except Exception as error:  # noqa: BLE001 - the other federations go on, and so does this one, later
                metrics.AGGREGATIONS_FAILED.labels(self._name).inc()
                _log.error("aggregation_failed", federation=self._name, round=self.number, exc_info=error)
                await self._decisions.wait(AGGREGATION_RETRY_SECONDS)
        _log.info("federation_done", federation=self._name, release=self._releases.newest)

    def calibrating(self) -> set[str]:
        """Sites whose banks count in the current round, so that their calibrations do, too."""
        return self._counted(self._quarantines())

    def _make_state(self) -> WatchRoundsResponse:
        phase = self.phase
        opened = self._state.opened_round(self._name, self.number)
        during = opened if phase in (PHASE_OPEN, PHASE_AGGREGATING, PHASE_CALIBRATING) else None
        base = self._releases.find(self._releases.active if during is None else during.base)
        candidate = self.candidate
        return WatchRoundsResponse(
            phase=phase,
            round=self.number,
            seconds_left=self._seconds_left() if phase == PHASE_OPEN else 0,
            memory=None if base is None else GlobalMemory(version=base.version, arrays=base.arrays),
            candidate=None if candidate is None else GlobalMemory(version=candidate.version, arrays=candidate.arrays),
            waits_for=self.waits_for(),
        )

    async def _drive_round(self) -> None:
        """Opens a round, waits until it is complete and makes its release; or returns without one, to be called again,
        where too few banks count then, or the operator has said something else meanwhile."""
        while self.phase == PHASE_WAITING:
            await self._changes.wait()
        opened = monotonic(self._open_round().opened)
        if self._releases.candidate is None and not await self._merge_banks():
            return
        while not self._is_outdated() and (seconds := self._seconds_to_calibrate()) > 0:
            await self._changes.wait(seconds)
        with self._traced("publish"):
            released = await self._release()
        if released:
            self._delivered.clear()
            self.forget_banks()
            metrics.ROUND_SECONDS.labels(self._name).observe(time.monotonic() - opened)
            self.changed()

    def _open_round(self) -> OpenedRound:
        opened = self._state.opened_round(self._name, self.number)
        if opened is None:
            opened = self._state.open_round(self._name, self.number, self._releases.active)
            _log.info("round_open", federation=self._name, round=self.number, base=opened.base)
        metrics.ROUND.labels(self._name).set(self.number)
        metrics.ROUND_OPENED.labels(self._name).set(opened.opened)
        self.changed()
        return opened

    async def _merge_banks(self) -> bool:
        """Waits until the round has its banks, and makes a candidate of them; whether there is one."""
        while (seconds := self._seconds_to_wait()) > 0:
            await self._changes.wait(None if seconds == float("inf") else seconds)
        try:
            with self._merging(), metrics.AGGREGATION_SECONDS.labels(self._name).time(), self._traced("aggregation"):
                return await self._make_candidate()
        except DamagedBankError as error:
            self._ask_again(error)
            return False

    def _seconds_to_calibrate(self) -> float:
        """How long sites are to be waited for that have not calibrated the candidate: 0 for no longer."""
        candidate = self._releases.candidate
        assert candidate is not None, "a candidate is calibrated"
        if self._settings.method.hold_out_share == 0:
            return 0
        left = monotonic(candidate.made) + self._settings.calibration_deadline_seconds - time.monotonic()
        return max(0.0, min(left, max(self._to_calibrate().values(), default=0.0)))

    def _to_calibrate(self) -> dict[str, float]:
        """Sites whose calibrations are waited for, and how much longer, in seconds, for each of them."""
        said = self._state.calibrated(self._name, self.number)
        waited_for = self._members.waited_for()
        return {site: waited_for[site] for site in self.calibrating() - said if site in waited_for}

    def _seconds_to_wait(self) -> float:
        """How long the round is to stay open, as things are: 0 where it is complete, endless without a quorum.

        Banks that would be enough, but for those in quarantine, are judged again together with what has come since.
        """
        banks, quorum = self._quarantines(), self._settings.quorum
        counted = len(self._counted(banks))
        metrics.ROUND_BANKS.labels(self._name).set(counted)
        if len(banks) < quorum or (counted < quorum and self._inputs() == self._judged):
            return float("inf")
        longest = max((s for site, s in self._members.waited_for().items() if site not in banks), default=0.0)
        return min(longest, self._seconds_left())

    def _quarantines(self) -> dict[str, str]:
        """Why each bank of the open round does not count (empty if it does), of sites that may take part."""
        reasons = self._state.quarantine(self._name, self.number)
        return {site: reason for site, reason in reasons.items() if self._members.counts(site)}

    def _counted(self, quarantines: Mapping[str, str]) -> set[str]:
        """Of these sites, those whose banks count."""
        return {site for site, reason in quarantines.items() if not reason or self._members.admitted(site)}

    def _seconds_left(self) -> float:
        opened = self._state.opened_round(self._name, self.number)
        if opened is None:
            return self._settings.round_deadline_seconds
        return max(0.0, monotonic(opened.opened) + self._settings.round_deadline_seconds - time.monotonic())

    @contextmanager
    def _merging(self) -> Iterator[None]:
        """The federation aggregates inside the block."""
        self._aggregating = True
        self.changed()
        try:
            yield
        finally:
            self._aggregating = False
            self.changed()

    def _ask_again(self, damaged: DamagedBankError) -> None:
        """Forgets a bank, and has its site begin anew, which finds that it is wanted."""
        site = damaged.header.site
        _log.error("bank_damaged", federation=self._name, site=site, round=self.number, reason=str(damaged))
        self._state.remove_bank(self._name, self.number, site)
        self._uploads.discard(damaged.header)
        self._members.call_back(site)
        self.changed(at_once=True)

    async def _make_candidate(self) -> bool:
        """Merges the banks of the round; whether enough of them count."""
        inputs = self._inputs()
        with tracing.span("k-means", banks=len(inputs.banks)) as merging:
            merged = await computed(lambda: inputs.next_memory(self._uploads, self._releases, self._settings.method))
            tracing.note(merging, iterations=merged.iterations, items=len(merged.memory))
        if self._inputs() != inputs:  # the operator has banned or removed a site meanwhile, or admitted one
            return False
        self._judged = inputs
        metrics.ITERATIONS.labels(self._name).set(merged.iterations)
        metrics.INERTIA.labels(self._name).set(merged.inertia)
        self._quarantine(merged.outliers, inputs.banks)
        if len(inputs.banks) - len(merged.outliers) < self._settings.quorum:
            return False
        draft = Release(
            federation=self._name,
            version=self.number,
            feature_space=self._state.feature_space(self._name),
            needs_generator=self._settings.method.generator,
        )
        with tracing.span("candidate"):
            release = await make_release(merged, inputs.banks, draft, self._arrays)
        if self._inputs() != inputs:
            return False
        self._releases.put_candidate(Candidate(release, inputs.digest(self._settings.method), time.time()))
        _log.info("candidate", federation=self._name, round=self.number, sites=release.provenance.sites)
        return True

    async def _release(self) -> bool:
        """Checks the candidate and makes it the release of the round; whether there is one, or banks have changed."""
        candidate = self._releases.candidate
        assert candidate is not None, "a candidate is released"
        said: dict[str, CalibrateRequest] | None = None
        while said is None or said.keys() != self._state.calibrated(self._name, self.number):  # more have come since
            said = self._state.calibrations(self._name, self.number)
            counted = {site: said[site] for site in self.calibrating() & said.keys()}
            try:
                release, checks = await asyncio.to_thread(
                    calibrated, candidate.release, counted, self._settings, self._arrays
                )
            except Refusal as refusal:
                self._drop_candidate(refusal.text)
                return False
        if self._is_outdated():
            self._drop_candidate("banks or their standing have changed")
            return False
        self._releases.add(release, self._inputs().origins, checks)
        metrics.BANKS_QUARANTINED.labels(self._name).inc(release.provenance.quarantined)
        failed = [check.name for check in checks if not check.passed]
        _log.info(
            "released", federation=self._name, version=release.version, sites=release.provenance.sites, failed=failed
        )
        return True

    def _is_outdated(self) -> bool:
        """Whether the candidate is of other banks than count now: looked up where an operator has said something, or
        before a restart may have."""
        candidate = self._releases.candidate
        if self._doubted and candidate is not None:
            self._doubted = self._inputs().digest(self._settings.method) != candidate.inputs
        return self._doubted

    def _drop_candidate(self, reason: str) -> None:
        _log.warning("candidate_dropped", federation=self._name, round=self.number, reason=reason)
        self._releases.drop_candidate()
        self.changed(at_once=True)

    def _traced(self, what: str) -> AbstractContextManager[object]:
        """A trace of its own, of what became of the uploads: it is no part of the one that happened to be the last."""
        links = tuple(self._delivered.values())
        return tracing.span(what, links, root=True, federation=self._name, round=self.number)

    def _inputs(self) -> Merging:
        opened = self._state.opened_round(self._name, self.number)
        assert opened is not None, "a round is opened before it is merged"
        accepted = self._state.banks(self._name, self.number)
        banks = {site: bank.header for site, bank in accepted.items() if self._members.counts(site)}
        known = self._state.origins(self._name)
        origins = (*known, *sorted(banks.keys() - set(known)))
        banned = frozenset(site for site in origins if self._members.standing(site) == STANDING_BANNED)
        return Merging(
            base=opened.base,
            banks=banks,
            origins=origins,
            banned=banned_origins(origins, banned, self._settings.method),
            trusted=frozenset(site for site in banks if self._members.admitted(site)),
        )

    def _quarantine(self, outliers: Iterable[Outlier], judged: Collection[str]) -> None:
        """Writes which banks of the round do not count; all were judged anew, with those that have come since."""
        reasons = {outlier.site: outlier.reason for outlier in outliers}
        others = (site for site in self._state.quarantine(self._name, self.number) if site not in judged)
        self._state.set_quarantine(self._name, self.number, {**dict.fromkeys(others, _NOT_LET), **reasons})
        self._members.show_quarantine(reasons, judged)
        for site, reason in reasons.items():
            _log.warning("bank_quarantined", federation=self._name, site=site, round=self.number, reason=reason)
