"""The aggregator's RPCs: a thin adapter over the federations."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc import aio

from feddymem.v1 import federation_pb2_grpc
from feddymem.v1.federation_pb2 import (
    ArrayOffset,
    BankAccepted,
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
from services.aggregator.members import unknown_federation
from services.runtime.audit import audited
from services.runtime.errors import Refusal, invalid
from services.runtime.identity import Role, caller, require_site
from services.runtime.messages import method_to_message
from services.runtime.server import Service


class FederationServicer(federation_pb2_grpc.FederationServiceServicer):
    """Serves all federations of this aggregator."""

    def __init__(self, federations: dict[str, Federation]) -> None:
        self._federations = federations

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
            audited={"Join": "join", "UploadBank": "upload_bank"},
        )

    async def Join(self, request: JoinRequest, context: aio.ServicerContext[Any, Any]) -> JoinResponse:
        """See federation.proto."""
        with audited(context, "join", request.federation, request.site):
            require_site(context, request.site)
            federation = self._federation(request.federation, request.site)
            federation.join(request)
        return JoinResponse(method=method_to_message(federation.settings.method))

    async def WatchRounds(
        self, request: WatchRoundsRequest, context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[WatchRoundsResponse]:
        """See federation.proto."""
        require_site(context, request.site)
        federation = self._federation(request.federation, request.site)
        with federation.presence(request.site, request.instance) as presence:
            told: tuple[int, int, str] | None = None
            while True:
                federation.members.require_present(presence)  # it may have been removed since
                state = federation.rounds.state()
                now = state.phase, state.round, state.waits_for
                if told != now:
                    told = now
                    yield state
                else:
                    await federation.rounds.news.wait()

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
            federation = self._federation(header.federation, header.site)
            accepted, uploads = federation.check_header(header), federation.uploads
            uploads.count(header, first)
            if accepted:
                whole = (ArrayOffset(sha256=array.sha256, offset=array.size_bytes) for array in header.arrays)
                yield UploadBankResponse(resume=ResumeOffsets(offsets=whole))
            else:
                with uploads.receiving(header):
                    yield UploadBankResponse(resume=uploads.offsets(header))
                    await uploads.receive(header, request_iterator)
                    await federation.accept(header)
        yield UploadBankResponse(accepted=BankAccepted(received_bytes=uploads.received_bytes(header)))

    async def GetStatus(self, request: GetStatusRequest, context: aio.ServicerContext[Any, Any]) -> GetStatusResponse:
        """See federation.proto. A site is shown its own federations, and of their sites itself."""
        who = caller(context)
        site = who.name if who is not None and who.role is Role.SITE else None
        chosen = [self._federation(request.federation, site)] if request.federation else self._federations.values()
        shown = [federation for federation in chosen if site is None or federation.members.listed(site)]
        if request.federation and not shown:
            raise unknown_federation(request.federation, site)
        return GetStatusResponse(federations=[federation.status(site) for federation in shown])

    async def Calibrate(self, _request: Any, _context: Any) -> Any:  # noqa: ANN401 - TODO(calagg)
        """Not yet."""
        raise Refusal(grpc.StatusCode.UNIMPLEMENTED, "not yet")

    def _federation(self, name: str, site: str | None = None) -> Federation:
        try:
            return self._federations[name]
        except KeyError:
            raise unknown_federation(name, site) from None
