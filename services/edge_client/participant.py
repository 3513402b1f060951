"""A site's part in its federation: join, follow the rounds, make and upload a bank in each, calibrate what comes of it,
publish the memory generator."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing
from typing import Any

import grpc
from grpc import aio

from feddymem.client.tls import TlsError
from feddymem.datasets import DatasetError
from feddymem.feature_cache import CachedPatches
from feddymem.generator import MemoryGenerator
from feddymem.images import ImageError
from feddymem.local_update import LocalUpdate, local_update, new_generator
from feddymem.memory import MemoryBank
from feddymem.method import Method
from feddymem.v1 import federation_pb2_grpc, release_pb2_grpc
from feddymem.v1.federation_pb2 import (
    PHASE_CALIBRATING,
    PHASE_DONE,
    PHASE_OPEN,
    BankHeader,
    CalibrateRequest,
    GlobalMemory,
    JoinRequest,
    WatchRoundsRequest,
    WatchRoundsResponse,
)
from feddymem.v1.release_pb2 import RELEASE_KIND_MEMORY_GENERATOR, Release
from services.edge_client import metrics
from services.edge_client.calibration import calibration_of
from services.edge_client.computing import Computing, tell_disk_full
from services.edge_client.images import SiteImages
from services.edge_client.settings import EdgeClientSettings
from services.edge_client.state import EdgeState, Outcome
from services.edge_client.upload import upload_bank
from services.runtime import tracing
from services.runtime.arrays import WireArray, bank_from_wire, bank_to_wire
from services.runtime.backoff import Backoff
from services.runtime.channels import connected
from services.runtime.errors import Refusal, is_disk_full
from services.runtime.identity import Role
from services.runtime.logs import get_logger
from services.runtime.messages import (
    candidate_items,
    feature_space_to_message,
    generator_from_wire,
    generator_to_wire,
    method_from_message,
)
from services.runtime.publisher import Publisher, download
from services.runtime.server_identity import UnreachableError
from services.runtime.watching import watched

_log = get_logger()


_REFUSED = frozenset(
    {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED}
)
"""Statuses that end an edge client. After any other the same call, on a new connection, may succeed: gRPC itself says
UNAVAILABLE, UNKNOWN or INTERNAL where a line broke."""
_JOIN_REFUSED = _REFUSED | {
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
}
"""The same for Join, which decides where another call was answered so: the aggregator may have forgotten this edge
client, or have pruned what it was downloading."""
_BELIEVED_WITHOUT_TLS = 3
"""Refusals since the last accepted bank, each on a new connection, that end an edge client without TLS: a flipped bit,
as in the name of a method or in a status, makes one that nobody meant. With TLS the first one ends it."""


_NO_ROUND = 0
"""Version of a memory generator that no round has made: older than all others."""


class _Aggregator:
    """The aggregator, for as long as one connection to it lasts."""

    def __init__(self, channel: aio.Channel) -> None:
        self.rounds = federation_pb2_grpc.FederationServiceStub(channel)
        self.releases = release_pb2_grpc.ReleaseServiceStub(channel)


class ParticipationError(RuntimeError):
    """The aggregator refuses this site for good; the text is the aggregator's."""


