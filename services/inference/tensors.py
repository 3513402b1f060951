"""Tensors of the Open Inference Protocol: a request's images, parameters and wishes; a result's arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from feddymem.image_data import EncodedImage, RawImage
from feddymem.openinference.open_inference_pb2 import ModelInferRequest, ModelMetadataResponse
from services.inference.inspector import Inspection, Result
from services.runtime.errors import invalid

_Tensor = ModelInferRequest.InferInputTensor
_Metadata = ModelMetadataResponse.TensorMetadata

_BITS = {"UINT8": 8, "FP32": 32}
_TYPED_VALUES = 2**20
"""Values that are unpacked from typed contents, at most: it is slow, and raw contents need none of it."""
_LENGTH_BYTES = 4
OUTPUT_TYPES = {
    "score": "FP32",
    "verdict": "BOOL",
    "threshold": "FP32",
    "p_value": "FP32",
    "normalised_score": "FP32",
    "regions": "FP32",
    "anomaly_map": "FP32",
}
_SHAPES = {"regions": [-1, 7], "anomaly_map": [-1, -1, -1]}
_OF_JUDGEMENTS = {
    "verdict": ("anomalous", "?"),
    "threshold": ("threshold", "<f4"),
    "p_value": ("p_value", "<f4"),
    "normalised_score": ("normalised", "<f4"),
}
_JUDGED, _CALIBRATED = ("verdict", "threshold"), ("p_value", "normalised_score")
"""Outputs that need a threshold, the request's or the calibrated one; and those that need a calibration."""
INPUTS = (_Metadata(name="image", datatype="BYTES", shape=[-1]),)
OUTPUTS = tuple(
    _Metadata(name=name, datatype=datatype, shape=_SHAPES.get(name, [-1])) for name, datatype in OUTPUT_TYPES.items()
)


def images(request: ModelInferRequest, most: int) -> Sequence[EncodedImage | RawImage]:
    """The images of a request's one input, not decoded.

    Args:
        request: with BYTES of shape [n], or UINT8 or FP32 of shape [height, width, channels], with or without n before.
        most: images that a request may have.

    Raises:
        Refusal: INVALID_ARGUMENT where name, datatype, shape and contents do not fit together.
    """
    names = [tensor.name for tensor in request.inputs]
    if names != ["image"]:
        raise invalid(f"the request has inputs {names}; expected one, named 'image'")
    tensor, raw = request.inputs[0], _raw_contents(request)
    if tensor.datatype == "BYTES":
        return _encoded_images(tensor, raw, most)
    if tensor.datatype in _BITS:
        return _raw_images(tensor, raw, most)
    raise invalid(f"image has datatype {tensor.datatype!r}; expected BYTES, UINT8 or FP32")


def site(request: ModelInferRequest) -> str:
    """The site that the parameters name; empty for none.

    Raises:
        Refusal: INVALID_ARGUMENT where it is not text.
    """
    value = _parameter(request, "site")
    if value is None:
        return ""
    if not isinstance(value, str):
        raise invalid(f"parameter site is {value!r}; expected a string")
    return value


def number(request: ModelInferRequest, name: str) -> float | None:
    """A parameter that is a number, or text of one, because KServe's clients send no fractions; None without it.

    Raises:
        Refusal: INVALID_ARGUMENT where it is not a number.
    """
    value = _parameter(request, name)
    if value is None:
        return None
    try:
        return float(str(value))  # of a bool that is no number
    except ValueError:
        raise invalid(f"parameter {name} is {value!r}; expected a number, or a string of one") from None


def wanted_outputs(request: ModelInferRequest) -> list[str]:
    """Names of the outputs to answer with, in the order asked for; none where the request leaves them to us.

    Raises:
        Refusal: INVALID_ARGUMENT for an output that does not exist.
    """
    names = [output.name for output in request.outputs]
    for name in names:
        if name not in OUTPUT_TYPES:
            raise invalid(f"output {name!r} does not exist; expected some of {', '.join(OUTPUT_TYPES)}")
    if len(set(names)) < len(names):
        raise invalid(f"outputs {names} are asked for more than once; name each once")
    return names


def require_known(wanted: Sequence[str], inspection: Inspection, calibrated: bool) -> None:
    """Refuses outputs that nothing is known of.

    Args:
        wanted: names of outputs.
        inspection: what is asked for.
        calibrated: whether the release that scores has a calibration.

    Raises:
        Refusal: INVALID_ARGUMENT for a verdict or regions without a threshold, or a p-value without a calibration.
    """
    if calibrated:
        return
    missing = {"regions": "pixel_threshold"} if inspection.pixel_threshold is None else {}
    if inspection.threshold is None:
        missing |= dict.fromkeys(_JUDGED, "threshold")
    for name in wanted:
        if name in missing:
            raise invalid(
                f"output {name!r} is asked for of a release without a calibration; set the parameter {missing[name]}"
            )
        if name in _CALIBRATED:
            raise invalid(f"output {name!r} is asked for of a release without a calibration; leave it out")


