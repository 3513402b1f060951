"""InspectionService: a thin adapter over the inspector."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from grpc import aio

from feddymem.image_data import EncodedImage, RawImage
from feddymem.maps import MapKind
from feddymem.v1 import inspection_pb2_grpc
from feddymem.v1.inspection_pb2 import (
    MAP_FORMAT_FLOAT32,
    MAP_FORMAT_PNG,
    MAP_FORMAT_UNSPECIFIED,
    VERDICT_ANOMALOUS,
    VERDICT_NORMAL,
    VERDICT_UNSPECIFIED,
    AnomalyMap,
    GetInspectionStatusRequest,
    GetInspectionStatusResponse,
    InspectError,
    InspectRequest,
    InspectResponse,
    InspectStreamRequest,
    InspectStreamResponse,
    MapFormat,
    Region,
    ReportFeedbackRequest,
    ReportFeedbackResponse,
)
from services.inference.access import CALLERS
from services.inference.feedback import FeedbackForwarder
from services.inference.inspector import Inspection, Inspector, Result
from services.inference.lines import guarantee
from services.inference.outcomes import counted
from services.inference.registry import Registry
from services.inference.scoring_status import scoring
from services.inference.streams import answer_stream
from services.runtime.errors import Refusal, invalid
from services.runtime.rpc import caller_name
from services.runtime.server import Service

_MAP_KINDS: dict[MapFormat.ValueType, MapKind] = {
    MAP_FORMAT_UNSPECIFIED: "none",
    MAP_FORMAT_FLOAT32: "float32",
    MAP_FORMAT_PNG: "png",
}
_Context = aio.ServicerContext[Any, Any]


class InspectionServicer(inspection_pb2_grpc.InspectionServiceServicer):
    """Serves inspections, and takes what people say of them."""

    def __init__(self, inspector: Inspector, registry: Registry, feedback: FeedbackForwarder) -> None:
        self._inspector, self._registry, self._feedback = inspector, registry, feedback

    @property
    def service(self) -> Service:
        """What a server needs to serve this."""
        return Service(
            "feddymem.v1.InspectionService",
            lambda server: inspection_pb2_grpc.add_InspectionServiceServicer_to_server(self, server),
            access=dict.fromkeys(("Inspect", "InspectStream", "ReportFeedback", "GetInspectionStatus"), CALLERS),
            admissions={"Inspect": self._inspector.admit},
        )

    async def Inspect(self, request: InspectRequest, context: _Context) -> InspectResponse:
        """See inspection.proto."""
        return await self._inspect(request, context, patient=False)

    def InspectStream(
        self, request_iterator: AsyncIterator[InspectStreamRequest], context: _Context
    ) -> AsyncIterator[InspectStreamResponse]:
        """See inspection.proto."""

        async def answer(request: InspectStreamRequest) -> InspectStreamResponse:
            return InspectStreamResponse(
                id=request.id, result=await self._inspect(request.inspect, context, patient=True)
            )

        return answer_stream(request_iterator, answer, _refused)

    async def ReportFeedback(self, request: ReportFeedbackRequest, _context: _Context) -> ReportFeedbackResponse:
        """See inspection.proto."""
        return ReportFeedbackResponse(image=await self._feedback.report(request))

    async def GetInspectionStatus(
        self, request: GetInspectionStatusRequest, _context: _Context
    ) -> GetInspectionStatusResponse:
        """See inspection.proto."""
        return GetInspectionStatusResponse(scoring=scoring(self._registry.active(), request.federation))

    async def _inspect(self, request: InspectRequest, context: _Context, patient: bool) -> InspectResponse:
        with counted() as ending:
            inspection = _inspection(request, caller_name(context), context.time_remaining(), patient)
            result = await self._inspector.inspect(inspection)
            ending.anomalous = result.anomalous
            return _response(result)


def _refused(request: InspectStreamRequest, refusal: Refusal) -> InspectStreamResponse:
    code: int = refusal.status.value[0]
    return InspectStreamResponse(id=request.id, error=InspectError(code=code, message=refusal.text))


def _inspection(request: InspectRequest, caller: str, seconds_left: float | None, patient: bool) -> Inspection:
    if request.map_format not in _MAP_KINDS:
        raise invalid(f"map_format is {request.map_format}; expected UNSPECIFIED (0), FLOAT32 (1) or PNG (2)")
    return Inspection(
        image=_image(request),
        federation=request.federation,
        site=request.site,
        map_kind=_MAP_KINDS[request.map_format],
        threshold=request.threshold if request.HasField("threshold") else None,
        pixel_threshold=request.pixel_threshold if request.HasField("pixel_threshold") else None,
        false_alarm_rate=request.false_alarm_rate if request.HasField("false_alarm_rate") else None,
        regions=request.regions,
        caller=caller,
        seconds_left=seconds_left,
        patient=patient,
    )


def _image(request: InspectRequest) -> EncodedImage | RawImage:
    kind = request.WhichOneof("image")
    if kind == "encoded":
        return EncodedImage(request.encoded)
    if kind == "raw":
        raw = request.raw
        if raw.bits not in (8, 16):
            raise invalid(f"raw image has {raw.bits} bits; expected 8 or 16")
        return RawImage(raw.data, raw.height, raw.width, raw.channels, raw.bits)
    raise invalid("the request has no image; set `encoded` or `raw`")


def _response(result: Result) -> InspectResponse:
    verdict = VERDICT_UNSPECIFIED
    if result.anomalous is not None:
        verdict = VERDICT_ANOMALOUS if result.anomalous else VERDICT_NORMAL
    judgement = result.judgement
    return InspectResponse(
        score=result.score,
        map=_map(result),
        federation=result.federation,
        site=result.site,
        release=result.release,
        queue_seconds=result.queue_seconds,
        compute_seconds=result.compute_seconds,
        verdict=verdict,
        regions=[Region(**dataclasses.asdict(region)) for region in result.regions],
        threshold=None if judgement is None else judgement.threshold,
        pixel_threshold=result.pixel_threshold,
        normalised_score=None if judgement is None else judgement.normalised,
        p_value=None if judgement is None else judgement.p_value,
        guarantee=None if judgement is None or judgement.limit is None else guarantee(judgement.limit),
    )


def _map(result: Result) -> AnomalyMap | None:
    scale = {"first_colour": result.heat_scale.first, "last_colour": result.heat_scale.last}
    if result.float_map is not None:
        height, width = result.float_map.shape
        data = result.float_map.astype("<f4", copy=False).tobytes()
        return AnomalyMap(format=MAP_FORMAT_FLOAT32, height=height, width=width, data=data, **scale)
    if result.png_map is not None:
        height, width = result.height, result.width
        return AnomalyMap(format=MAP_FORMAT_PNG, height=height, width=width, data=result.png_map, **scale)
    return None