class Participant:
    """Takes part in every round of one federation. Lives on one event loop; computes in threads."""

    def __init__(
        self,
        settings: EdgeClientSettings,
        images: SiteImages,
        device: str,
        state: EdgeState,
        publisher: Publisher,
        computing: Computing,
    ) -> None:
        self._settings, self._images, self._device = settings, images, device
        self._state, self._publisher, self._computing = state, publisher, computing
        self._identity = {"federation": settings.federation, "site": settings.site, "instance": state.instance}
        self._waits_for = ""
        self._patches: CachedPatches | None = None
        self._joined_images = self._uploaded = self._refusals = 0
        self._calibration = CalibrateRequest()
        self._calibrated: tuple[int, bytes] | None = None
        generator = state.last().generator
        if generator is not None:
            publisher.publish(generator)

    async def look(self) -> CachedPatches:
        """Patch features of the images that are in the folder now.

        Raises:
            DatasetError: no folder, no image in it, or none that can be read.
        """
        self._patches = await self._computing.run(self._images.look)
        return self._patches

    async def run(self) -> None:
        """Takes part: with `once` until the federation is done, else for ever, because it may be given more rounds.

        Raises:
            ParticipationError: the aggregator refuses this site.
        """
        backoff = Backoff(self._settings)
        while True:
            try:
                async with connected(self._settings.aggregator, self._settings, Role.AGGREGATOR) as channel:
                    if await self._take_part(_Aggregator(channel)):
                        return
            except aio.AioRpcError as error:
                if error.code() in _REFUSED:
                    self._believe(ParticipationError(f"{error.code().name}: {error.details()}"))
                _log.warning("aggregator_interrupted", code=error.code().name, details=error.details())
            except ParticipationError as error:
                self._believe(error)
                _log.warning("aggregator_refuses", reason=str(error))
            except (UnreachableError, TlsError) as error:
                _log.warning("aggregator_unreachable", reason=str(error))
            except Refusal as refusal:  # of what was downloaded, or of what lay on the disk
                _log.warning("array_refused", reason=refusal.text)
            except (DatasetError, ImageError) as error:
                _log.error("no_images", reason=str(error))
            except OSError as error:
                if not is_disk_full(error):
                    raise
                tell_disk_full(error)
            metrics.RETRIES.inc()
            await backoff.pause()

    def _believe(self, refusal: ParticipationError) -> None:
        """Raises a refusal unless it may be due to a flipped bit."""
        self._refusals += 1
        if self._settings.tls_dir is not None or self._refusals >= _BELIEVED_WITHOUT_TLS:
            raise refusal

    async def _take_part(self, aggregator: _Aggregator) -> bool:
        """Follows the rounds for as long as the connection lasts; whether the federation is done and that is all."""
        method = await self._join(aggregator)
        # The aggregator may have forgotten both; if not, no byte of the bank is sent again.
        self._uploaded, self._calibrated = 0, None
        async with aclosing(self._events(aggregator)) as events:
            async for event in events:
                if event is None:
                    await self._look_ahead()
                    continue
                self._tell_waiting(event)
                if await self._react(event, method, aggregator) and self._settings.once:
                    return True
        return False

    async def _events(self, aggregator: _Aggregator) -> AsyncGenerator[WatchRoundsResponse | None, None]:
        """The states of the rounds, each once; None each time that nothing was said for `scan_seconds`."""
        last: tuple[object, ...] | None = None
        request = WatchRoundsRequest(**self._identity)
        events = watched(aggregator.rounds.WatchRounds, request, self._settings.scan_seconds)
        async with aclosing(events):
            async for event in events:
                state = None
                if event is not None:
                    state = event.phase, event.round, event.waits_for, candidate_items(event)
                if state is None or state != last:
                    last = state or last
                    yield event

    def _tell_waiting(self, event: WatchRoundsResponse) -> None:
        """Says what a round waits for, when that has changed."""
        if event.waits_for and event.waits_for != self._waits_for:
            _log.info("waiting", round=event.round, waits_for=event.waits_for)
        self._waits_for = event.waits_for

    async def _look_ahead(self) -> None:
        """Extracts what is new, so that the next round need not wait for it."""
        try:
            await self.look()
        except DatasetError as error:  # there may be images again when a round asks for them
            _log.warning("no_images", reason=str(error))

    async def _join(self, aggregator: _Aggregator) -> Method:
        patches = self._patches or await self.look()
        request = JoinRequest(
            **self._identity, feature_space=feature_space_to_message(self._images.feature_space), images=patches.images
        )
        try:
            response = await aggregator.rounds.Join(request, timeout=self._settings.rpc_timeout_seconds)
        except aio.AioRpcError as error:
            if error.code() not in _JOIN_REFUSED:
                raise
            raise ParticipationError(f"{error.code().name}: {error.details()}") from error
        self._joined_images = patches.images
        _log.info("joined", federation=self._settings.federation, site=self._settings.site)
        return method_from_message(response.method)

    async def _react(self, event: WatchRoundsResponse, method: Method, aggregator: _Aggregator) -> bool:
        """Does what the state of the rounds asks of this site; whether the federation is done."""
        if event.phase == PHASE_OPEN and event.round != self._uploaded:
            with self._traced("round", event):
                await self._deliver(event, method, aggregator)
        if event.phase == PHASE_CALIBRATING:
            with self._traced("calibration", event):
                await self._calibrate(event, method, aggregator)
        if event.phase == PHASE_DONE:
            if method.generator and self._state.last().generator is None:
                await self._publish_untrained(method)
            _log.info("federation_done", federation=self._settings.federation, rounds=event.round)
            return True
        return False

    def _traced(self, what: str, event: WatchRoundsResponse) -> AbstractContextManager[object]:
        """A trace of this site's part in a round."""
        settings = self._settings
        return tracing.span(what, root=True, federation=settings.federation, site=settings.site, round=event.round)

    async def _deliver(self, event: WatchRoundsResponse, method: Method, aggregator: _Aggregator) -> None:
        """Uploads the bank of a round."""
        bank = self._state.last().bank
        # Made once: whatever has become of it and of the folder since, no other one is ever sent for its round.
        if bank is None or bank.round != event.round:
            bank = await self._make_bank(event, method, aggregator)
        await self._upload(bank, aggregator)

    async def _make_bank(self, event: WatchRoundsResponse, method: Method, aggregator: _Aggregator) -> BankHeader:
        with tracing.span("extraction") as extraction:
            present = await self._present(aggregator)
            patches, held_out = await self._computing.run(present.split, method.hold_out_share, method.seed)
            tracing.note(extraction, images=patches.images)
        metrics.HELD_OUT.set(0 if held_out is None else held_out.images)
        memory = await self._download(event.memory, aggregator) if event.HasField("memory") else None
        # Without a memory the federation begins, or begins anew with an aggregator that has lost its disk.
        generator = self._load_generator() if method.generator and memory is not None else None
        with tracing.span("local update") as local, metrics.UPDATE_SECONDS.time():
            update = await self._computing.run(
                local_update,
                patches,
                memory,
                generator,
                method,
                event.round,
                self._computing.progress,
                self._device,
            )
            tracing.note(local, items=len(update.bank))
        _log.info("bank_made", round=event.round, images=patches.images, items=len(update.bank), loss=update.loss)
        metrics.BANK_ITEMS.set(len(update.bank))
        metrics.REDUCE_RATIO.set(len(update.bank) / (patches.images * self._images.feature_space.patches))
        if update.loss is not None:
            metrics.LOSS.set(update.loss)
        outcome = await self._computing.run(self._keep, update, event, method, patches, held_out)
        if outcome.generator is not None:
            self._publisher.publish(outcome.generator)
        assert outcome.bank is not None
        return outcome.bank

    async def _present(self, aggregator: _Aggregator) -> CachedPatches:
        """The images that are in the folder now."""
        patches = await self.look()
        if patches.images != self._joined_images:  # as `feddymem status` shows it
            await self._join(aggregator)
        return patches

    async def _calibrate(self, event: WatchRoundsResponse, method: Method, aggregator: _Aggregator) -> None:
        """Tells how the round's candidate scores the held-out images, unless it is told already.

        Nothing of it is kept on disk: after a restart it is computed again. Where images are gone since, another
        calibration comes of it, which the aggregator refuses if it has the first one; that one stands then.
        """
        wanted = event.round, candidate_items(event)
        if wanted == self._calibrated:
            return
        if (self._calibration.round, self._calibration.items_sha256) != wanted:
            self._calibration = await self._make_calibration(event, method, aggregator)
        try:
            await aggregator.rounds.Calibrate(self._calibration, timeout=self._settings.rpc_timeout_seconds)
        except aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ALREADY_EXISTS):
                raise
            _log.warning("calibration_not_taken", round=event.round, reason=error.details())
        else:
            _log.info("calibration_accepted", round=event.round, images=sum(self._calibration.candidate.scores.counts))
        self._calibrated = wanted

    async def _make_calibration(
        self, event: WatchRoundsResponse, method: Method, aggregator: _Aggregator
    ) -> CalibrateRequest:
        candidate = await self._download(event.candidate, aggregator)
        base = await self._download(event.memory, aggregator) if event.HasField("memory") else None
        held_out = await self._computing.run(self._held_out, await self._present(aggregator), event.round)
        generator = self._load_generator() if method.generator else None
        if method.generator and generator is None:
            _log.warning("generator_missing", reason="the memory generator of this round is lost; nothing is scored")
            held_out = None
        with metrics.CALIBRATION_SECONDS.time():
            said = await self._computing.run(
                calibration_of, self._images.extractor, candidate, base, generator, held_out, self._computing.progress
            )
        said.federation, said.site = self._settings.federation, self._settings.site
        said.instance, said.round, said.items_sha256 = self._state.instance, event.round, candidate_items(event)
        return said

    def _held_out(self, present: CachedPatches, round_number: int) -> CachedPatches | None:
        """Those that were held out of the round's bank, as far as they are still there; none that has come since, which
        would move images of the bank to their side."""
        outcome = self._state.last()
        if outcome.round != round_number:
            _log.warning("held_out_unknown", reason="which images were held out of the bank is lost; nothing is scored")
            return None
        return present.only(outcome.held_out)

    def _keep(
        self,
        update: LocalUpdate,
        event: WatchRoundsResponse,
        method: Method,
        patches: CachedPatches,
        held_out: CachedPatches | None,
    ) -> Outcome:
        """Writes a round's outcome to disk."""
        bank = BankHeader(
            **self._identity,
            round=event.round,
            fingerprint=self._images.feature_space.fingerprint,
            images=patches.images,
            arrays=self._store(bank_to_wire(update.bank, method.item_type)),
        )
        generator = self._release(update.generator, event.round) if update.generator is not None else None
        names = frozenset() if held_out is None else frozenset(held_out.names.values())
        outcome = Outcome(bank, generator, event.round, names)
        self._state.put(outcome, event.memory.arrays)
        return outcome

    async def _upload(self, header: BankHeader, aggregator: _Aggregator) -> None:
        """Uploads a bank from where an interrupted upload stopped, unless the round has gone on without it."""
        seconds = self._settings.transfer_timeout_seconds
        try:
            received_bytes = await upload_bank(header, self._state.arrays, aggregator.rounds, seconds)
        except aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ALREADY_EXISTS):
                metrics.UPLOAD_RETRIES.inc()
                _log.warning("upload_interrupted", round=header.round, code=error.code().name, details=error.details())
                raise
            _log.warning("bank_not_taken", round=header.round, reason=error.details())
            if error.code() == grpc.StatusCode.ALREADY_EXISTS:  # else the round is not open, and may be again
                self._uploaded = header.round
        else:
            _log.info("bank_accepted", round=header.round, bytes=received_bytes)
            self._uploaded, self._refusals = header.round, 0
            metrics.ROUND.set(header.round)

    async def _download(self, memory: GlobalMemory, aggregator: _Aggregator) -> MemoryBank:
        await download(aggregator.releases, memory.arrays, self._state.arrays, self._settings)
        return bank_from_wire((manifest, self._state.arrays.read(manifest.sha256)) for manifest in memory.arrays)

    async def _publish_untrained(self, method: Method) -> None:
        """A site that comes when all rounds are over, or whose generator was damaged, uses the global memory through an
        untrained one, the identity. It is of no round: a trained one that an inference service has is not replaced."""
        _log.warning("generator_untrained", reason="there is no memory generator of a round here, and no more rounds")
        patches = self._patches or await self.look()
        generator = await self._computing.run(new_generator, patches, method.seed)
        release = await self._computing.run(self._keep_untrained, generator)
        self._publisher.publish(release)

    def _keep_untrained(self, generator: MemoryGenerator) -> Release:
        release = self._release(generator, _NO_ROUND)
        self._state.put(Outcome(generator=release))
        return release

    def _load_generator(self) -> MemoryGenerator | None:
        release = self._state.last().generator
        if release is None:
            return None
        arrays = ((array, self._state.arrays.read(array.sha256)) for array in release.arrays)
        return generator_from_wire(self._images.feature_space, arrays)

    def _release(self, generator: MemoryGenerator, round_number: int) -> Release:
        release = Release(
            federation=self._settings.federation,
            version=round_number,
            kind=RELEASE_KIND_MEMORY_GENERATOR,
            site=self._settings.site,
            feature_space=feature_space_to_message(self._images.feature_space),
            arrays=self._store(generator_to_wire(generator)),
        )
        release.created.GetCurrentTime()
        return release

    def _store(self, arrays: list[WireArray]) -> list[Any]:
        for array in arrays:
            self._state.arrays.put(array.manifest.sha256, array.data)
        return [array.manifest for array in arrays]
