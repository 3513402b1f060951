"""Runtimes: what computes patch features of pixels, and the screen of the search; all held to the same numbers.

On CPUs the network is exported once to ONNX and compiled by OpenVINO; on a GPU torch computes (docs/performance.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from feddymem import digested_files
from feddymem.folders import cache_folder, installed_folder
from feddymem.openvino_runtime import OpenVINONetwork, OpenVINOScreen, openvino
from feddymem.search import Screen, has_tiles, screen_by_torch, screen_dtype
from feddymem.threads import team

RuntimeName = Literal["auto", "torch", "openvino"]
Precision = Literal["float32", "bfloat16"]
Compute = Callable[[Tensor], Tensor]
"""From (n, 3, side, side) float32 pixels of 0..255 to a network's output, float32, of which the first side is n."""

_GRAPH = 2
"""Goes up when the exported graph changes, so that none of before is taken from the cache."""
_TOLERANCE = 1e-4
"""By how much of its length an exported network's output may differ from torch's."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Runtime:
    """What computes.

    Attributes:
        network: the network.
        screen: the screen of the search among memory items.
    """

    network: Compute
    screen: Screen


def compiled(
    network: nn.Module, side: int, key: str, runtime: RuntimeName, precision: Precision, device: torch.device
) -> Runtime:
    """What computes a network, and searches in its output.

    Args:
        network: see Compute; its parameters are on the device.
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
        compute = OpenVINONetwork(_graph(network, side, key), "f32" if precision == "float32" else "bf16")
        return Runtime(compute, _screen_on_cpu())
    except RuntimeError as error:  # of torch's export, of OpenVINO, or of the comparison
        if runtime == "openvino":
            raise ValueError(f"runtime 'openvino' cannot run this backbone; use 'torch': {error}") from error
        _log.warning("OpenVINO cannot run this backbone, torch computes it: %s", error)
        return _by_torch(network, precision, device)


def _screen_on_cpu() -> Screen:
    """Torch's where there are tiles: its product then takes a third of the CPU time of OpenVINO's, and one thread is
    enough. Without them both take as much, and OpenVINO's threads are faster than one."""
    return screen_by_torch if has_tiles() else OpenVINOScreen(screen_dtype(torch.device("cpu")))


def _by_torch(network: nn.Module, precision: Precision, device: torch.device) -> Runtime:
    threads = torch.get_num_threads()
    if device.type == "cuda":
        network = network.to(memory_format=torch.channels_last)

    def compute(pixels: Tensor) -> Tensor:
        pixels = pixels.to(device)
        if device.type == "cuda":
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with team(threads), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return torch.as_tensor(network(pixels)).float()

    def screen(items: Tensor, query: Tensor, distances: Tensor, least: Tensor) -> None:
        with team(threads):
            screen_by_torch(items, query, distances, least)

    return Runtime(compute, screen)


def _graph(network: nn.Module, side: int, key: str) -> bytes:
    """The network as ONNX, for any number of images; kept, because to export takes seconds.

    An image of the services brings that of the embedded backbone along, beside the packages.
    """
    made_by = f"{_GRAPH} {torch.__version__} {openvino().__version__}"
    name = hashlib.sha256(f"{made_by} {side} {key}".encode()).hexdigest()
    path = cache_folder() / "graphs" / f"{name}.graph"
    for folder in (installed_folder() / "graphs", path.parent):
        with contextlib.suppress(OSError):
            kept = digested_files.read(folder / path.name)
            if kept is not None:
                return bytes(kept)
    graph = to_onnx(network, side)
    _require_same_numbers(OpenVINONetwork(graph, "f32"), network, side)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digested_files.write(path, graph)
    except OSError as error:
        _log.warning("the exported network cannot be kept, the next start exports it again: %s", error)
    return graph


def _require_same_numbers(computed: Compute, network: nn.Module, side: int) -> None:
    """OpenVINO leaves out what it does not know, such as the antialiasing with which a ViT's places are made fewer.

    Raises:
        RuntimeError: the output is not torch's.
    """
    pixels = 255 * torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = torch.as_tensor(network(pixels))
    off = float((computed(pixels) - expected).norm() / expected.norm())
    if not off <= _TOLERANCE:
        raise RuntimeError(f"its output differs from torch's by {off:.1e} of its length")


def to_onnx(network: nn.Module, side: int) -> bytes:
    """A network (see Compute) for images of `side` pixels as an ONNX model, for any number of images."""
    pixels = torch.zeros(2, 3, side, side)
    images = torch.export.Dim("images", min=1, max=4096)
    program = torch.onnx.export(network, (pixels,), dynamo=True, dynamic_shapes=({0: images},), verbose=False)
    assert program is not None, "the dynamo exporter returns a program"
    return bytes(program.model_proto.SerializeToString())
