"""Feedback on its way from a line to the edge client of its federation and site, and to nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
from grpc import aio

from feddymem.client.tls import TlsError
from feddymem.v1.feedback_pb2 import GetFeedbackOwnerRequest, GetFeedbackOwnerResponse, KeepFeedbackRequest
from feddymem.v1.feedback_pb2_grpc import FeedbackServiceStub
from feddymem.v1.inspection_pb2 import ReportFeedbackRequest
from services.inference import metrics
from services.inference.settings import InferenceSettings
from services.runtime.channels import connected
from services.runtime.errors import Refusal, invalid, not_found
from services.runtime.feedback import OPINIONS, require_feedback
from services.runtime.identity import Role
from services.runtime.logs import get_logger
from services.runtime.server_identity import UnreachableError

FIND_SECONDS = 3
"""For an edge client to say whose it is, connection and TLS included: milliseconds in a site's own network. All five
attempts of the client library fit into its 30 s with the pauses between them, so that a caller hears who is away."""
FORWARDED_AT_ONCE = 4
"""Images on their way to edge clients, at most: each is held in memory meanwhile, and people report few."""

_ANSWERS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)
"""Statuses of an edge client that are for who has reported."""
_UNREACHABLE = (UnreachableError, TlsError, aio.AioRpcError, Refusal, TimeoutError)

_log = get_logger()


class FeedbackForwarder:
    """Finds the edge client that feedback is for, and hands it over."""

    def __init__(self, settings: InferenceSettings) -> None:
        self._settings = settings
        self._forwarding = 0
        for opinion in OPINIONS.values():
            metrics.FEEDBACK.labels(opinion)

    async def report(self, request: ReportFeedbackRequest) -> str:
        """Has feedback kept by the edge client of its federation and site; idempotent.

        Returns:
            SHA-256 of the image file, in hex.

        Raises:
            Refusal: see inspection.proto.
        """
        require_feedback(request)
        if self._forwarding == FORWARDED_AT_ONCE:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{FORWARDED_AT_ONCE} reports are on their way to edge clients; try again in a second",
            )
        self._forwarding += 1
        try:
            address, owner = await self._find(request.federation, request.site)
            image = await self._forward(address, owner, request)
        finally:
            self._forwarding -= 1
        metrics.FEEDBACK.labels(OPINIONS[request.opinion]).inc()
        return image

    async def _find(self, federation: str, site: str) -> tuple[str, GetFeedbackOwnerResponse]:
        """The edge client of a federation and site, either of which may be empty where there is only one."""
        addresses = self._settings.edge_clients
        owners = await asyncio.gather(*map(self._owner, addresses))
        found = [
            (address, owner)
            for address, owner in zip(addresses, owners, strict=True)
            if owner and federation in ("", owner.federation) and site in ("", owner.site)
        ]
        named = bool(federation and site)
        if None in owners and not (found and named):
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE,
                f"the edge client for {_described(federation, site)} cannot be reached; nothing was kept, try again",
            )
        if not found:
            raise not_found(f"this service knows no edge client for {_described(federation, site)}; check the names")
        if len(found) > 1 and not named:
            raise invalid(f"this service knows {len(found)} edge clients; name the federation and the site")
        return found[0]

    async def _owner(self, address: str) -> GetFeedbackOwnerResponse | None:
        """Whose an edge client is; None where it does not say so."""
        try:
            async with asyncio.timeout(FIND_SECONDS), connected(address, self._settings, Role.SITE) as channel:
                return await FeedbackServiceStub(channel).GetFeedbackOwner(
                    GetFeedbackOwnerRequest(), timeout=FIND_SECONDS
                )
        except _UNREACHABLE as error:
            _log.warning("edge_client_unreachable", edge_client=address, reason=_reason(error))
            return None

    async def _forward(self, address: str, owner: GetFeedbackOwnerResponse, request: ReportFeedbackRequest) -> str:
        keep = KeepFeedbackRequest(
            federation=owner.federation,
            site=owner.site,
            encoded=request.encoded,
            opinion=request.opinion,
            note=request.note,
        )
        try:
            async with connected(address, self._settings, Role.SITE) as channel:
                seconds = self._settings.transfer_timeout_seconds
                return (await FeedbackServiceStub(channel).KeepFeedback(keep, timeout=seconds)).image
        except _UNREACHABLE as error:
            if isinstance(error, aio.AioRpcError) and error.code() in _ANSWERS:
                raise Refusal(error.code(), error.details() or error.code().name) from error
            _log.warning("edge_client_unreachable", edge_client=address, reason=_reason(error))
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE,
                f"the edge client for {_described(owner.federation, owner.site)} has not said that it is kept; try "
                "again",
            ) from error


def _described(federation: str, site: str) -> str:
    parts: Sequence[str] = [f"{what} {name!r}" for what, name in (("federation", federation), ("site", site)) if name]
    return " and ".join(parts) or "this service's site"


def _reason(error: Exception) -> str:
    if isinstance(error, aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
