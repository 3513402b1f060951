"""What tensors are taken for, and what is wrong with those that are not."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from feddymem.image_data import EncodedImage, RawImage
from feddymem.openinference.open_inference_pb2 import InferTensorContents, ModelInferRequest
from services.inference import tensors
from services.runtime.errors import Refusal
from tests.unit.open_inference.requests import encoded, framed, request

MOST = 5


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
