"""The inference service's RPCs: a thin adapter over registry and batcher."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import cv2
import grpc
from grpc import aio

from feddymem.images import ImageError, Pixels, decode, from_raw
from feddymem.scoring import anomaly_map, heatmap
from feddymem.v1 import inspection_pb2_grpc
from feddymem.v1.inspection_pb2 import (
    MAP_FORMAT_FLOAT32,
    MAP_FORMAT_PNG,
    MAP_FORMAT_UNSPECIFIED,
    AnomalyMap,
    InspectError,
    InspectRequest,
    InspectResponse,
    InspectStreamRequest,
    InspectStreamResponse,
    MapFormat,
)
from services.inference import metrics
from services.inference.batcher import Batcher, Timed
from services.inference.registry import Active, Registry
from services.runtime.errors import Refusal, as_refusal, invalid
from services.runtime.server import Service

_STREAM_WINDOW = 8
"""Images of one stream in work at once."""


class InspectionServicer(inspection_pb2_grpc.InspectionServiceServicer):
    """Serves inspections."""

    def __init__(self, registry: Registry, batcher: Batcher, max_pixels: int) -> None:
        self._registry, self._batcher, self._max_pixels = registry, batcher, max_pixels

    @property
    def service(self) -> Service:
        """What a server needs to serve this."""
        return Service(
            "feddymem.v1.InspectionService",
            lambda server: inspection_pb2_grpc.add_InspectionServiceServicer_to_server(self, server),
        )

    async def Inspect(self, request: InspectRequest, context: aio.ServicerContext[Any, Any]) -> InspectResponse:
        """See inspection.proto."""
        try:
            response = await self._inspect(request)
        except BaseException as error:
            metrics.INSPECTIONS.labels(_outcome(error)).inc()
            raise
        metrics.INSPECTIONS.labels("ok").inc()
        return response

    async def InspectStream(
        self, request_iterator: AsyncIterator[InspectStreamRequest], context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[InspectStreamResponse]:
        """See inspection.proto."""
        window: asyncio.Queue[asyncio.Task[InspectStreamResponse] | None] = asyncio.Queue(_STREAM_WINDOW)

        async def read() -> None:
            try:
                async for request in request_iterator:
                    await window.put(asyncio.create_task(self._inspect_one(request, context)))
            finally:
                await window.put(None)

        reader = asyncio.create_task(read())
        try:
            while (task := await window.get()) is not None:
                yield await task
            await reader
        finally:
            reader.cancel()
            while not window.empty():
                if (task := window.get_nowait()) is not None:
                    task.cancel()

    async def _inspect_one(
        self, request: InspectStreamRequest, context: aio.ServicerContext[Any, Any]
    ) -> InspectStreamResponse:
        try:
            return InspectStreamResponse(id=request.id, result=await self.Inspect(request.inspect, context))
        except (Refusal, ImageError) as error:
            refusal = as_refusal(error)
            assert refusal is not None
            code: int = refusal.status.value[0]
            return InspectStreamResponse(id=request.id, error=InspectError(code=code, message=refusal.text))

    async def _inspect(self, request: InspectRequest) -> InspectResponse:
        if request.map_format not in (MAP_FORMAT_UNSPECIFIED, MAP_FORMAT_FLOAT32, MAP_FORMAT_PNG):
            raise invalid(f"map_format is {request.map_format}; expected UNSPECIFIED (0), FLOAT32 (1) or PNG (2)")
        decoder = self._decoder(request)
        active = self._registry.find(request.federation, request.site)
        timed = await self._batcher.inspect(active, decoder)
        anomalies = None
        if request.map_format != MAP_FORMAT_UNSPECIFIED:
            anomalies = await asyncio.to_thread(_map, request.map_format, active, timed)
        return InspectResponse(
            score=timed.inspection.score,
            map=anomalies,
            federation=active.federation,
            site=request.site or active.site,
            release=active.release,
            queue_seconds=timed.queue_seconds,
            compute_seconds=timed.compute_seconds,
        )

    def _decoder(self, request: InspectRequest) -> Callable[[], Pixels]:
        kind = request.WhichOneof("image")
        if kind == "encoded":
            return partial(decode, request.encoded, self._max_pixels)
        if kind == "raw":
            raw = request.raw
            return partial(from_raw, raw.data, raw.height, raw.width, raw.channels, raw.bits, self._max_pixels)
        raise invalid("the request has no image; set `encoded` or `raw`")


def _map(form: MapFormat.ValueType, active: Active, timed: Timed) -> AnomalyMap:
    distances = timed.inspection.distances
    if form == MAP_FORMAT_FLOAT32:
        size = active.scorer.extractor.feature_space.input_size
        values = anomaly_map(distances, (size, size))
        return AnomalyMap(format=form, height=size, width=size, data=values.astype("<f4").tobytes())
    values = anomaly_map(distances, (timed.height, timed.width))
    colours = heatmap(values, active.scorer.typical_distance)
    _, png = cv2.imencode(".png", cv2.cvtColor(colours, cv2.COLOR_RGB2BGR))
    return AnomalyMap(format=form, height=timed.height, width=timed.width, data=png.tobytes())


def _outcome(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    refusal = as_refusal(error) if isinstance(error, Exception) else None
    if refusal is None:
        return "failed"
    return (
        "rejected" if refusal.status in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE) else "invalid"
    )
