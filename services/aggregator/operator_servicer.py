"""What operators decide: a thin adapter over the federations."""

from __future__ import annotations

from typing import Any

import grpc
from grpc import aio

from feddymem.v1 import operator_pb2_grpc
from feddymem.v1.operator_pb2 import (
    ActivateReleaseRequest,
    ActivateReleaseResponse,
    ListReleasesRequest,
    ListReleasesResponse,
    RemoveSiteRequest,
    RemoveSiteResponse,
    SetStandingRequest,
    SetStandingResponse,
    Standing,
)
from services.aggregator.federation import Federation
from services.aggregator.members import unknown_federation
from services.runtime.audit import audited
from services.runtime.errors import Refusal
from services.runtime.identity import Role
from services.runtime.server import Service

_Context = aio.ServicerContext[Any, Any]
_ACTIONS = {"ActivateRelease": "activate_release", "SetStanding": "set_standing", "RemoveSite": "remove_site"}
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
            access=dict.fromkeys(("ListReleases", *_ACTIONS), frozenset({Role.OPERATOR})),
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
        return ActivateReleaseResponse(version=federation.releases.active, previous=previous)

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

    async def GetRelease(self, _request: Any, _context: _Context) -> Any:  # noqa: ANN401 - TODO(calagg)
        """Not yet."""
        raise Refusal(grpc.StatusCode.UNIMPLEMENTED, "not yet")

    async def ShadowRelease(self, _request: Any, _context: _Context) -> Any:  # noqa: ANN401 - TODO(calagg)
        """Not yet."""
        raise Refusal(grpc.StatusCode.UNIMPLEMENTED, "not yet")

    def _federation(self, name: str) -> Federation:
        try:
            return self._federations[name]
        except KeyError:
            raise unknown_federation(name) from None
