"""A site's part in its federation: joins, follows the rounds, and brings the aggregator what each of them asks for."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing

import grpc
from grpc import aio

from feddymem.client.tls import TlsError
from feddymem.datasets import DatasetError
from feddymem.feature_cache import CachedPatches
from feddymem.images import ImageError
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
from services.edge_client import metrics
from services.edge_client.computing import Computing, tell_disk_full
from services.edge_client.images import SiteImages
from services.edge_client.round_work import RoundWork
from services.edge_client.settings import EdgeClientSettings
from services.edge_client.state import EdgeState
from services.edge_client.upload import upload_bank
from services.runtime import tracing
from services.runtime.arrays import bank_from_wire
from services.runtime.backoff import Backoff
from services.runtime.channels import connected
from services.runtime.errors import Refusal, is_disk_full
from services.runtime.identity import Role
from services.runtime.logs import get_logger
from services.runtime.messages import candidate_items, feature_space_to_message, method_from_message
from services.runtime.publisher import download
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


class _Aggregator:
    """The aggregator, for as long as one connection to it lasts."""

    def __init__(self, channel: aio.Channel) -> None:
        self.rounds = federation_pb2_grpc.FederationServiceStub(channel)
        self.releases = release_pb2_grpc.ReleaseServiceStub(channel)


class ParticipationError(RuntimeError):
    """The aggregator refuses this site for good; the text is the aggregator's."""


class Participant:
    """Takes part in every round of one federation. Lives on one event loop.

    Args:
        settings: of the edge client.
        images: of the site.
        state: has the bank of the last round.
        work: makes what the aggregator asks for.
        computing: for long work.
    """

    def __init__(
        self,
        settings: EdgeClientSettings,
        images: SiteImages,
        state: EdgeState,
        work: RoundWork,
        computing: Computing,
    ) -> None:
        self._settings, self._images, self._state = settings, images, state
        self._work, self._computing = work, computing
        self._identity = {"federation": settings.federation, "site": settings.site, "instance": state.instance}
        self._waits_for = ""
        self._patches: CachedPatches | None = None
        self._joined_images = self._uploaded = self._refusals = 0
        self._calibration, self._calibrated = CalibrateRequest(), False

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
        self._uploaded, self._calibrated = 0, False
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
                await self._work.publish_untrained(method, self._patches or await self.look())
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
            tracing.note(extraction, images=present.images)
        memory = await self._download(event.memory, aggregator) if event.HasField("memory") else None
        return await self._work.make_bank(event, method, present, memory)

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
        made = self._calibration.round, self._calibration.items_sha256
        if made != (event.round, candidate_items(event)):
            self._calibration, self._calibrated = await self._make_calibration(event, method, aggregator), False
        if self._calibrated:
            return
        try:
            await aggregator.rounds.Calibrate(self._calibration, timeout=self._settings.rpc_timeout_seconds)
        except aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ALREADY_EXISTS):
                raise
            _log.warning("calibration_not_taken", round=event.round, reason=error.details())
        else:
            _log.info("calibration_accepted", round=event.round, images=sum(self._calibration.candidate.scores.counts))
        self._calibrated = True

    async def _make_calibration(
        self, event: WatchRoundsResponse, method: Method, aggregator: _Aggregator
    ) -> CalibrateRequest:
        candidate = await self._download(event.candidate, aggregator)
        base = await self._download(event.memory, aggregator) if event.HasField("memory") else None
        return await self._work.make_calibration(event, method, await self._present(aggregator), candidate, base)

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
