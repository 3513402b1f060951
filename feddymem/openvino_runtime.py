"""OpenVINO: networks and the screen of the search by its own threads, which on CPUs take a fraction of torch's time."""

from __future__ import annotations

import importlib
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feddymem.search import BLOCK
from feddymem.threads import computing_at_once

Hint = Literal["f32", "bf16"]
"""OpenVINO's names of the type that a model's arithmetic is in."""
_HINTS: dict[torch.dtype, Hint] = {torch.float32: "f32", torch.bfloat16: "bf16"}


@cache
def openvino() -> ModuleType:
    """OpenVINO, which is slow to import, and needed on CPUs only.

    When imported it sets up telemetry, and gives the user an ID for it, unless the package for that is missing. None in
    its place makes it missing.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")


class OpenVINONetwork:
    """Computes an ONNX model of one input and one output."""

    def __init__(self, graph: bytes, hint: Hint) -> None:
        self._requests = _Requests(_core().read_model(graph), hint)

    def __call__(self, values: Tensor) -> Tensor:
        """The model's output for an input, both float32 on the CPU."""
        values = values.contiguous()  # held here: OpenVINO does not keep what it shares
        with self._requests.one() as request:
            request.set_input_tensor(_shared(values))
            request.infer()
            result: NDArray[np.float32] = request.get_output_tensor().data
            return torch.from_numpy(result.copy())


class OpenVINOScreen:
    """`feddymem.search.Screen` by OpenVINO, for tensors of one type: bfloat16 or float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._requests = _Requests(_screen(_HINTS[dtype]), _HINTS[dtype])

    def __call__(self, items: Tensor, query: Tensor, distances: Tensor, least: Tensor) -> None:
        """See `feddymem.search.Screen`."""
        with self._requests.one() as request:
            for number, tensor in enumerate((items, query)):
                request.set_input_tensor(number, _shared(tensor))
            for number, tensor in enumerate((distances, least)):
                request.set_output_tensor(number, _shared(tensor))
            request.infer()


class _Requests:
    """What a model is computed with: as many as may compute at once, each with buffers and all threads of its own.

    OpenVINO would give each of a model's own requests a share of the threads. So an image that is alone has them all.
    """

    def __init__(self, model: object, hint: Hint) -> None:
        self._free: queue.LifoQueue[Any] = queue.LifoQueue()  # the one used last is in the caches
        for _ in range(computing_at_once()):
            self._free.put(_request(model, hint))

    @contextmanager
    def one(self) -> Iterator[Any]:
        """A request that nobody else has meanwhile."""
        request = self._free.get()
        try:
            yield request
        finally:
            self._free.put(request)


@cache
def _core() -> Any:  # noqa: ANN401 - OpenVINO is imported late
    return openvino().Core()


def _request(model: object, hint: Hint) -> Any:  # noqa: ANN401 - OpenVINO is imported late
    options = {
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Pinned threads wait for their core while another is free, and two services on a machine pin the same ones.
        "ENABLE_CPU_PINNING": False,
    }
    return _core().compile_model(model, "CPU", options).create_infer_request()


def _screen(hint: Hint) -> object:
    """The screen's product, and the least of every BLOCK rows of it. Items are an input: a release compiles nothing."""
    ops = importlib.import_module("openvino.opset13")
    kind = getattr(openvino().Type, hint)
    items, query = ops.parameter([-1, -1], kind), ops.parameter([-1, -1], kind)
    distances = ops.matmul(items, query, False, True)
    count = ops.gather(ops.shape_of(query), np.array([0]), np.array(0))
    blocks = ops.reshape(distances, ops.concat([ops.constant(np.array([-1, BLOCK])), count], 0), False)
    return openvino().Model([distances, ops.reduce_min(blocks, np.array([1]))], [items, query], "screen")


def _shared(values: Tensor) -> object:
    """A tensor of OpenVINO's in the memory of one of torch's, which must be in one piece on the CPU."""
    numbers, kind = (
        (values.view(torch.int16), openvino().Type.bf16)  # numpy has no bfloat16
        if values.dtype == torch.bfloat16
        else (values, openvino().Type.f32)
    )
    return openvino().Tensor(numbers.numpy(), openvino().Shape(list(values.shape)), kind)
