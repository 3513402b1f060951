"""The Open Inference Protocol's adapter: what a request's tensors become, and what results become."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from grpc import aio
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from feddymem.calibration import Limit, Normals
from feddymem.image_data import EncodedImage, RawImage
from feddymem.images import ImageError
from feddymem.maps import HeatScale, Region
from feddymem.openinference.open_inference_pb2 import (
    InferParameter,
    InferTensorContents,
    ModelInferRequest,
    ModelInferResponse,
    ModelMetadataRequest,
    ModelReadyRequest,
    RepositoryIndexRequest,
    ServerLiveRequest,
    ServerMetadataRequest,
    ServerReadyRequest,
)
from feddymem.sketch import ScoreSketch
from feddymem.verdicts import SiteLimits, judge
from services.inference import tensors
from services.inference.inspector import Inspection, Inspector, Result
from services.inference.open_inference import OpenInferenceServicer
from services.inference.registry import Registry
from services.runtime.errors import Refusal, not_found

MOST = 5
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
    """A call of `line-7` with five seconds left."""

    def peer(self) -> str:
        return "line-7"

    def time_remaining(self) -> float:
        return 5.0


@pytest.fixture
def inspector() -> FakeInspector:
    return FakeInspector()


@pytest.fixture
def servicer(inspector: FakeInspector) -> OpenInferenceServicer:
    return OpenInferenceServicer(cast(Inspector, inspector), cast(Registry, FakeRegistry()))


CONTEXT = cast(aio.ServicerContext[Any, Any], FakeContext())


def framed(*elements: bytes) -> bytes:
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def request(
    datatype: str, shape: Sequence[int], raw: bytes | None = None, contents: InferTensorContents | None = None
) -> ModelInferRequest:
    tensor = ModelInferRequest.InferInputTensor(name="image", datatype=datatype, shape=shape, contents=contents)
    return ModelInferRequest(model_name="screws", inputs=[tensor], raw_input_contents=[] if raw is None else [raw])


def encoded(*images: bytes, **fields: Any) -> ModelInferRequest:
    asked = request("BYTES", [len(images)], framed(*images))
    asked.MergeFrom(ModelInferRequest(**fields))
    return asked


def outputs(*names: str) -> list[ModelInferRequest.InferRequestedOutputTensor]:
    return [ModelInferRequest.InferRequestedOutputTensor(name=name) for name in names]


def arrays(response: ModelInferResponse) -> dict[str, NDArray[Any]]:
    types: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "BOOL": np.dtype(np.bool_)}
    return {
        output.name: np.frombuffer(raw, types[output.datatype]).reshape(tuple(output.shape))
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def refused(asked: ModelInferRequest) -> str:
    with pytest.raises(Refusal) as caught:
        tensors.images(asked, MOST)
    assert caught.value.status == grpc.StatusCode.INVALID_ARGUMENT
    return caught.value.text


def pixels(image: EncodedImage | RawImage) -> NDArray[Any]:
    assert isinstance(image, RawImage)
    types: dict[int, np.dtype[Any]] = {8: np.dtype(np.uint8), 32: np.dtype("<f4")}
    return np.frombuffer(image.data, types[image.bits]).reshape(image.height, image.width, image.channels)


shapes = st.tuples(
    st.lists(st.integers(1, MOST), max_size=1), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)
).map(lambda parts: (*parts[0], *parts[1:]))


@given(shape=shapes, datatype=st.sampled_from(["UINT8", "FP32"]), typed=st.booleans())
def test_pixels_arrive_as_they_were_sent_whatever_the_form(shape: tuple[int, ...], datatype: str, typed: bool) -> None:
    kind = np.dtype(np.uint8) if datatype == "UINT8" else np.dtype("<f4")
    sent = np.arange(int(np.prod(shape))).reshape(shape).astype(kind)
    if typed:
        values = sent.ravel().tolist()
        field = "uint_contents" if datatype == "UINT8" else "fp32_contents"
        asked = request(datatype, shape, contents=InferTensorContents(**{field: values}))
    else:
        asked = request(datatype, shape, sent.tobytes())
    arrived = [pixels(image) for image in tensors.images(asked, MOST)]
    np.testing.assert_array_equal(np.stack(arrived), sent if len(shape) == 4 else sent[None])


@given(
    shape=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 4), max_size=5),
    datatype=st.sampled_from(["UINT8", "FP32", "BYTES"]),
    raw=st.binary(max_size=64),
)
def test_any_shape_with_any_bytes_is_either_taken_whole_or_invalid(shape: list[int], datatype: str, raw: bytes) -> None:
    asked = request(datatype, shape, raw)
    try:
        images = tensors.images(asked, MOST)
    except Refusal as refusal:
        assert refusal.status == grpc.StatusCode.INVALID_ARGUMENT  # noqa: PT017 - or it is taken
        return
    assert 1 <= len(images) <= MOST
    lengths = 4 * len(images) if datatype == "BYTES" else 0
    assert sum(len(image.data) for image in images) + lengths == len(raw)


@given(files=st.lists(st.binary(max_size=20), min_size=1, max_size=MOST), typed=st.booleans())
def test_files_arrive_as_they_were_sent_whatever_the_form(files: list[bytes], typed: bool) -> None:
    asked = encoded(*files)
    if typed:
        asked = request("BYTES", [len(files)], contents=InferTensorContents(bytes_contents=files))
    assert [image.data for image in tensors.images(asked, MOST)] == files


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (ModelInferRequest(), "inputs []; expected one, named 'image'"),
        (request("INT8", [1, 1, 1], b"x"), "datatype 'INT8'"),
        (request("BYTES", [1, 1], framed(b"x")), "shape [1, 1]"),
        (request("BYTES", [0], b""), "0 images; expected 1 to 5"),
        (request("BYTES", [6], framed(*6 * [b"x"])), "6 images; expected 1 to 5"),
        (request("BYTES", [2], framed(b"x")), "1 elements; its shape [2] needs 2"),
        (request("BYTES", [1], framed(b"x", b"y")), "more elements than the 1 of the shape"),
        (request("BYTES", [1], framed(b"x")[:4]), "ends within element 0"),
        (request("BYTES", [1], b"\1"), "ends within element 0"),
        (request("BYTES", [2], contents=InferTensorContents(bytes_contents=[b"x"])), "1 elements"),
        (request("UINT8", [2, 2], b"xxxx"), "[height, width, channels]"),
        (request("UINT8", [0, 2, 1], b""), "each of at least 1"),
        (request("UINT8", [6, 1, 1, 1], b"xxxxxx"), "6 images"),
        (request("FP32", [1, 2, 1], b"xxxx"), "1 values in 4 bytes; FP32 of shape [1, 2, 1] has 2 in 8"),
        (request("UINT8", [1, 1, 1], contents=InferTensorContents(uint_contents=[256])), "the value 256"),
        (request("UINT8", [1, 1, 1], contents=InferTensorContents(fp32_contents=[1])), "0 values"),
        (request("UINT8", [1, 1, 1], b"x", InferTensorContents(uint_contents=[1])), "typed contents, too"),
    ],
)
def test_a_bad_tensor_is_told_what_is_wrong_with_it(asked: ModelInferRequest, said: str) -> None:
    assert said in refused(asked)


def test_more_raw_contents_than_inputs_are_invalid() -> None:
    asked = encoded(b"x")
    asked.raw_input_contents.append(b"y")
    assert "2 entries for one input" in refused(asked)


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


@pytest.fixture
def calibrated(inspector: FakeInspector, monkeypatch: pytest.MonkeyPatch) -> Limit:
    """The limit of a release that is calibrated by 40 images with scores about 1."""
    limit = Normals({"north": ScoreSketch.of([1.0] * 40)}).limit("north", 0.1)
    assert limit is not None
    monkeypatch.setattr(FakeActive, "limits", lambda _self, _site: SiteLimits(limit, limit))
    inspector.limit = limit
    return limit


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
        assert (inspection.map_kind, inspection.caller, inspection.seconds_left) == ("float32", "line-7", 5.0)
    assert (answer.model_name, answer.model_version, answer.id) == ("screws", "3", "part-9")
    assert [output.name for output in answer.outputs] == ["anomaly_map", "score"]
    assert arrays(answer)["anomaly_map"].shape == (2, SIZE, SIZE)
    assert arrays(answer)["anomaly_map"][:, 0, 0].tolist() == [1, 2]


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
