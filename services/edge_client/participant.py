"""A site's part in its federation: join, follow the rounds, make and upload a bank in each, publish the memory
generator."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc import aio

from feddymem.client.tls import TlsError
from feddymem.feature_space import FeatureSpace
from feddymem.generator import MemoryGenerator
from feddymem.local_update import LocalUpdate, local_update, new_generator
from feddymem.memory import MemoryBank
from feddymem.memory_reduce import Progress
from feddymem.method import Method
from feddymem.patches import PatchSource
from feddymem.v1 import federation_pb2_grpc, release_pb2_grpc
from feddymem.v1.federation_pb2 import (
    PHASE_DONE,
    PHASE_OPEN,
    BankHeader,
    GlobalMemory,
    JoinRequest,
    UploadBankRequest,
    UploadBankResponse,
    WatchRoundsRequest,
    WatchRoundsResponse,
)
from feddymem.v1.release_pb2 import RELEASE_KIND_MEMORY_GENERATOR, Release
from services.edge_client import metrics
from services.edge_client.settings import EdgeClientSettings
from services.edge_client.state import EdgeState
from services.runtime.arrays import WireArray, bank_from_wire, bank_to_wire, chunks
from services.runtime.channels import TRANSIENT, UnreachableError, connected
from services.runtime.errors import Refusal
from services.runtime.logs import get_logger
from services.runtime.messages import (
    feature_space_to_message,
    generator_from_wire,
    generator_to_wire,
    method_from_message,
)
from services.runtime.publisher import Publisher, download, pause

_UploadCall = aio.StreamStreamCall[UploadBankRequest, UploadBankResponse]

_log = get_logger()


_LATER = TRANSIENT | {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED}
"""Statuses after which the same call, on a new connection, may succeed: also where the certificate has expired and may
have been renewed, and where the aggregator's disk is full."""
_JOIN_AGAIN = _LATER | {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DATA_LOSS}
"""The same for what follows Join: the aggregator may have forgotten this edge client, or bytes were damaged."""


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
        space: FeatureSpace,
        source: PatchSource,
        device: str,
        state: EdgeState,
        publisher: Publisher,
        progress: Progress,
    ) -> None:
        self._settings, self._space, self._source, self._device = settings, space, source, device
        self._state, self._publisher, self._progress = state, publisher, progress
        self._identity = {"federation": settings.federation, "site": settings.site, "instance": state.instance}
        self._uploaded = 0
        state.claim(f"federation {settings.federation}, site {settings.site}, feature space {space.fingerprint}")
        generator = state.generator()
        if generator is not None:
            publisher.publish(generator)

    async def run(self) -> None:
        """Takes part until the federation is done.

        Raises:
            ParticipationError: the aggregator refuses this site.
        """
        while True:
            try:
                async with connected(self._settings.aggregator, self._settings) as channel:
                    if await self._take_part(_Aggregator(channel)):
                        return
            except aio.AioRpcError as error:
                if error.code() not in _JOIN_AGAIN:
                    raise ParticipationError(f"{error.code().name}: {error.details()}") from error
                _log.warning("aggregator_interrupted", code=error.code().name, details=error.details())
            except (UnreachableError, TlsError) as error:
                _log.warning("aggregator_unreachable", reason=str(error))
            except Refusal as refusal:
                _log.warning("download_refused", reason=refusal.text)
            metrics.RETRIES.inc()
            await pause(self._settings)

    async def _take_part(self, aggregator: _Aggregator) -> bool:
        """Follows the rounds for as long as the connection lasts; whether the federation is done."""
        method = await self._join(aggregator)
        async for event in aggregator.rounds.WatchRounds(WatchRoundsRequest(**self._identity)):
            if await self._react(event, method, aggregator):
                return True
        return False

    async def _join(self, aggregator: _Aggregator) -> Method:
        request = JoinRequest(
            **self._identity, feature_space=feature_space_to_message(self._space), images=self._source.images
        )
        try:
            response = await aggregator.rounds.Join(request, timeout=self._settings.rpc_timeout_seconds)
        except aio.AioRpcError as error:
            if error.code() in _LATER:
                raise
            raise ParticipationError(f"{error.code().name}: {error.details()}") from error
        _log.info("joined", federation=self._settings.federation, site=self._settings.site)
        return method_from_message(response.method)

    async def _react(self, event: WatchRoundsResponse, method: Method, aggregator: _Aggregator) -> bool:
        """Does what the state of the rounds asks of this site; whether the federation is done."""
        if event.phase == PHASE_OPEN and event.round != self._uploaded:
            bank = self._kept_bank(event.round, method) or await self._make_bank(event, method, aggregator)
            await self._upload(bank, aggregator)
        if event.phase == PHASE_DONE:
            if method.generator and self._state.generator() is None:
                await self._publish_untrained(event.round, method)
            _log.info("federation_done", federation=self._settings.federation, rounds=event.round)
            return True
        return False

    def _kept_bank(self, round_number: int, method: Method) -> BankHeader | None:
        """The bank of a round, if it was made of these images already and its generator is kept, too."""
        bank, generator = self._state.bank(), self._state.generator()
        if bank is None or (bank.round, bank.images) != (round_number, self._source.images):
            return None
        if method.generator and (generator is None or generator.version != round_number):
            return None
        return bank

    async def _make_bank(self, event: WatchRoundsResponse, method: Method, aggregator: _Aggregator) -> BankHeader:
        memory = await self._download(event.memory, aggregator) if event.HasField("memory") else None
        generator = self._load_generator() if method.generator else None
        with metrics.UPDATE_SECONDS.time():
            update = await asyncio.to_thread(
                local_update, self._source, memory, generator, method, event.round, self._progress, self._device
            )
        _log.info("bank_made", round=event.round, items=len(update.bank), loss=update.loss)
        metrics.BANK_ITEMS.set(len(update.bank))
        if update.loss is not None:
            metrics.LOSS.set(update.loss)
        return self._keep(update, event.round, method)

    def _keep(self, update: LocalUpdate, round_number: int, method: Method) -> BankHeader:
        """Writes a round's outcome to disk, then publishes the generator to the site's inference services."""
        header = BankHeader(
            **self._identity,
            round=round_number,
            fingerprint=self._space.fingerprint,
            images=self._source.images,
            arrays=self._store(bank_to_wire(update.bank, method.item_type)),
        )
        generator = self._release(update.generator, round_number) if update.generator is not None else None
        self._state.put(header, generator)
        if generator is not None:
            self._publisher.publish(generator)
        return header

    async def _upload(self, header: BankHeader, aggregator: _Aggregator) -> None:
        """Uploads a bank from where an interrupted upload stopped, unless the round has gone on without it."""
        try:
            await self._upload_once(header, aggregator)
        except aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ALREADY_EXISTS):
                _log.warning("upload_interrupted", round=header.round, code=error.code().name, details=error.details())
                raise
            _log.warning("bank_not_taken", round=header.round, reason=error.details())
        else:
            self._uploaded = header.round
            metrics.ROUND.set(header.round)

    async def _upload_once(self, header: BankHeader, aggregator: _Aggregator) -> None:
        call = aggregator.rounds.UploadBank(timeout=self._settings.transfer_timeout_seconds)
        response: object = aio.EOF
        with contextlib.suppress(asyncio.InvalidStateError, aio.AioRpcError):  # the call has ended; its status says why
            async for request in self._upload_requests(header, call):
                metrics.SENT_BYTES.inc(request.ByteSize())
                await call.write(request)
            await call.done_writing()
            response = await call.read()
        if not isinstance(response, UploadBankResponse):
            code, details = await call.code(), await call.details()
            raise aio.AioRpcError(code, aio.Metadata(), aio.Metadata(), details=details)
        _log.info("bank_accepted", round=header.round, bytes=response.accepted.received_bytes)

    async def _upload_requests(self, header: BankHeader, call: _UploadCall) -> AsyncIterator[UploadBankRequest]:
        yield UploadBankRequest(header=header)
        response = await call.read()
        if not isinstance(response, UploadBankResponse):  # end of stream: the caller reads the status
            return
        offsets = {offset.sha256: offset.offset for offset in response.resume.offsets}
        for manifest in header.arrays:
            data = await asyncio.to_thread(self._state.arrays.read, manifest.sha256)
            for chunk in chunks(manifest.sha256, data, offsets[manifest.sha256]):
                yield UploadBankRequest(chunk=chunk)

    async def _download(self, memory: GlobalMemory, aggregator: _Aggregator) -> MemoryBank:
        await download(aggregator.releases, memory.arrays, self._state.arrays, self._settings)
        return bank_from_wire((manifest, self._state.arrays.read(manifest.sha256)) for manifest in memory.arrays)

    async def _publish_untrained(self, round_number: int, method: Method) -> None:
        """A site that comes when all rounds are over uses the global memory through an untrained generator, the
        identity."""
        generator = await asyncio.to_thread(new_generator, self._source, method.seed)
        release = self._release(generator, round_number)
        self._state.put_generator(release)
        self._publisher.publish(release)

    def _load_generator(self) -> MemoryGenerator | None:
        release = self._state.generator()
        if release is None:
            return None
        return generator_from_wire(self._space, ((a, self._state.arrays.read(a.sha256)) for a in release.arrays))

    def _release(self, generator: MemoryGenerator, round_number: int) -> Release:
        release = Release(
            federation=self._settings.federation,
            version=round_number,
            kind=RELEASE_KIND_MEMORY_GENERATOR,
            site=self._settings.site,
            feature_space=feature_space_to_message(self._space),
            arrays=self._store(generator_to_wire(generator)),
        )
        release.created.GetCurrentTime()
        return release

    def _store(self, arrays: list[WireArray]) -> list[Any]:
        for array in arrays:
            self._state.arrays.put(array.manifest.sha256, array.data)
        return [array.manifest for array in arrays]
