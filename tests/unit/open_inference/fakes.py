"""What stands behind the adapter, and a call of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from grpc import aio

from feddymem.calibration import Limit
from feddymem.images import ImageError
from feddymem.maps import HeatScale, Region
from feddymem.verdicts import judge
from services.inference.inspector import Inspection, Result
from services.runtime.errors import not_found

SIZE = 4


@dataclass(frozen=True)
class FakeActive:
    """What the adapter looks at of an `Active`."""

    federation: str
    release: int
    input_size: int

    def limits(self, _site: str) -> None:
        return None

    @property
    def scorer(self) -> SimpleNamespace:
        space = SimpleNamespace(input_size=self.input_size)
        return SimpleNamespace(extractor=SimpleNamespace(feature_space=space))


class FakeRegistry:
    """Two federations, the second with a large input."""

    ready = True

    def active(self) -> list[FakeActive]:
        return [FakeActive("screws", 3, SIZE), FakeActive("bricks", 12, 2048)]

    def find(self, federation: str, site: str) -> FakeActive:
        for active in self.active():
            if active.federation == federation:
                return active
        raise not_found(f"this service has no federation {federation!r}")


class FakeInspector:
    """Scores an encoded image by its first byte, after so many turns of the event loop; refuses 'broken'."""

    def __init__(self) -> None:
        self.seen: list[Inspection] = []
        self.limit: Limit | None = None
        self.cancelled = 0

    async def inspect(self, inspection: Inspection) -> Result:
        self.seen.append(inspection)
        score = bytes(inspection.image.data)[0]
        try:
            for _ in range(score):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if inspection.image.data == b"broken":
            raise ImageError("image is not a readable JPEG")
        return Result(
            score=score,
            judgement=judge(score, self.limit, inspection.threshold),
            pixel_threshold=None,
            heat_scale=HeatScale(0.0, 1.0),
            regions=(Region(1, 2, 3, 4, 5, 6.5),) * (score - 1) if inspection.regions else (),
            float_map=np.full((SIZE, SIZE), score, np.float32) if inspection.map_kind == "float32" else None,
            png_map=None,
            height=1,
            width=1,
            federation=inspection.federation,
            site=inspection.site,
            release=3,
            queue_seconds=0.1,
            compute_seconds=0.1,
        )


class FakeContext:
    """A call from 10.0.0.7 with five seconds left.

    Args:
        port: of the caller's end of the connection.
    """

    def __init__(self, port: int = 50_000) -> None:
        self._port = port

    def peer(self) -> str:
        return f"ipv4:10.0.0.7:{self._port}"

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"transport_security_type": [b"insecure"]}

    def time_remaining(self) -> float:
        return 5.0


CONTEXT = cast(aio.ServicerContext[Any, Any], FakeContext())
