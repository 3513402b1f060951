"""One federation at the aggregator: who takes part, which round is open, what its banks are merged to."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import grpc
import numpy as np

import feddymem
from feddymem.aggregate import Aggregation
from feddymem.feature_space import FeatureSpace
from feddymem.federation import MEMORY_TYPE, next_memory
from feddymem.memory import InvalidBankError, MemoryBank
from feddymem.names import NAME_PATTERN, NAME_RULE
from feddymem.v1 import feature_space_pb2
from feddymem.v1.array_pb2 import DATA_TYPE_FLOAT32, Array, DataType
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
from feddymem.v1.release_pb2 import RELEASE_KIND_GLOBAL_MEMORY, Provenance, Release
from services.aggregator import metrics
from services.aggregator.settings import FederationSettings
from services.aggregator.state import AcceptedBank, Site, State
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import BANK_ARRAYS, ITEM_TYPES, bank_from_wire, bank_to_wire, check_manifest
from services.runtime.changes import Changes
from services.runtime.errors import Refusal, exists, invalid, precondition
from services.runtime.logs import get_logger
from services.runtime.messages import feature_space_from_message, method_to_message
from services.runtime.publisher import MAX_ARRAY_BYTES, Publisher

_MAX_IMAGES = 10**9
_MAX_VALUE = 60_000.0
"""Largest absolute value of items and spreads: releases travel as float16, whose largest is 65,504."""

AGGREGATION_RETRY_SECONDS = 10
"""Pause before a round that failed is tried again: whoever has made room on the disk sees soon that it was enough."""

_log = get_logger()


class Federation:
    """Drives the rounds of one federation. Lives on one event loop; all its state is on disk."""

    def __init__(
        self, name: str, settings: FederationSettings, state: State, arrays: ArrayStore, publisher: Publisher
    ) -> None:
        self.name, self.settings = name, settings
        self._state, self._arrays, self._publisher = state, arrays, publisher
        self._present: dict[str, tuple[str, int]] = {}
        self._streams = 0
        self._aggregating = False
        self.changes = Changes()
        releases = state.releases(name)
        self._release = releases[-1] if releases else None
        if self._release is not None:
            publisher.publish(self._release)

    @property
    def phase(self) -> Phase.ValueType:
        """Where the federation stands."""
        if self._aggregating:
            return PHASE_AGGREGATING
        if self._version >= self.settings.method.rounds:
            return PHASE_DONE
        return PHASE_OPEN if len(self._state.sites(self.name)) >= self.settings.quorum else PHASE_WAITING

    @property
    def round(self) -> int:
        """Number of the current round, from 1; the last one when the federation is done."""
        return min(self._version + 1, self.settings.method.rounds)

    @property
    def _version(self) -> int:
        return self._release.version if self._release is not None else 0

    def join(self, request: JoinRequest) -> None:
        """A site joins; see federation.proto."""
        self._require_may_join(request.site)
        _check_names(request)
        self._check_alone(request.site, request.instance)
        if not 1 <= request.images <= _MAX_IMAGES:
            raise invalid(f"site {request.site!r} joins with {request.images} images; expected 1 to {_MAX_IMAGES}")
        self._require_room_for(request.site)
        space = feature_space_from_message(request.feature_space)
        known = self._state.feature_space(self.name)
        if known is None:
            self._state.set_feature_space(self.name, request.feature_space)
        else:
            feature_space_from_message(known).require_same(space, f"federation {self.name!r}", f"site {request.site!r}")
        self._state.put_site(self.name, Site(request.site, request.instance, request.images))
        _log.info("site_joined", federation=self.name, site=request.site, images=request.images)
        self.changes.notify()

    def _require_may_join(self, site: str) -> None:
        if not self.may_join(site):
            raise Refusal(
                grpc.StatusCode.PERMISSION_DENIED,
                f"site {site!r} is not on the list of federation {self.name!r}; ask its operator to add it",
            )

    def _require_room_for(self, site: str) -> None:
        joined = self._state.sites(self.name)
        if site not in joined and len(joined) >= self.settings.max_sites:
            raise precondition(
                f"federation {self.name!r} has its {self.settings.max_sites} sites; its operator can raise max_sites"
            )

    def may_join(self, site: str) -> bool:
        """Whether a site may take part."""
        return not self.settings.sites or site in self.settings.sites

    @contextmanager
    def presence(self, site: str, instance: str) -> Iterator[None]:
        """The site counts as present inside the block."""
        self.require_joined(site, instance)
        self._check_alone(site, instance)
        self._streams += 1
        stream = self._streams
        self._present[site] = (instance, stream)
        metrics.SITES_PRESENT.labels(self.name).set(len(self._present))
        try:
            yield
        finally:
            if self._present.get(site) == (instance, stream):  # not replaced by a newer stream of the same edge client
                del self._present[site]
            metrics.SITES_PRESENT.labels(self.name).set(len(self._present))

    def require_joined(self, site: str, instance: str) -> None:
        """Checks that an edge client speaks for a site that has joined.

        Raises:
            Refusal: FAILED_PRECONDITION if not; PERMISSION_DENIED where the site may not take part any more.
        """
        self._require_may_join(site)
        joined = self._state.sites(self.name).get(site)
        if joined is None or joined.instance != instance:
            raise precondition(
                f"site {site!r} has not joined federation {self.name!r} with this edge client; call Join first"
            )

    def rounds(self) -> WatchRoundsResponse:
        """The state of the rounds, as sites are told it."""
        phase = self.phase
        memory = None
        if self._release is not None:
            memory = GlobalMemory(version=self._release.version, arrays=self._release.arrays)
        return WatchRoundsResponse(
            phase=phase,
            round=self.round,
            seconds_left=self._seconds_left() if phase == PHASE_OPEN else 0,
            memory=memory,
        )

    def check_header(self, header: BankHeader) -> bool:
        """Checks a bank before any of its data moves; whether this very bank is accepted already.

        Raises:
            Refusal: FAILED_PRECONDITION, ALREADY_EXISTS or INVALID_ARGUMENT; see federation.proto.
        """
        self.require_joined(header.site, header.instance)
        fingerprint = self._require_feature_space().fingerprint
        if header.fingerprint != fingerprint:
            raise precondition(
                f"bank has fingerprint {header.fingerprint}, federation {self.name!r} has {fingerprint}; "
                "call Join with the feature space of the bank to see what differs"
            )
        accepted = self._state.banks(self.name, header.round).get(header.site)
        if accepted is not None:
            if list(accepted.header.arrays) == list(header.arrays):
                return True
            raise exists(f"another bank of site {header.site!r} is accepted for round {header.round} already")
        if self.phase != PHASE_OPEN or header.round != self.round:
            metrics.BANKS_REFUSED.labels(self.name, "late").inc()
            raise precondition(
                f"round {header.round} of federation {self.name!r} is not open (round {self.round} is "
                f"{Phase.Name(self.phase).removeprefix('PHASE_').lower()}); join its next round"
            )
        self._check_manifests(header.arrays)
        return False

    async def accept(self, header: BankHeader, received_bytes: int) -> None:
        """Checks the values of a bank whose arrays have all arrived, and counts it.

        Raises:
            Refusal, InvalidBankError: as in check_header, or for values that no honest site would make; nothing is
                kept then.
        """
        try:
            bank = await asyncio.to_thread(self._checked_bank, header)
        except (Refusal, InvalidBankError):
            metrics.BANKS_REFUSED.labels(self.name, "invalid").inc()
            raise
        if self.check_header(header):  # again: the round may have closed, or another stream may have been first
            return
        self._state.put_bank(AcceptedBank(header, received_bytes))
        metrics.BANKS_ACCEPTED.labels(self.name).inc()
        metrics.BANK_BYTES.labels(self.name).inc(received_bytes)
        _log.info("bank_accepted", federation=self.name, site=header.site, round=header.round, items=len(bank))
        self.changes.notify()

    def status(self, only: str | None = None) -> FederationStatus:
        """What `feddymem status` shows: of all sites, or of one only."""
        sites = []
        for site in self._state.sites(self.name).values():
            if only not in (None, site.name):
                continue
            sent = self._state.bytes_per_round(self.name, site.name)
            sites.append(
                SiteStatus(
                    site=site.name,
                    present=site.name in self._present,
                    last_round=max(sent, default=0),
                    images=site.images,
                    bytes_per_round=sent.values(),
                )
            )
        return FederationStatus(
            federation=self.name,
            phase=self.phase,
            round=self.round,
            method=method_to_message(self.settings.method),
            quorum=self.settings.quorum,
            sites=sites,
            release=self._version,
            feature_space=self._state.feature_space(self.name),
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
        _log.info("federation_done", federation=self.name, release=self._version)

    async def _drive_round(self) -> None:
        while self.phase == PHASE_WAITING:
            await self.changes.wait()
        started = self._state.open_round(self.name, self.round)
        metrics.ROUND.labels(self.name).set(self.round)
        _log.info("round_open", federation=self.name, round=self.round)
        self.changes.notify()
        while not self._complete(left := self._seconds_left()):
            await self.changes.wait(left if left > 0 else None)
        await self._aggregate(started)

    def _complete(self, seconds_left: float) -> bool:
        banks = self._state.banks(self.name, self.round)
        if len(banks) < self.settings.quorum:
            return False
        expected = self.settings.sites or self._state.sites(self.name)
        return all(site in banks for site in expected) or seconds_left <= 0

    def _seconds_left(self) -> float:
        opened = self._state.open_round(self.name, self.round)
        return max(0.0, opened + self.settings.round_deadline_seconds - time.time())

    async def _aggregate(self, started: float) -> None:
        number, banks = self.round, self._state.banks(self.name, self.round)
        self._aggregating = True
        self.changes.notify()
        try:
            with metrics.AGGREGATION_SECONDS.labels(self.name).time():
                release = await asyncio.to_thread(self._make_release, number, banks)
            self._state.put_release(release)
            self._release = release
        finally:
            self._aggregating = False
        metrics.ROUND_SECONDS.labels(self.name).observe(time.time() - started)
        metrics.MEMORY_ITEMS.labels(self.name).set(release.arrays[0].shape[0])
        metrics.RELEASE.labels(self.name).set(release.version)
        _log.info("released", federation=self.name, version=release.version, sites=len(banks))
        self._publisher.publish(release)
        self.changes.notify()

    def _make_release(self, number: int, banks: dict[str, AcceptedBank]) -> Release:
        merged = self._merge(banks)
        wire = bank_to_wire(merged.memory, MEMORY_TYPE)
        for array in wire:
            self._arrays.put(array.manifest.sha256, array.data)
        items = [next(a for a in bank.header.arrays if a.name == "items") for bank in banks.values()]
        release = Release(
            federation=self.name,
            version=number,
            kind=RELEASE_KIND_GLOBAL_MEMORY,
            feature_space=self._state.feature_space(self.name),
            arrays=[array.manifest for array in wire],
            needs_generator=self.settings.method.generator,
            provenance=Provenance(
                sites=len(banks),
                images=sum(bank.header.images for bank in banks.values()),
                items=sum(array.shape[0] for array in items),
                banks_sha256=sorted(hashlib.sha256(array.sha256).hexdigest() for array in items),
                program_version=feddymem.__version__,
            ),
        )
        release.created.GetCurrentTime()
        return release

    def _merge(self, banks: dict[str, AcceptedBank]) -> Aggregation:
        memory = self._bank(self._release.arrays) if self._release is not None else None
        received = {site: self._bank(bank.header.arrays) for site, bank in banks.items()}
        return next_memory(memory, received, self._state.bank_sites(self.name), self.settings.method)

    def _bank(self, manifests: Iterable[Array]) -> MemoryBank:
        return bank_from_wire((manifest, self._arrays.read(manifest.sha256)) for manifest in manifests)

    def _checked_bank(self, header: BankHeader) -> MemoryBank:
        bank = self._bank(header.arrays)
        largest = float(np.abs(bank.items).max())
        if largest > _MAX_VALUE or float(bank.spreads.max()) > _MAX_VALUE:
            raise invalid(
                f"items or spreads are larger than {_MAX_VALUE:g} (items up to {largest:g}); they must fit float16"
            )
        patches = header.images * self._space().patches
        if float(bank.weights.max()) > patches:
            raise invalid(f"largest weight is {bank.weights.max():g}; {header.images} images have {patches} patches")
        return bank

    def _space(self) -> FeatureSpace:
        return feature_space_from_message(self._require_feature_space())

    def _require_feature_space(self) -> feature_space_pb2.FeatureSpace:
        space = self._state.feature_space(self.name)
        if space is None:
            raise precondition(f"no site has joined federation {self.name!r} yet; call Join first")
        return space

    def _check_manifests(self, manifests: Iterable[Array]) -> None:
        by_name = {manifest.name: manifest for manifest in manifests}
        if sorted(manifest.name for manifest in manifests) != sorted(BANK_ARRAYS):
            raise invalid(f"a memory bank has the arrays {', '.join(BANK_ARRAYS)}; got {', '.join(by_name) or 'none'}")
        method, channels = self.settings.method, self._space().channels
        items = by_name["items"]
        count = items.shape[0] if items.shape else 0
        if count > method.bank_items:
            raise invalid(f"items has {count} rows; a bank of this federation has at most {method.bank_items}")
        expected = {
            "items": ([count, channels], ITEM_TYPES[method.item_type]),
            "weights": ([count, 1], DATA_TYPE_FLOAT32),
            "spreads": ([count], DATA_TYPE_FLOAT32),
        }
        for name, (shape, data_type) in expected.items():
            manifest = by_name[name]
            check_manifest(manifest, MAX_ARRAY_BYTES)
            if (list(manifest.shape), manifest.data_type) != (shape, data_type):
                raise invalid(
                    f"{name} are {DataType.Name(manifest.data_type)} of shape {list(manifest.shape)}; "
                    f"this federation takes {DataType.Name(data_type)} of shape {shape}"
                )

    def _check_alone(self, site: str, instance: str) -> None:
        present = self._present.get(site)
        if present is not None and present[0] != instance:
            raise exists(
                f"another edge client takes part as site {site!r} of federation {self.name!r} right now; "
                "stop it first, or give this one another site name"
            )


def _check_names(request: JoinRequest) -> None:
    for what, value in (("site", request.site), ("instance", request.instance)):
        if not re.fullmatch(NAME_PATTERN, value):
            raise invalid(f"{what} {value!r} must be {NAME_RULE}")
