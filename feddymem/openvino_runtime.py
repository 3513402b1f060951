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
    """What a model is computed with: as many as may compute at once, each with buffers and threads of its own.

    Whoever is alone has all threads. Others meanwhile have their share of them: threads that are more than the cores
    spend their time waiting for each other.
    """

    def __init__(self, model: object, hint: Hint) -> None:
        self._free: queue.PriorityQueue[tuple[int, Any]] = queue.PriorityQueue()
        threads, at_once = torch.get_num_threads(), computing_at_once()
        for number in range(at_once):
            self._free.put((number, _request(model, hint, max(1, threads // at_once) if number else threads)))

    @contextmanager
    def one(self) -> Iterator[Any]:
        """A request that nobody else has meanwhile."""
        free = self._free.get()
        try:
            yield free[1]
        finally:
            self._free.put(free)


@cache
def _core() -> Any:  # noqa: ANN401 - OpenVINO is imported late
    return openvino().Core()


def _request(model: object, hint: Hint, threads: int) -> Any:  # noqa: ANN401 - OpenVINO is imported late
    options = {
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
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
