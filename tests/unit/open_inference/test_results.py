"""From a request to inspections, and from their results to a response."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest

from feddymem.calibration import Limit
from feddymem.openinference.open_inference_pb2 import (
    InferParameter,
    ModelInferRequest,
)
from services.inference.open_inference import OpenInferenceServicer
from services.runtime.errors import Refusal
from tests.unit.open_inference.fakes import CONTEXT, SIZE, FakeActive, FakeInspector, FakeRegistry
from tests.unit.open_inference.requests import arrays, encoded, outputs


@pytest.mark.parametrize(
    "value",
    [
        InferParameter(double_param=2),
        InferParameter(int64_param=2),
        InferParameter(uint64_param=2),
        InferParameter(string_param="2.0"),
    ],
)
async def test_a_threshold_of_any_numeric_type_gives_a_verdict(
    servicer: OpenInferenceServicer, value: InferParameter
) -> None:
    answer = await servicer.ModelInfer(encoded(b"\1", b"\2", parameters={"threshold": value}), CONTEXT)
    assert {name: values.tolist() for name, values in arrays(answer).items()} == {
        "score": [1, 2],
        "verdict": [False, True],
    }


async def test_a_calibrated_release_has_verdicts_and_what_they_rest_on(
    servicer: OpenInferenceServicer, inspector: FakeInspector, calibrated: Limit
) -> None:
    rate = {"false_alarm_rate": InferParameter(string_param="0.2"), "pixel_threshold": InferParameter(double_param=3)}
    usual = await servicer.ModelInfer(encoded(b"\1", b"\2", parameters=rate), CONTEXT)
    assert {name: values.tolist() for name, values in arrays(usual).items()} == {
        "score": [1, 2],
        "verdict": [False, True],
    }
    [first, second] = inspector.seen
    assert (first.false_alarm_rate, first.pixel_threshold, first.regions) == (0.2, 3, False)
    assert (second.false_alarm_rate, second.patient) == (0.2, True)
    named = ("p_value", "threshold", "normalised_score", "verdict")
    found = arrays(await servicer.ModelInfer(encoded(b"\1", b"\2", outputs=outputs(*named)), CONTEXT))
    assert tuple(found) == named
    np.testing.assert_allclose(found["p_value"], [1, 1 / 41], rtol=1e-6)
    np.testing.assert_allclose(found["threshold"], [calibrated.threshold] * 2, rtol=1e-6)
    np.testing.assert_allclose(found["normalised_score"], [calibrated.normalised(1), 1], rtol=1e-6)


@pytest.mark.usefixtures("calibrated")
async def test_regions_say_which_image_they_are_of(servicer: OpenInferenceServicer) -> None:
    answer = await servicer.ModelInfer(encoded(b"\1", b"\2", b"\3", outputs=outputs("regions")), CONTEXT)
    row = [1, 2, 3, 4, 5, 6.5]
    assert arrays(answer)["regions"].tolist() == [[1, *row], [2, *row], [2, *row]]
    none = await servicer.ModelInfer(encoded(b"\1", outputs=outputs("regions")), CONTEXT)
    assert list(none.outputs[0].shape) == [0, 7]


async def test_a_request_becomes_inspections_of_its_caller(
    servicer: OpenInferenceServicer, inspector: FakeInspector
) -> None:
    parameters = {
        "site": InferParameter(string_param="hall"),
        "threshold": InferParameter(double_param=0.5),
        "priority": InferParameter(uint64_param=1),
    }
    asked = encoded(b"\1", b"\2", parameters=parameters, outputs=outputs("anomaly_map", "score"), id="part-9")
    answer = await servicer.ModelInfer(asked, CONTEXT)
    for inspection in inspector.seen:
        assert (inspection.federation, inspection.site, inspection.threshold) == ("screws", "hall", 0.5)
        assert (inspection.map_kind, inspection.caller, inspection.seconds_left) == ("float32", "ipv4:10.0.0.7", 5.0)
    assert (answer.model_name, answer.model_version, answer.id) == ("screws", "3", "part-9")
    assert [output.name for output in answer.outputs] == ["anomaly_map", "score"]
    assert arrays(answer)["anomaly_map"].shape == (2, SIZE, SIZE)
    assert arrays(answer)["anomaly_map"][:, 0, 0].tolist() == [1, 2]


async def test_a_single_map_is_given_whatever_its_size(
    servicer: OpenInferenceServicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRegistry, "active", lambda _self: [FakeActive("screws", 3, 8192)])
    answer = await servicer.ModelInfer(encoded(b"\1", outputs=outputs("anomaly_map")), CONTEXT)
    assert [output.name for output in answer.outputs] == ["anomaly_map"]
    with pytest.raises(Refusal, match="at most 1 in a request"):
        await servicer.ModelInfer(encoded(b"\1", b"\2", outputs=outputs("anomaly_map")), CONTEXT)


async def test_only_the_score_comes_where_nothing_is_asked_for(
    servicer: OpenInferenceServicer, inspector: FakeInspector
) -> None:
    answer = await servicer.ModelInfer(encoded(b"\7"), CONTEXT)
    assert [output.name for output in answer.outputs] == ["score"]
    assert inspector.seen[0].map_kind == "none"


async def test_a_stream_keeps_its_order_and_goes_on_after_a_bad_request(servicer: OpenInferenceServicer) -> None:
    # The fake is slower with larger bytes: without an order the answers would come backwards.
    images = [bytes([40 - n]) for n in range(20)]
    images[3] = b"broken"

    async def requests() -> AsyncIterator[ModelInferRequest]:
        for n, image in enumerate(images):
            yield encoded(image, id=str(n))

    answers = [answer async for answer in servicer.ModelStreamInfer(requests(), CONTEXT)]
    assert [answer.infer_response.id for answer in answers] == [str(n) for n in range(20)]
    bad = answers.pop(3)
    assert bad.error_message == "INVALID_ARGUMENT: image 0 of the request: image is not a readable JPEG"
    assert not any(answer.error_message for answer in answers)