def usual_outputs(results: Sequence[Result]) -> list[str]:
    """Names of the outputs to answer with where the request leaves them to us."""
    return ["score", "verdict"] if all(result.judgement for result in results) else ["score"]


def output_array(name: str, results: Sequence[Result]) -> NDArray[np.generic]:
    """One output of n results.

    Returns:
        (n,) float32 or, for verdicts, bool; (m, 7) float32 for m regions of all images; (n, input_size, input_size)
        float32 for maps.
    """
    if name == "regions":
        return _regions(results)
    if name == "anomaly_map":
        return np.stack([each.float_map for each in results if each.float_map is not None]).astype("<f4", copy=False)
    if name == "score":
        return np.array([result.score for result in results], "<f4")
    judgements = [result.judgement for result in results if result.judgement is not None]
    field, dtype = _OF_JUDGEMENTS[name]
    return np.array([getattr(each, field) for each in judgements], dtype)


def _regions(results: Sequence[Result]) -> NDArray[np.generic]:
    rows = [
        (number, each.top, each.left, each.height, each.width, each.area, each.peak)
        for number, result in enumerate(results)
        for each in result.regions
    ]
    return np.array(rows, "<f4").reshape(-1, _SHAPES["regions"][1])


def _parameter(request: ModelInferRequest, name: str) -> str | float | None:
    if name not in request.parameters:
        return None
    parameter = request.parameters[name]
    kind = parameter.WhichOneof("parameter_choice")
    if kind is None:
        raise invalid(f"parameter {name} has no value")
    value: str | float = getattr(parameter, kind)
    return value


def _raw_contents(request: ModelInferRequest) -> bytes | None:
    """What `raw_input_contents` has for the one input; None where its contents are typed."""
    if not request.raw_input_contents:
        return None
    if len(request.raw_input_contents) > 1 or request.inputs[0].HasField("contents"):
        raise invalid(
            f"raw_input_contents has {len(request.raw_input_contents)} entries for one input, "
            f"{'which has typed contents, too' if request.inputs[0].HasField('contents') else 'one is expected'}"
        )
    return request.raw_input_contents[0]


def _encoded_images(tensor: _Tensor, raw: bytes | None, most: int) -> list[EncodedImage]:
    if len(tensor.shape) != 1:
        raise invalid(f"image has shape {list(tensor.shape)}; BYTES needs [n], where n is the number of images")
    count = _checked_count(tensor.shape[0], most)
    elements = list(tensor.contents.bytes_contents) if raw is None else _elements(raw, count)
    if len(elements) != count:
        raise invalid(f"image has {len(elements)} elements; its shape {list(tensor.shape)} needs {count}")
    return [EncodedImage(element) for element in elements]


def _elements(raw: bytes, most: int) -> list[bytes]:
    """Elements of BYTES, each behind its length."""
    found: list[bytes] = []
    position = 0
    while position < len(raw):
        start = position + _LENGTH_BYTES
        length = int.from_bytes(raw[position:start], "little")
        if start + length > len(raw):
            raise invalid(
                f"raw_input_contents ends within element {len(found)}; every element of BYTES comes behind its length "
                f"as {_LENGTH_BYTES} bytes, little-endian"
            )
        if len(found) == most:
            raise invalid(f"raw_input_contents has more elements than the {most} of the shape")
        position = start + length
        found.append(raw[start:position])
    return found


def _raw_images(tensor: _Tensor, raw: bytes | None, most: int) -> list[RawImage]:
    shape = list(tensor.shape)
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise invalid(
            f"image has shape {shape}; {tensor.datatype} needs [height, width, channels] or "
            "[n, height, width, channels], each of at least 1"
        )
    height, width, channels = shape[-3:]
    bits = _BITS[tensor.datatype]
    count = _checked_count(shape[0] if len(shape) == 4 else 1, most)
    if raw is None and math.prod(shape) > _TYPED_VALUES:
        raise invalid(f"image has {math.prod(shape)} typed values; send more than {_TYPED_VALUES} raw")
    data = memoryview(_packed(tensor) if raw is None else raw)
    size = height * width * channels * bits // 8
    if len(data) != count * size:
        raise invalid(
            f"image has {len(data) * 8 // bits} values in {len(data)} bytes; "
            f"{tensor.datatype} of shape {shape} has {math.prod(shape)} in {count * size}"
        )
    return [RawImage(data[n * size : (n + 1) * size], height, width, channels, bits) for n in range(count)]


def _packed(tensor: _Tensor) -> bytes:
    """Typed contents as raw ones."""
    if tensor.datatype == "FP32":
        return np.array(tensor.contents.fp32_contents, "<f4").tobytes()
    values = np.array(tensor.contents.uint_contents, np.uint32)
    if values.max(initial=0) > 255:
        raise invalid(f"image has the value {values.max()}; UINT8 has 0..255")
    return values.astype(np.uint8).tobytes()


def _checked_count(count: int, most: int) -> int:
    if not 1 <= count <= most:
        raise invalid(f"the request has {count} images; expected 1 to {most}")
    return count
