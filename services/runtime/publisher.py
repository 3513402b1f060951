"""Publish and watch: serving releases, and downloading somebody else's, see `services.runtime.following`.

A push to a Kubernetes Service reaches one replica only; so releases are published on a stream that every
inference pod watches. Aggregator and edge client publish in the same way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import grpc
from grpc import aio

from feddymem.v1 import release_pb2_grpc
from feddymem.v1.array_pb2 import Array
from feddymem.v1.release_pb2 import (
    DownloadArrayRequest,
    DownloadArrayResponse,
    Release,
    WatchReleasesRequest,
    WatchReleasesResponse,
)
from services.runtime import metrics
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import CHUNK_BYTES, check_manifest
from services.runtime.changes import Changes
from services.runtime.errors import Refusal, not_found
from services.runtime.identity import Identity, Role, caller, denied
from services.runtime.logs import get_logger
from services.runtime.server import Service
from services.runtime.settings import ClientSettings

MAX_ARRAY_BYTES = 2**30
"""Largest array that a receiver of releases accepts."""
_NAMED = 10
"""Federations that a log line names, at most: their names come from who calls."""

_log = get_logger()


class Publisher(release_pb2_grpc.ReleaseServiceServicer):
    """Serves the current release of each federation, and the one in its shadow, with their arrays.

    Args:
        arrays: where the arrays are; others in it are not served.
        roles: of whom the releases are for.
        may_read: whether somebody of these roles may read a federation's releases.
    """

    def __init__(self, arrays: ArrayStore, roles: frozenset[Role], may_read: Callable[[Identity, str], bool]) -> None:
        self._arrays, self._roles, self._may_read = arrays, roles, may_read
        self._served: dict[str, frozenset[bytes]] = {}
        self._current: dict[tuple[str, bool], Release] = {}
        self._changes = Changes()

    def publish(self, release: Release, others: Iterable[Release] = ()) -> None:
        """Makes a release the current one of its federation or, where it is one, the one in its shadow; its arrays are
        in the store already.

        Args:
            release: the release.
            others: of the federation, whose arrays are served, too.
        """
        self._current[release.federation, release.shadow] = release
        self.serve(release.federation, others)

    def serve(self, federation: str, others: Iterable[Release]) -> None:
        """Serves the arrays of a federation's current releases and of these others, and of no more."""
        current = (release for (name, _), release in self._current.items() if name == federation)
        self._served[federation] = frozenset(array.sha256 for each in (*current, *others) for array in each.arrays)
        self._changes.notify()

    @property
    def service(self) -> Service:
        """What a server needs to serve this."""
        return Service(
            "feddymem.v1.ReleaseService",
            lambda server: release_pb2_grpc.add_ReleaseServiceServicer_to_server(self, server),
            access=dict.fromkeys(("WatchReleases", "DownloadArray"), self._roles),
        )

    async def WatchReleases(
        self, request: WatchReleasesRequest, context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[WatchReleasesResponse]:
        """See release.proto."""
        who = caller(context)
        self._require_some_readable(who, request.federations)
        sent: dict[tuple[str, bool], Release] = {}
        while True:
            for (federation, shadow), release in sorted(self._current.items(), key=lambda item: item[0]):
                if request.federations and federation not in request.federations:
                    continue
                if not self._readable(who, federation):
                    continue
                if sent.get((federation, shadow)) is not release:
                    sent[federation, shadow] = release
                    yield WatchReleasesResponse(release=release)
                    break
            else:
                await self._changes.wait()

    async def DownloadArray(
        self, request: DownloadArrayRequest, context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[DownloadArrayResponse]:
        """See release.proto."""
        who = caller(context)
        federations = (name for name, served in self._served.items() if request.sha256 in served)
        federation = next((name for name in federations if self._readable(who, name)), None)
        if federation is None:
            raise not_found(f"no release that you may read has an array {request.sha256.hex()}; watch releases again")
        size = await asyncio.to_thread(self._arrays.size_bytes, request.sha256)
        if request.offset > size:
            raise Refusal(grpc.StatusCode.OUT_OF_RANGE, f"offset {request.offset} is behind the array's {size} bytes")
        sent = metrics.PUBLISHED_BYTES.labels(federation)
        for start in range(request.offset, size, CHUNK_BYTES):  # who does not read on holds up one chunk's memory
            yield DownloadArrayResponse(chunk=await asyncio.to_thread(self._arrays.chunk, request.sha256, start))
            sent.inc(min(CHUNK_BYTES, size - start))

    def _require_some_readable(self, who: Identity | None, federations: Sequence[str]) -> None:
        """One federation that is closed to a site, or not there yet, must not cost it the releases of the others."""
        closed = [name for name in federations if not self._readable(who, name)]
        if closed and len(closed) == len(federations):
            named = ", ".join(map(repr, closed))
            raise denied(f"the certificate is that of {who}, who may not read releases of {named}")
        if closed:
            _log.warning("releases_not_readable", who=str(who), federations=[name[:63] for name in closed[:_NAMED]])

    def _readable(self, who: Identity | None, federation: str) -> bool:
        return who is None or self._may_read(who, federation)


async def download(
    stub: release_pb2_grpc.ReleaseServiceAsyncStub,
    manifests: Iterable[Array],
    arrays: ArrayStore,
    settings: ClientSettings,
) -> None:
    """Fetches those arrays that are not in the store yet, each from where an interrupted download stopped.

    Raises:
        Refusal: a manifest or a chunk that is off.
        grpc.aio.AioRpcError: the line broke or the time is up; what has arrived is kept.
    """
    manifest: Array
    for manifest in manifests:
        check_manifest(manifest, MAX_ARRAY_BYTES)
        if manifest.sha256 in arrays:
            continue
        request = DownloadArrayRequest(sha256=manifest.sha256, offset=arrays.held_bytes(manifest))
        async for response in stub.DownloadArray(request, timeout=settings.transfer_timeout_seconds):
            arrays.append(manifest, response.chunk)
