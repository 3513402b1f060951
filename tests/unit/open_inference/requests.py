"""Requests, and what responses hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddymem.openinference.open_inference_pb2 import InferTensorContents, ModelInferRequest, ModelInferResponse


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
