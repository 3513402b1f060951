"""A real server behind the boundary, and callers that send what they like."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc import aio
from structlog.testing import capture_logs

from feddymem.client.channel import REQUEST_ID
from feddymem.v1 import inspection_pb2_grpc
from feddymem.v1.inspection_pb2 import InspectRequest, InspectResponse, InspectStreamRequest, InspectStreamResponse
from services.runtime.array_store import ArrayStore
from services.runtime.audit import audited
from services.runtime.errors import Refusal, invalid
from services.runtime.identity import Role
from services.runtime.publisher import Publisher
from services.runtime.server import Service, listening
from services.runtime.settings import ServiceSettings

SECONDS = 30
GARBAGE = b"\xff\xff"
MAX_REQUEST_BYTES = 2**24
RELEASES, INSPECTION = "/feddymem.v1.ReleaseService", "/feddymem.v1.InspectionService"
HEALTH, REFLECTION = "/grpc.health.v1.Health", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
METHODS = {
    f"{RELEASES}/WatchReleases": "feddymem.v1.WatchReleasesRequest",
    f"{RELEASES}/DownloadArray": "feddymem.v1.DownloadArrayRequest",
    f"{INSPECTION}/Inspect": "feddymem.v1.InspectRequest",
    f"{INSPECTION}/InspectStream": "feddymem.v1.InspectStreamRequest",
    f"{HEALTH}/Check": "grpc.health.v1.HealthCheckRequest",
    f"{HEALTH}/Watch": "grpc.health.v1.HealthCheckRequest",
    f"{HEALTH}/List": "grpc.health.v1.HealthListRequest",
    REFLECTION: "grpc.reflection.v1alpha.ServerReflectionRequest",
}
FULL = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "as many wait as are allowed; try again in 1 second")
FAULT = RuntimeError("secret of /var/lib")


class Inspections(inspection_pb2_grpc.InspectionServiceServicer):
    """Refuses, in the words of `site`, what has a site; fails where the federation is named `fault`, and waits for
    `let_go` where it is named `held`.

    Attributes:
        begun: who has called Inspect, nothing of which has been read.
        full: whether Inspect is refused before.
        holding: calls of Inspect that have begun to wait.
    """

    def __init__(self) -> None:
        self.begun: asyncio.Queue[str] = asyncio.Queue()
        self.full = False
        self.holding: asyncio.Queue[None] = asyncio.Queue()
        self.let_go = asyncio.Event()

    def _admit(self, name: str, _seconds_left: float | None) -> None:
        if self.full:
            raise FULL
        self.begun.put_nowait(name)

    async def Inspect(  # noqa: N802
        self, request: InspectRequest, context: Any
    ) -> InspectResponse:
        with audited(context, "inspect", request.federation, request.site):
            if request.federation == "fault":
                raise FAULT
            if request.federation == "held":
                self.holding.put_nowait(None)
                await self.let_go.wait()
            if request.site:
                raise invalid(request.site)
        return InspectResponse(score=1)

    async def InspectStream(  # noqa: N802
        self, request_iterator: AsyncIterator[InspectStreamRequest], context: Any
    ) -> AsyncIterator[InspectStreamResponse]:
        async for request in request_iterator:
            if request.id == "flood":
                while True:
                    yield InspectStreamResponse(id="x" * 2**20)
            yield InspectStreamResponse(id=request.id)

    async def ReportFeedback(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    async def GetInspectionStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    @property
    def service(self) -> Service:
        return Service(
            INSPECTION[1:],
            lambda server: inspection_pb2_grpc.add_InspectionServiceServicer_to_server(self, server),
            access=dict.fromkeys(
                ("Inspect", "InspectStream", "ReportFeedback", "GetInspectionStatus"), frozenset({Role.LINE})
            ),
            audited={"Inspect": "inspect"},
            admissions={"Inspect": self._admit},
        )


@asynccontextmanager
async def served(
    folder: Path,
    tls_dir: Path | None = None,
    rate: float = 1000,
    open_rpcs: int = 100,
    open_streams: int | None = None,
    inspections: Inspections | None = None,
    admitted: int = 0,
    held_bytes: int | None = None,
) -> AsyncIterator[str]:
    """The address of a server of releases, of which there are none, and of `Inspections`."""
    services = [(inspections or Inspections()).service]
    settings = ServiceSettings(
        listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
        state_dir=folder,
        tls_dir=tls_dir,
        address_file=folder / "address.json",
        drain_seconds=0,
        max_rpcs_per_second=rate,
        max_open_rpcs=open_rpcs,
    )
    publisher = Publisher(ArrayStore(folder / "arrays"), frozenset({Role.LINE}), lambda _who, _federation: True)
    services.append(publisher.service)
    with capture_logs() as lines:
        async with listening(settings, Role.INFERENCE, services, MAX_REQUEST_BYTES, open_streams, admitted, held_bytes):
            address = next(line["grpc"] for line in lines if line["event"] == "listening")
            yield address


async def outcome(channel: aio.Channel, method: str, *requests: bytes) -> tuple[grpc.StatusCode, str, str]:
    """How an RPC of any kind ends: status, text and request id."""
    rpc: Any = channel.stream_stream(method)
    call = rpc(iter(requests), timeout=SECONDS, metadata=((REQUEST_ID, "mine"),))
    code, details = await ended(call)
    [request_id] = [value for key, value in await call.trailing_metadata() if key == REQUEST_ID]
    return code, details, request_id


async def ended(call: Any) -> tuple[grpc.StatusCode, str]:
    """How a stream ends that is read."""
    try:
        while await call.read() is not aio.EOF:
            pass
    except aio.AioRpcError:
        pass
    return await call.code(), await call.details()
