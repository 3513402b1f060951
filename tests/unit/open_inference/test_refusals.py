"""Requests that are refused, and what their callers are told."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from feddymem.images import ImageError
from feddymem.openinference.open_inference_pb2 import (
    InferParameter,
    ModelMetadataRequest,
    ModelReadyRequest,
)
from services.inference.open_inference import OpenInferenceServicer
from services.runtime.errors import Refusal
from tests.unit.open_inference.fakes import CONTEXT, FakeInspector
from tests.unit.open_inference.requests import arrays, encoded, outputs


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"parameters": {"false_alarm_rate": InferParameter(string_param="few")}}, "false_alarm_rate is 'few'"),
        ({"outputs": outputs("regions")}, "set the parameter pixel_threshold"),
        ({"outputs": outputs("threshold")}, "set the parameter threshold"),
        ({"outputs": outputs("p_value")}, "without a calibration"),
        ({"parameters": {"threshold": InferParameter(bool_param=True)}}, "threshold is True"),
        ({"parameters": {"threshold": InferParameter(string_param="high")}}, "threshold is 'high'"),
        ({"parameters": {"threshold": InferParameter()}}, "threshold has no value"),
        ({"parameters": {"site": InferParameter(int64_param=3)}}, "site is 3"),
        ({"outputs": outputs("score", "heat")}, "'heat' does not exist"),
        ({"outputs": outputs("verdict")}, "set the parameter threshold"),
    ],
)
async def test_a_bad_parameter_or_output_is_invalid(
    servicer: OpenInferenceServicer, inspector: FakeInspector, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(Refusal, match=said) as caught:
        await servicer.ModelInfer(encoded(b"\1", **fields), CONTEXT)
    assert caught.value.status == grpc.StatusCode.INVALID_ARGUMENT
    assert inspector.seen == []


@pytest.mark.parametrize(("model", "version"), [("boats", ""), ("screws", "2"), ("screws", "latest")])
async def test_an_unknown_model_or_version_is_not_found(
    servicer: OpenInferenceServicer, model: str, version: str
) -> None:
    asked = encoded(b"\1")
    asked.model_name, asked.model_version = model, version
    with pytest.raises(Refusal) as caught:
        await servicer.ModelInfer(asked, CONTEXT)
    assert caught.value.status == grpc.StatusCode.NOT_FOUND
    assert (version or model) in caught.value.text
    assert not (await servicer.ModelReady(ModelReadyRequest(name=model, version=version), CONTEXT)).ready
    with pytest.raises(Refusal, match="check name and version"):
        await servicer.ModelMetadata(ModelMetadataRequest(name=model, version=version), CONTEXT)


async def test_one_bad_image_refuses_its_request_and_is_named_and_the_others_are_cancelled(
    servicer: OpenInferenceServicer, inspector: FakeInspector
) -> None:
    with pytest.raises(ImageError, match="image 1 of the request: image is not a readable"):
        await servicer.ModelInfer(encoded(b"\1", b"broken", b"\xff"), CONTEXT)
    await asyncio.sleep(0)
    assert inspector.cancelled == 1


async def test_maps_that_do_not_fit_into_a_response_are_refused_before_anything_is_computed(
    servicer: OpenInferenceServicer, inspector: FakeInspector
) -> None:
    """A map of 2048 x 2048 has 16 MiB."""
    fitting = encoded(*4 * [b"\1"], outputs=outputs("anomaly_map"))
    fitting.model_name = "bricks"
    assert arrays(await servicer.ModelInfer(fitting, CONTEXT))["anomaly_map"].shape[0] == 4
    inspector.seen.clear()
    for names in (["anomaly_map"], ["score", "anomaly_map"]):
        asked = encoded(*5 * [b"\1"], outputs=outputs(*names))
        asked.model_name = "bricks"
        said = "5 anomaly maps of 2048 x 2048 do not fit into a response; send at most 4 in a request"
        with pytest.raises(Refusal, match=said) as caught:
            await servicer.ModelInfer(asked, CONTEXT)
        assert caught.value.status == grpc.StatusCode.INVALID_ARGUMENT
    assert inspector.seen == []
    asked.outputs.pop()
    assert arrays(await servicer.ModelInfer(asked, CONTEXT))["score"].tolist() == [1] * 5
