"""GRPCInferenceService of the Open Inference Protocol: a thin adapter over the inspector."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from grpc import aio

import feddymem
from feddymem.images import ImageError
from feddymem.openinference import open_inference_pb2, open_inference_pb2_grpc
from feddymem.openinference.open_inference_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelReadyRequest,
    ModelReadyResponse,
    ModelStreamInferResponse,
    RepositoryIndexRequest,
    RepositoryIndexResponse,
    ServerLiveRequest,
    ServerLiveResponse,
    ServerMetadataRequest,
    ServerMetadataResponse,
    ServerReadyRequest,
    ServerReadyResponse,
)
from services.inference import tensors
from services.inference.access import CALLERS
from services.inference.inspector import Inspection, Inspector, Result
from services.inference.outcomes import counted
from services.inference.registry import Registry
from services.inference.streams import answer_stream
from services.runtime.errors import Refusal, invalid, not_found
from services.runtime.rpc import caller_name
from services.runtime.server import Service

_Context = aio.ServicerContext[Any, Any]
_NAME = "feddymem"
_METHODS = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods

_MAX_IMAGES = 64
"""Images that one request may have."""
_MAX_MAP_BYTES = 64 * 2**20
"""Anomaly maps of one response, unless it is a single one: as much as a request may have by default. A response is held
several times while it is made; Triton's and KServe's clients would take 2 GiB."""


class OpenInferenceServicer(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves inspections to clients that know the Open Inference Protocol: a federation is a model.

    Args:
        inspector: inspects.
        registry: knows what there is to inspect with.
    """

    def __init__(self, inspector: Inspector, registry: Registry) -> None:
        self._inspector, self._registry = inspector, registry

    @property
    def service(self) -> Service:
        """What a server needs to serve this."""
        return Service(
            "inference.GRPCInferenceService",
            lambda server: open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, server),
            access=dict.fromkeys((method.name for method in _METHODS), CALLERS),
            pool=open_inference_pb2.DESCRIPTOR.pool,
            admissions={"ModelInfer": self._inspector.admit},
        )

    async def ServerLive(self, request: ServerLiveRequest, context: _Context) -> ServerLiveResponse:
        """See open_inference.proto."""
        return ServerLiveResponse(live=True)

    async def ServerReady(self, request: ServerReadyRequest, context: _Context) -> ServerReadyResponse:
        """See open_inference.proto."""
        return ServerReadyResponse(ready=self._registry.ready)

    async def ModelReady(self, request: ModelReadyRequest, context: _Context) -> ModelReadyResponse:
        """See open_inference.proto."""
        return ModelReadyResponse(ready=bool(self._releases(request.name, request.version)))

    async def ServerMetadata(self, request: ServerMetadataRequest, context: _Context) -> ServerMetadataResponse:
        """See open_inference.proto."""
        return ServerMetadataResponse(name=_NAME, version=feddymem.__version__)

    async def ModelMetadata(self, request: ModelMetadataRequest, context: _Context) -> ModelMetadataResponse:
        """See open_inference.proto."""
        releases = self._releases(request.name, request.version)
        if not releases:
            raise not_found(
                f"no release {request.version!r} of federation {request.name!r} is active here; check name and version"
            )
        return ModelMetadataResponse(
            name=request.name, versions=releases, platform=_NAME, inputs=tensors.INPUTS, outputs=tensors.OUTPUTS
        )

    async def RepositoryIndex(self, request: RepositoryIndexRequest, context: _Context) -> RepositoryIndexResponse:
        """See open_inference.proto."""
        names = sorted({(active.federation, active.release) for active in self._registry.active()})
        models = [
            RepositoryIndexResponse.ModelIndex(name=name, version=str(release), state="READY")
            for name, release in names
        ]
        return RepositoryIndexResponse(models=models)

    async def ModelInfer(self, request: ModelInferRequest, context: _Context) -> ModelInferResponse:
        """See open_inference.proto."""
        return await self._infer(request, context, patient=False)

    async def _infer(self, request: ModelInferRequest, context: _Context, patient: bool) -> ModelInferResponse:
        wanted, images = tensors.wanted_outputs(request), tensors.images(request, _MAX_IMAGES)
        first = Inspection(
            image=images[0],
            federation=request.model_name,
            site=tensors.site(request),
            map_kind="float32" if "anomaly_map" in wanted else "none",
            threshold=tensors.number(request, "threshold"),
            pixel_threshold=tensors.number(request, "pixel_threshold"),
            false_alarm_rate=tensors.number(request, "false_alarm_rate"),
            regions="regions" in wanted,
            caller=caller_name(context),
            seconds_left=context.time_remaining(),
            patient=patient,
        )
        # A request is refused by its first image, before any is computed.
        others = [dataclasses.replace(first, image=image, patient=True) for image in images[1:]]
        results = await self._inspect([first, *others], wanted, request.model_version)
        return _response(request.id, wanted or tensors.usual_outputs(results), results)

    def ModelStreamInfer(
        self, request_iterator: AsyncIterator[ModelInferRequest], context: _Context
    ) -> AsyncIterator[ModelStreamInferResponse]:
        """See open_inference.proto."""

        async def answer(request: ModelInferRequest) -> ModelStreamInferResponse:
            return ModelStreamInferResponse(infer_response=await self._infer(request, context, patient=True))

        return answer_stream(request_iterator, answer, _refused)

    async def _inspect(self, inspections: Sequence[Inspection], wanted: Sequence[str], version: str) -> list[Result]:
        """Inspects all images of a request, all of them with one release."""
        # The tasks find their release in one turn of the event loop, in which no swap comes between them.
        tasks = [
            asyncio.create_task(self._inspect_one(number, inspections, wanted, version))
            for number in range(len(inspections))
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _inspect_one(
        self, number: int, inspections: Sequence[Inspection], wanted: Sequence[str], version: str
    ) -> Result:
        inspection = inspections[number]
        with counted() as ending:
            active = self._registry.find(inspection.federation, inspection.site)
            if version not in ("", str(active.release)):
                raise not_found(
                    f"model_version is {version!r}, but release {active.release} of federation {active.federation!r} "
                    "is active; leave it empty for the active one"
                )
            tensors.require_known(wanted, inspection, active.limits(inspection.site) is not None)
            if inspection.map_kind == "float32":
                _require_room_for_maps(len(inspections), active.scorer.extractor.feature_space.input_size)
            try:
                result = await self._inspector.inspect(inspection)
            except ImageError as error:
                raise ImageError(f"image {number} of the request: {error}") from error
            ending.anomalous = result.anomalous
            return result

    def _releases(self, federation: str, version: str) -> list[str]:
        """Active releases of a federation, or the one of a version; several only while a swap is on its way."""
        found = {active.release for active in self._registry.active() if active.federation == federation}
        return [str(release) for release in sorted(found) if version in ("", str(release))]


def _require_room_for_maps(count: int, size: int) -> None:
    most = max(1, _MAX_MAP_BYTES // (size * size * np.dtype(np.float32).itemsize))
    if count > most:
        raise invalid(
            f"{count} anomaly maps of {size} x {size} do not fit into a response; send at most {most} in a "
            "request, or leave the output 'anomaly_map' out"
        )


def _refused(request: ModelInferRequest, refusal: Refusal) -> ModelStreamInferResponse:
    return ModelStreamInferResponse(
        error_message=f"{refusal.status.name}: {refusal.text}", infer_response=ModelInferResponse(id=request.id)
    )


def _response(request_id: str, wanted: Sequence[str], results: Sequence[Result]) -> ModelInferResponse:
    response = ModelInferResponse(
        model_name=results[0].federation, model_version=str(results[0].release), id=request_id
    )
    for name in wanted:
        values = tensors.output_array(name, results)
        response.outputs.add(name=name, datatype=tensors.OUTPUT_TYPES[name], shape=values.shape)
        response.raw_output_contents.append(values.tobytes())
    return response
