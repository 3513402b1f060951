"""Whether a service is alive and ready, as `grpc.health.v1` tells it, and for probes that can show no certificate."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.runtime import metrics
from services.runtime.channels import SERVER_OPTIONS, bind
from services.runtime.identity import Role
from services.runtime.rpc import RpcBoundary
from services.runtime.settings import ServiceSettings

LIVENESS = "liveness"
"""Name under which the health service says SERVING for as long as the process answers, ready or not."""

_States = health_pb2.HealthCheckResponse
_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"]


class Readiness:
    """Readiness as `grpc.health.v1` shows it: of the whole server (name "") and of each service by name."""

    def __init__(self, names: Sequence[str]) -> None:
        self.servicer = _Health()
        self._names = ("", *names)

    async def begin(self) -> None:
        """Says that the process is alive, and not ready."""
        await self.servicer.set(LIVENESS, _States.SERVING)
        await self.set(False)

    async def set(self, ready: bool) -> None:
        """Says SERVING or NOT_SERVING to all who ask and watch."""
        metrics.READY.set(ready)
        for name in self._names:
            await self.servicer.set(name, _States.SERVING if ready else _States.NOT_SERVING)


@asynccontextmanager
async def probed(settings: ServiceSettings, readiness: Readiness) -> AsyncIterator[dict[str, str]]:
    """Serves health alone, without TLS, inside the block, where `health_listen` is set; under "health", its address.

    Raises:
        OSError: the address cannot be bound.
    """
    if settings.health_listen is None:
        yield {}
        return
    access = {f"/{_SERVICE.full_name}/{method.name}": frozenset(Role) for method in _SERVICE.methods}
    limits = settings.max_rpcs_per_second, settings.max_open_rpcs, settings.max_open_rpcs
    server = aio.server(interceptors=[RpcBoundary(access, {}, {}, *limits)], options=SERVER_OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(readiness.servicer, server)
    address = bind("health_listen", settings.health_listen, server.add_insecure_port)
    await server.start()
    try:
        yield {"health": address}
    finally:
        await server.stop(None)


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
    """grpcio's, and List, which it leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self._statuses: dict[str, health_pb2.HealthCheckResponse] = {}

    async def set(self, service: str, status: int) -> None:
        await super().set(service, status)
        self._statuses[service] = health_pb2.HealthCheckResponse(status=status)

    async def List(  # noqa: N802
        self, _request: health_pb2.HealthListRequest, _context: aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthListResponse:
        return health_pb2.HealthListResponse(statuses=self._statuses)
