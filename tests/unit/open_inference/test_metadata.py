"""What callers can learn of models, and other packages that speak the protocol."""

from __future__ import annotations

import pytest
from google.protobuf import descriptor_pool

from feddymem.openinference.open_inference_pb2 import (
    ModelMetadataRequest,
    ModelReadyRequest,
    RepositoryIndexRequest,
    ServerLiveRequest,
    ServerMetadataRequest,
    ServerReadyRequest,
)
from services.inference import tensors
from services.inference.open_inference import OpenInferenceServicer
from tests.unit.open_inference.fakes import CONTEXT


async def test_metadata_names_what_requests_may_have(servicer: OpenInferenceServicer) -> None:
    server = await servicer.ServerMetadata(ServerMetadataRequest(), CONTEXT)
    assert server.name == "feddymem"
    model = await servicer.ModelMetadata(ModelMetadataRequest(name="bricks", version="12"), CONTEXT)
    assert (model.name, list(model.versions), model.platform) == ("bricks", ["12"], "feddymem")
    assert [(i.name, i.datatype, list(i.shape)) for i in model.inputs] == [("image", "BYTES", [-1])]
    assert {o.name: o.datatype for o in model.outputs} == tensors.OUTPUT_TYPES
    index = await servicer.RepositoryIndex(RepositoryIndexRequest(), CONTEXT)
    assert [(m.name, m.version, m.state) for m in index.models] == [("bricks", "12", "READY"), ("screws", "3", "READY")]
    assert (await servicer.ServerLive(ServerLiveRequest(), CONTEXT)).live
    assert (await servicer.ServerReady(ServerReadyRequest(), CONTEXT)).ready
    assert (await servicer.ModelReady(ModelReadyRequest(name="screws"), CONTEXT)).ready


def test_other_packages_messages_of_the_same_names_have_room() -> None:
    """As tritonclient's, which take protobuf's default pool."""
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")
