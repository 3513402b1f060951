"""A service's life: listen, be ready or not, stop on SIGTERM with requests in flight finished."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.runtime.channels import FAREWELL_SECONDS, MAX_MESSAGE_BYTES, SERVER_OPTIONS, bind
from services.runtime.files import write_atomically
from services.runtime.health import Readiness, probed
from services.runtime.identity import Identity, Role
from services.runtime.logs import get_logger
from services.runtime.metrics import serve_metrics
from services.runtime.rpc import Access, Admission, RpcBoundary
from services.runtime.settings import ServiceSettings
from services.runtime.tls import server_credentials

_STANDARD = (
    health_pb2.DESCRIPTOR.services_by_name["Health"],
    descriptor_pool.Default().FindServiceByName(reflection.SERVICE_NAME),
)
"""What every server serves, to everybody who has an identity."""

_log = get_logger()


@dataclass(frozen=True)
class Service:
    """One gRPC service to be served.

    Attributes:
        name: its full name.
        add: adds its servicer to a server.
        access: who may call, by name of a method.
        pool: has its descriptors.
        admissions: of unary methods by name, what may refuse a request before it is received.
        audited: of methods that change state by name, the action that the audit log has where who calls may not, by
            role; the other lines are written where it is done.
    """

    name: str
    add: Callable[[aio.Server], None]
    access: Mapping[str, Access]
    pool: DescriptorPool = field(default_factory=descriptor_pool.Default)
    admissions: Mapping[str, Admission] = field(default_factory=dict)
    audited: Mapping[str, str] = field(default_factory=dict)


@asynccontextmanager
async def listening(
    settings: ServiceSettings,
    own: Identity | Role,
    services: Sequence[Service],
    max_request_bytes: int = MAX_MESSAGE_BYTES,
    max_open_streams: int | None = None,
    admitted: int = 0,
    held_bytes: int | None = None,
) -> AsyncIterator[Readiness]:
    """Serves until the block is left, then drains: not ready, requests in flight finished, closed.

    Starts not ready, with health, reflection and /metrics. Writes the bound addresses to `settings.address_file`.

    Args:
        settings: of the service.
        own: whose certificate it must have, where there is TLS.
        services: what it serves beside health and reflection.
        max_request_bytes: largest request accepted.
        max_open_streams: of requests, that one caller may have open; None for as many as other RPCs.
        admitted: how many requests the services' admissions let wait.
        held_bytes: of requests in memory, of all callers; None for any number. What takes a stream of requests and
            answers with one message must not be served with a number: its requests count until the stream ends.

    Raises:
        OSError: an address cannot be bound.
        TlsError: the TLS files cannot be used, or are somebody else's.
    """
    access = {f"/{service.name}/{name}": roles for service in services for name, roles in service.access.items()}
    access |= {
        f"/{service.full_name}/{method.name}": frozenset(Role) for service in _STANDARD for method in service.methods
    }
    admissions = {
        f"/{service.name}/{name}": admit for service in services for name, admit in service.admissions.items()
    }
    audited = {f"/{service.name}/{name}": action for service in services for name, action in service.audited.items()}
    max_rpcs_per_second, max_open_rpcs = settings.max_rpcs_per_second, settings.max_open_rpcs
    boundary = RpcBoundary(
        access,
        admissions,
        audited,
        max_rpcs_per_second,
        max_open_rpcs,
        max_open_streams or max_open_rpcs,
        admitted,
        held_bytes,
    )
    server = aio.server(
        interceptors=[boundary],
        options=[*SERVER_OPTIONS, ("grpc.max_receive_message_length", max_request_bytes)],
    )
    names = [service.name for service in services]
    for service in services:
        service.add(server)
    readiness = Readiness(names)
    health_pb2_grpc.add_HealthServicer_to_server(readiness.servicer, server)
    await readiness.begin()
    files = [service.pool.FindFileContainingSymbol(service.name) for service in services]
    files += [service.file for service in _STANDARD]
    reflection.enable_server_reflection(
        (*names, *(service.full_name for service in _STANDARD)), server, _pool_of(files)
    )
    address = _bind(server, settings, own)
    host, _, port = settings.metrics_listen.rpartition(":")
    metrics = serve_metrics(host, int(port), settings.state_dir)
    await server.start()
    bound = {"grpc": address, "metrics": f"{host}:{metrics.server_port}"}
    async with probed(settings, readiness) as health:
        bound |= health
        if settings.address_file:
            write_atomically(settings.address_file, json.dumps(bound).encode())
        _log.info("listening", **bound)
        try:
            yield readiness
        finally:
            await readiness.set(False)
            draining = asyncio.ensure_future(server.stop(settings.drain_seconds))  # refuses new requests from here on
            await boundary.wait_idle(settings.drain_seconds)
            await server.stop(FAREWELL_SECONDS)
            await draining
            metrics.shutdown()
            metrics.server_close()
    _log.info("stopped")


async def run_until_stopped(*work: Coroutine[Any, Any, None], until_done: bool = False) -> None:
    """Runs work until SIGTERM or SIGINT, or until one part of it fails.

    Args:
        work: coroutines that go on for as long as the service lives.
        until_done: whether to return, too, when any of them has finished.

    Raises:
        Exception: the first failure of any of the work.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    stopped = asyncio.ensure_future(stop.wait())
    running: set[asyncio.Future[Any]] = {stopped, *(asyncio.ensure_future(coroutine) for coroutine in work)}
    try:
        while not stop.is_set():
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if until_done:
                break
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _pool_of(files: Iterable[FileDescriptor]) -> DescriptorPool:
    """Files and all that they import, in one pool."""
    pool = DescriptorPool()

    def add(file: FileDescriptor) -> None:
        for imported in file.dependencies:
            add(imported)
        pool.AddSerializedFile(file.serialized_pb)

    for file in files:
        add(file)
    return pool


def _bind(server: aio.Server, settings: ServiceSettings, own: Identity | Role) -> str:
    if settings.tls_dir is None:
        return bind("listen", settings.listen, server.add_insecure_port)
    credentials = server_credentials(settings.tls_dir, own)
    return bind("listen", settings.listen, lambda address: server.add_secure_port(address, credentials))
