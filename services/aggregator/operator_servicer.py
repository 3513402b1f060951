"""What operators decide: a thin adapter over the federations."""

from __future__ import annotations

from typing import Any

from grpc import aio

from feddymem.v1 import operator_pb2_grpc
from feddymem.v1.operator_pb2 import (
    ActivateReleaseRequest,
    ActivateReleaseResponse,
    GetReleaseRequest,
    GetReleaseResponse,
    ListReleasesRequest,
    ListReleasesResponse,
    RemoveSiteRequest,
    RemoveSiteResponse,
    SetStandingRequest,
    SetStandingResponse,
    ShadowReleaseRequest,
    ShadowReleaseResponse,
    Standing,
)
from services.aggregator.federation import Federation
from services.aggregator.members import unknown_federation
from services.runtime.audit import audited
from services.runtime.identity import Role
from services.runtime.server import Service

_Context = aio.ServicerContext[Any, Any]
_ACTIONS = {
    "ActivateRelease": "activate_release",
    "ShadowRelease": "shadow_release",
    "SetStanding": "set_standing",
    "RemoveSite": "remove_site",
}
"""Of each method, for the audit log."""


class OperatorServicer(operator_pb2_grpc.OperatorServiceServicer):
    """Serves all federations of this aggregator."""

    def __init__(self, federations: dict[str, Federation]) -> None:
        self._federations = federations

    @property
    def service(self) -> Service:
        """What a server needs to serve this."""
        return Service(
            "feddymem.v1.OperatorService",
            lambda server: operator_pb2_grpc.add_OperatorServiceServicer_to_server(self, server),
            access=dict.fromkeys(("ListReleases", "GetRelease", *_ACTIONS), frozenset({Role.OPERATOR})),
            audited=_ACTIONS,
        )

    async def ListReleases(self, request: ListReleasesRequest, _context: _Context) -> ListReleasesResponse:
        """See operator.proto."""
        releases = self._federation(request.federation).releases
        return ListReleasesResponse(releases=releases.kept(), active=releases.active, held=releases.held)

    async def ActivateRelease(self, request: ActivateReleaseRequest, context: _Context) -> ActivateReleaseResponse:
        """See operator.proto."""
        expected = request.expected if request.HasField("expected") else None
        with audited(context, f"activate_release {request.version or 'newest'}", request.federation):
            federation = self._federation(request.federation)
            previous = federation.releases.active
            federation.activate(request.version, expected)
        active = federation.releases.active
        return ActivateReleaseResponse(version=active, previous=previous, failed=federation.releases.failures(active))

    async def GetRelease(self, request: GetReleaseRequest, _context: _Context) -> GetReleaseResponse:
        """See operator.proto."""
        return self._federation(request.federation).releases.details(request.version)

    async def ShadowRelease(self, request: ShadowReleaseRequest, context: _Context) -> ShadowReleaseResponse:
        """See operator.proto."""
        with audited(context, f"shadow_release {request.version or 'none'}", request.federation):
            releases = self._federation(request.federation).releases
            previous = releases.shadow
            releases.set_shadow(request.version)
        return ShadowReleaseResponse(previous=previous)

    async def SetStanding(self, request: SetStandingRequest, context: _Context) -> SetStandingResponse:
        """See operator.proto."""
        action = f"set_{Standing.Name(request.standing).lower()}" if request.standing in Standing.values() else "set_?"
        with audited(context, action, request.federation, request.site):
            self._federation(request.federation).set_standing(request.site, request.standing)
        return SetStandingResponse()

    async def RemoveSite(self, request: RemoveSiteRequest, context: _Context) -> RemoveSiteResponse:
        """See operator.proto."""
        with audited(context, "remove_site", request.federation, request.site):
            self._federation(request.federation).remove(request.site)
        return RemoveSiteResponse()

    def _federation(self, name: str) -> Federation:
        try:
            return self._federations[name]
        except KeyError:
            raise unknown_federation(name) from None
