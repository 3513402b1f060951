"""The aggregator's RPCs: a thin adapter over the federations."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc import aio

from feddymem.memory import InvalidBankError
from feddymem.v1 import federation_pb2_grpc
from feddymem.v1.array_pb2 import Array
from feddymem.v1.federation_pb2 import (
    ArrayOffset,
    BankAccepted,
    BankHeader,
    GetStatusRequest,
    GetStatusResponse,
    JoinRequest,
    JoinResponse,
    ResumeOffsets,
    UploadBankRequest,
    UploadBankResponse,
    WatchRoundsRequest,
    WatchRoundsResponse,
)
from services.aggregator.federation import Federation
from services.aggregator.state import State
from services.runtime.array_store import ArrayStore
from services.runtime.audit import audited
from services.runtime.errors import Refusal, invalid, not_found
from services.runtime.identity import Role, caller, require_site
from services.runtime.messages import method_to_message
from services.runtime.server import Service

_RESUMABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS)
"""Ends of an upload after which what has arrived is kept, because the caller goes on."""


class FederationServicer(federation_pb2_grpc.FederationServiceServicer):
    """Serves all federations of this aggregator."""

    def __init__(self, federations: dict[str, Federation], state: State, arrays: ArrayStore) -> None:
        self._state = state
        self._federations, self._arrays = federations, arrays
        self._uploads: list[BankHeader] = []
        self._received: Counter[tuple[str, str, int]] = Counter()

    @property
    def service(self) -> Service:
        """What a server needs to serve this."""
        return Service(
            "feddymem.v1.FederationService",
            lambda server: federation_pb2_grpc.add_FederationServiceServicer_to_server(self, server),
            access={
                **dict.fromkeys(("Join", "WatchRounds", "UploadBank"), frozenset({Role.SITE})),
                "GetStatus": frozenset({Role.SITE, Role.OPERATOR}),
            },
        )

    async def Join(self, request: JoinRequest, context: aio.ServicerContext[Any, Any]) -> JoinResponse:
        """See federation.proto."""
        with audited(context, "join", request.federation, request.site):
            require_site(context, request.site)
            federation = self._federation(request.federation)
            federation.join(request)
        return JoinResponse(method=method_to_message(federation.settings.method))

    async def WatchRounds(
        self, request: WatchRoundsRequest, context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[WatchRoundsResponse]:
        """See federation.proto."""
        require_site(context, request.site)
        federation = self._federation(request.federation)
        with federation.presence(request.site, request.instance):
            told: tuple[int, int] | None = None
            while True:
                state = federation.rounds()
                if told != (state.phase, state.round):
                    told = (state.phase, state.round)
                    yield state
                else:
                    await federation.changes.wait()

    async def UploadBank(
        self, request_iterator: AsyncIterator[UploadBankRequest], context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[UploadBankResponse]:
        """See federation.proto."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("content") != "header":
            raise invalid("the first message of UploadBank must be the bank's header")
        header = first.header
        with audited(context, "upload_bank", header.federation, header.site):
            require_site(context, header.site)
            federation = self._federation(header.federation)
            federation.check_header(header)
            upload = (header.federation, header.site, header.round)
            self._received[upload] += first.ByteSize()
            yield UploadBankResponse(resume=self._offsets(header))
            await self._take(header, request_iterator, federation)
        yield UploadBankResponse(accepted=BankAccepted(received_bytes=self._received.pop(upload)))

    async def GetStatus(self, request: GetStatusRequest, context: aio.ServicerContext[Any, Any]) -> GetStatusResponse:
        """See federation.proto. A site is shown its own federations, and of their sites itself."""
        who = caller(context)
        site = who.name if who is not None and who.role is Role.SITE else None
        chosen = [self._federation(request.federation)] if request.federation else self._federations.values()
        return GetStatusResponse(
            federations=[federation.status(site) for federation in chosen if site is None or federation.may_join(site)]
        )

    async def _take(
        self, header: BankHeader, requests: AsyncIterator[UploadBankRequest], federation: Federation
    ) -> None:
        """Receives a bank's arrays and has it counted; keeps nothing of one that is refused."""
        self._uploads.append(header)
        try:
            await self._receive(header, requests)
            await federation.accept(header, self._received[header.federation, header.site, header.round])
        except (Refusal, InvalidBankError) as error:
            if not (isinstance(error, Refusal) and error.status in _RESUMABLE):
                self._discard(header)
            raise
        finally:
            self._uploads.remove(header)

    async def _receive(self, header: BankHeader, requests: AsyncIterator[UploadBankRequest]) -> None:
        """Keeps chunks until all arrays of the header are whole."""
        manifests: dict[bytes, Array] = {manifest.sha256: manifest for manifest in header.arrays}
        async for request in requests:
            self._received[header.federation, header.site, header.round] += request.ByteSize()
            manifest = manifests.get(request.chunk.sha256)
            if manifest is None:
                raise invalid(
                    f"chunk of array {request.chunk.sha256.hex() or 'without a sha256'}, which is not in the header"
                )
            await asyncio.to_thread(self._arrays.append, manifest, request.chunk)
        missing = [manifest.name for sha256, manifest in manifests.items() if sha256 not in self._arrays]
        if missing:
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE,
                f"the stream ended before all of {', '.join(missing)} had arrived; upload again to resume",
            )

    def _discard(self, header: BankHeader) -> None:
        """Keeps nothing of a refused bank, but for arrays that another bank has too."""
        kept = self._state.arrays_in_use()
        kept |= {array.sha256 for other in self._uploads if other is not header for array in other.arrays}
        for manifest in header.arrays:
            if manifest.sha256 not in kept:
                self._arrays.discard(manifest.sha256)

    def _offsets(self, header: BankHeader) -> ResumeOffsets:
        return ResumeOffsets(
            offsets=[ArrayOffset(sha256=m.sha256, offset=self._arrays.held_bytes(m)) for m in header.arrays]
        )

    def _federation(self, name: str) -> Federation:
        try:
            return self._federations[name]
        except KeyError:
            raise not_found(f"there is no federation {name[:63]!r} at this aggregator; check its name") from None
