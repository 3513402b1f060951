"""Runtimes: what computes the feature maps of pixels, all held to the same numbers by a parity test.

The network is exported once to ONNX and compiled by OpenVINO, which on CPUs takes a fraction of torch's time
(`make bench`, docs/performance.md). On a GPU torch computes.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from feddymem.folders import cache_folder

RuntimeName = Literal["auto", "torch", "openvino"]
Precision = Literal["float32", "bfloat16"]
FeatureMaps = Callable[[Tensor], Tensor]
"""Maps (n, 3, side, side) float32 pixels of 0..255 to (n, channels, grid, grid) float32 feature maps."""

_GRAPH = 1
"""Goes up when the exported graph changes, so that none of before is taken from the cache."""
_DIGEST_BYTES = hashlib.sha256().digest_size
_TOLERANCE = 1e-4
"""By how much of their length an exported network's feature maps may differ from torch's."""

_log = logging.getLogger(__name__)


def compiled(
    network: nn.Module, side: int, key: str, runtime: RuntimeName, precision: Precision, device: torch.device
) -> FeatureMaps:
    """What computes a network's feature maps.

    Args:
        network: see FeatureMaps; its parameters are on the device.
        side: of the images that it will see, in pixels.
        key: names the network with its weights; for the cache of exported graphs.
        runtime: "auto" for OpenVINO on the CPU, and torch on a GPU or where a network cannot be exported.
        precision: of the network's arithmetic; bfloat16 is faster and moves features (docs/performance.md).
        device: where to compute.

    Raises:
        ValueError: OpenVINO was asked for on a GPU, or cannot run this network.
    """
    if runtime == "openvino" and device.type != "cpu":
        raise ValueError(f"runtime 'openvino' computes on the CPU, and the device is {device.type!r}; use 'torch'")
    if runtime == "torch" or device.type != "cpu":
        return _by_torch(network, precision, device)
    try:
        return _by_openvino(_graph(network, side, key), precision)
    except RuntimeError as error:  # of torch's export, of OpenVINO, or of the comparison
        if runtime == "openvino":
            raise ValueError(f"runtime 'openvino' cannot run this backbone; use 'torch': {error}") from error
        _log.warning("OpenVINO cannot run this backbone, torch computes it: %s", error)
        return _by_torch(network, precision, device)


def _by_torch(network: nn.Module, precision: Precision, device: torch.device) -> FeatureMaps:
    if device.type == "cuda":
        network = network.to(memory_format=torch.channels_last)

    def maps(pixels: Tensor) -> Tensor:
        pixels = pixels.to(device)
        if device.type == "cuda":
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return torch.as_tensor(network(pixels)).float()

    return maps


def _openvino() -> ModuleType:
    """OpenVINO, which is slow to import, and needed on CPUs only.

    When imported it sets up telemetry, and gives the user an ID for it, unless the package for that is missing. None in
    its place makes it missing.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")


def _by_openvino(graph: bytes, precision: Precision) -> FeatureMaps:
    openvino = _openvino()
    core = openvino.Core()
    options = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Pinned threads wait for their core while another is free, and two services on a machine pin the same ones.
        "ENABLE_CPU_PINNING": False,
    }
    request = core.compile_model(core.read_model(graph), "CPU", options).create_infer_request()
    lock = threading.Lock()

    def maps(pixels: Tensor) -> Tensor:
        values = np.ascontiguousarray(pixels.numpy())
        with lock:  # a request has one set of buffers
            request.set_input_tensor(openvino.Tensor(values, shared_memory=True))
            request.infer()
            result: NDArray[np.float32] = request.get_output_tensor().data
            return torch.from_numpy(result.copy())

    return maps


def _graph(network: nn.Module, side: int, key: str) -> bytes:
    """The network as ONNX, for any number of images; kept, because to export takes seconds."""
    made_by = f"{_GRAPH} {torch.__version__} {_openvino().__version__}"
    name = hashlib.sha256(f"{made_by} {side} {key}".encode()).hexdigest()
    path = cache_folder() / "graphs" / f"{name}.graph"
    kept = _kept(path)
    if kept is not None:
        return kept
    graph = to_onnx(network, side)
    _require_same_numbers(_by_openvino(graph, "float32"), network, side)
    try:
        _keep(path, graph)
    except OSError as error:
        _log.warning("the exported network cannot be kept, the next start exports it again: %s", error)
    return graph


def _kept(path: Path) -> bytes | None:
    """A kept graph; None where there is none, or none that is whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, graph = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return graph if hashlib.sha256(graph).digest() == digest else None


def _keep(path: Path, graph: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
        try:
            part.write(hashlib.sha256(graph).digest() + graph)
            part.close()
            Path(part.name).replace(path)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise


def _require_same_numbers(maps: FeatureMaps, network: nn.Module, side: int) -> None:
    """OpenVINO leaves out what it does not know, such as the antialiasing with which a ViT's places are made fewer.

    Raises:
        RuntimeError: the feature maps are not torch's.
    """
    pixels = 255 * torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = torch.as_tensor(network(pixels))
    off = float((maps(pixels) - expected).norm() / expected.norm())
    if not off <= _TOLERANCE:
        raise RuntimeError(f"its feature maps differ from torch's by {off:.1e} of their length")


def to_onnx(network: nn.Module, side: int) -> bytes:
    """A network (see FeatureMaps) for images of `side` pixels as an ONNX model, for any number of images."""
    pixels = torch.zeros(2, 3, side, side)
    images = torch.export.Dim("images", min=1, max=4096)
    program = torch.onnx.export(network, (pixels,), dynamo=True, dynamic_shapes=({0: images},), verbose=False)
    assert program is not None, "the dynamo exporter returns a program"
    return bytes(program.model_proto.SerializeToString())
