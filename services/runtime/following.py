"""Following somebody else's releases: what is wrong with one of them holds up no other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from grpc import aio

from feddymem.client.tls import TlsError
from feddymem.v1 import release_pb2_grpc
from feddymem.v1.release_pb2 import (
    RELEASE_KIND_GLOBAL_MEMORY,
    RELEASE_KIND_MEMORY_GENERATOR,
    Release,
    ReleaseKind,
    WatchReleasesRequest,
)
from services.runtime import metrics, tracing
from services.runtime.array_store import ArrayStore
from services.runtime.backoff import Backoff
from services.runtime.changes import Changes
from services.runtime.channels import connected
from services.runtime.errors import Refusal, as_refusal, precondition
from services.runtime.identity import Role
from services.runtime.logs import get_logger
from services.runtime.publisher import download
from services.runtime.server_identity import UnreachableError
from services.runtime.settings import ClientSettings
from services.runtime.watching import watched

WATCH_SECONDS = 60
"""Silence after which a watch of releases is begun anew."""

_KINDS = {Role.AGGREGATOR: RELEASE_KIND_GLOBAL_MEMORY, Role.SITE: RELEASE_KIND_MEMORY_GENERATOR}
"""What a publisher may send: no site may say what scores at another one."""

Receive = Callable[[Release], Awaitable[None]]
"""Takes a release whose arrays are in the store."""

_log = get_logger()


async def follow(
    address: str,
    federations: tuple[str, ...],
    arrays: ArrayStore,
    settings: ClientSettings,
    role: Role,
    receive: Receive,
) -> None:
    """Watches a publisher for ever: downloads the arrays of each release that comes, then hands it over.

    Goes on where it was when the publisher or the line is gone for a while. With TLS the publisher must have the role,
    and a site be the own one. An aggregator's global memories are taken, and a site's memory generators; nothing else.

    Args:
        address: HOST:PORT of the publisher.
        federations: whose releases; empty for all.
        arrays: where the arrays go.
        settings: of this service.
        role: of the publisher.
        receive: is called for one release at a time; one that fails is tried again.
    """
    backoff = Backoff(settings)
    metrics.PUBLISHERS.labels(role.value)
    while True:
        try:
            async with connected(address, settings, role) as channel:
                stub = release_pb2_grpc.ReleaseServiceStub(channel)
                follower = _Follower(address, stub, arrays, settings, _KINDS[role], receive)
                with metrics.connected_to(role):
                    await follower.run(WatchReleasesRequest(federations=federations))
        except (UnreachableError, TlsError) as error:
            _log.warning("publisher_unreachable", publisher=address, reason=str(error))
        except Exception as error:  # noqa: BLE001 - what scores goes on scoring, whatever comes
            _log.error("watch_failed", publisher=address, exc_info=error)
        await backoff.pause()


class _Place:
    """Where a release takes the place of the one before: a federation's global memory, the one in its shadow,
    or a site's memory generator."""

    def __init__(self) -> None:
        self._newest = self._done = Release()
        self._changes = Changes()

    def put(self, release: Release) -> None:
        """A release that has come; the one before is left out if it has not been begun."""
        if release != self._newest:  # a watch that is begun anew repeats it
            self._newest = release
            self._changes.notify()

    async def next(self) -> Release:
        """The newest release, once it is not done."""
        while self._newest is self._done:
            await self._changes.wait()
        return self._newest

    def done(self, release: Release) -> None:
        """Says that a release need not be tried again."""
        self._done = release


class _Follower:
    """One watch of a publisher, and what it brings."""

    def __init__(
        self,
        publisher: str,
        stub: release_pb2_grpc.ReleaseServiceAsyncStub,
        arrays: ArrayStore,
        settings: ClientSettings,
        kind: ReleaseKind.ValueType,
        receive: Receive,
    ) -> None:
        self._publisher, self._stub, self._arrays, self._settings = publisher, stub, arrays, settings
        self._kind, self._receive = kind, receive
        self._receiving = asyncio.Lock()

    async def run(self, request: WatchReleasesRequest) -> None:
        """Follows until the watch breaks; each place has a task of its own, so that none waits for another."""
        async with asyncio.TaskGroup() as group:
            tasks: list[asyncio.Task[None]] = []
            places: dict[tuple[str, int, str, bool], _Place] = {}
            try:
                async for release in self._releases(request):
                    name = release.federation, release.kind, release.site, release.shadow
                    if name not in places:
                        places[name] = _Place()
                        tasks.append(group.create_task(self._take_all(places[name])))
                    places[name].put(release)
            except Exception as error:  # noqa: BLE001 - as above
                self._tell(error)
            async with self._receiving:  # what is being received is: on a bad line there might never be time for it
                for task in tasks:
                    task.cancel()

    async def _releases(self, request: WatchReleasesRequest) -> AsyncIterator[Release]:
        messages = watched(self._stub.WatchReleases, request, WATCH_SECONDS)
        async with aclosing(messages):
            async for message in messages:
                if message is None:
                    continue
                if message.release.kind == self._kind:
                    yield message.release
                else:
                    self._tell(_foreign(message.release.kind, self._kind), message.release)

    async def _take_all(self, place: _Place) -> None:
        backoff = Backoff(self._settings)
        while True:
            release = await place.next()
            try:
                with tracing.span("release", root=True, federation=release.federation, release=release.version):
                    await download(self._stub, release.arrays, self._arrays, self._settings)
                    async with self._receiving:
                        await self._receive(release)
            except Exception as error:  # noqa: BLE001 - as above
                self._tell(error, release)
                await backoff.pause()
            else:
                place.done(release)

    def _tell(self, error: Exception, release: Release | None = None) -> None:
        """Logs why the watch ended or, where there is a release, why that is tried again."""
        what = {} if release is None else {"federation": release.federation, "site": release.site}
        log, refusal = _log.bind(publisher=self._publisher, **what), as_refusal(error)
        if isinstance(error, aio.AioRpcError):
            event = "watch_interrupted" if release is None else "download_interrupted"
            log.warning(event, code=error.code().name, details=error.details())
        elif refusal is None:
            log.error("release_failed", exc_info=error)
        else:
            log.error("release_refused", reason=refusal.text)


def _foreign(kind: int, expected: ReleaseKind.ValueType) -> Refusal:
    return precondition(
        f"the release is of kind {kind}, and this publisher may send {ReleaseKind.Name(expected)} ({expected}) only; "
        "check that `aggregator` and `edge_clients` name what they should"
    )
