"""Stands in for an aggregator or an edge client: publishes releases that a benchmark made."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from grpc import aio

from feddymem.calibration import Calibration
from feddymem.feature_space import FeatureSpace
from feddymem.v1.release_pb2 import RELEASE_KIND_GLOBAL_MEMORY, RELEASE_KIND_MEMORY_GENERATOR, Release
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import WireArray
from services.runtime.messages import calibration_to_message, feature_space_to_message
from services.runtime.publisher import Publisher


class Publishing:
    """A release server on a thread of its own: of global memories, or with a site of its memory generators."""

    def __init__(self, folder: Path, space: FeatureSpace, federation: str, site: str = "") -> None:
        self._arrays, self._space = ArrayStore(folder), space
        self._federation, self._site = federation, site
        self._loop = asyncio.new_event_loop()
        self._publisher = Publisher(self._arrays, frozenset(), lambda _who, _federation: False)  # no TLS: asks nobody
        self._previous: list[bytes] = []
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.address = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    async def _listen(self) -> str:
        self._server = aio.server()
        self._publisher.service.add(self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    def publish(
        self,
        version: int,
        arrays: list[WireArray],
        needs_generator: bool = False,
        calibration: Calibration | None = None,
    ) -> None:
        """Publishes a version."""
        for array in arrays:
            self._arrays.put(array.manifest.sha256, array.data)
        release = Release(
            federation=self._federation,
            version=version,
            kind=RELEASE_KIND_MEMORY_GENERATOR if self._site else RELEASE_KIND_GLOBAL_MEMORY,
            site=self._site,
            feature_space=feature_space_to_message(self._space),
            arrays=[array.manifest for array in arrays],
            needs_generator=needs_generator,
            calibration=None if calibration is None else calibration_to_message(calibration),
        )
        self._loop.call_soon_threadsafe(self._publisher.publish, release)

    def stop(self) -> None:
        """Stops serving."""
        asyncio.run_coroutine_threadsafe(self._server.stop(None), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
