"""The backbone: a frozen, pretrained timm network that turns images into patch features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from feddymem.feature_space import FeatureSpace
from feddymem.network import EMBEDDED_BACKBONE, Network, load_network
from feddymem.tiles import tiled

_POOLING = 11
_CONTEXT_WEIGHT = 1.25
_BORDER_WEIGHT = 0.6875
"""Like the weight of the context exact in float32, the type in which it goes over the wire."""


class FeatureExtractor(nn.Module):
    """Patch features of images: what a patch looks like, plus what its neighbourhood looks like.

    1. Feature maps of two layers, brought to the finer grid and joined; of large images tile by tile.
    2. To each patch is added the mean of its neighbourhood, with its channels turned by half their number and every
       second one negated. So patch and context share the channels without cancelling or reinforcing each other:
       squared distances are close to the sum of both squared distances, at half the bytes and search of joining them.
    3. The outermost patches are made smaller, and with them their distances: what is visible there depends on how a
       part was cut out more than on the part.

    What 2 and 3 are worth: docs/method.md. Both are ours.
    """

    mean: Tensor
    std: Tensor
    signs: Tensor
    weights: Tensor

    def __init__(self, network: nn.Module, feature_space: FeatureSpace) -> None:
        super().__init__()
        self.feature_space = feature_space
        self.network = network
        self.register_buffer("mean", torch.tensor(feature_space.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(feature_space.std).view(3, 1, 1))
        signs = torch.ones(feature_space.channels, 1, 1)
        signs[1::2] = -1
        self.register_buffer("signs", feature_space.context_weight * signs)
        weights = torch.full((feature_space.grid, feature_space.grid), feature_space.border_weight)
        weights[1:-1, 1:-1] = 1
        self.register_buffer("weights", weights)
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
        space = self.feature_space
        images = images.to(self.device)
        if space.tile_size < space.input_size:
            maps = tiled(
                self._maps, images, space.tile_size, space.tile_overlap, max(space.reductions), min(space.reductions)
            )
        else:
            maps = self._maps(images)
        side = space.pooling
        context = functional.avg_pool2d(maps, side, 1, side // 2, count_include_pad=False)
        features = (maps + self.signs * context.roll(space.channels // 2, 1)) * self.weights
        return features.flatten(2).transpose(1, 2).contiguous()

    def _maps(self, images: Tensor) -> Tensor:
        """(n, channels, side, side): the layers' feature maps, joined on the finest grid."""
        maps = self.network(images)
        size = maps[0].shape[-2:]
        return torch.cat(
            [maps[0], *(functional.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps[1:])], dim=1
        )


def load_extractor(
    backbone: str = EMBEDDED_BACKBONE,
    checkpoint: Path | None = None,
    input_size: int = 224,
    tile_size: int | None = None,
    tile_overlap: int = 64,
    device: str = "auto",
) -> FeatureExtractor:
    """Loads a backbone with its pretrained weights.

    Args:
        backbone: timm model name of a network that has feature maps of reductions 8 and 16, or maps of one reduction
            only, as ViTs have.
        checkpoint: a safetensors file with the model's state dict; without it, the embedded weights for the embedded
            backbone, and timm's model hub for any other.
        input_size: side of the square that images are stretched to, in pixels; a multiple of the largest
            reduction (16).
        tile_size: side of the tiles that the network sees one after another, likewise a multiple; None, or as large as
            the input, for the whole image at once.
        tile_overlap: how far neighbouring tiles overlap at least, in pixels; rounded up to such a multiple. Without
            effect where the network sees the whole image.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.

    Raises:
        ValueError: an unknown backbone, no feature maps of the needed reductions, bad sizes, or a checkpoint of
            another model.
        FileNotFoundError: the checkpoint does not exist.
    """
    network = load_network(backbone, checkpoint)
    step = max(network.reductions)
    _require_multiple("input_size", input_size, step, at_least=2 * step)
    whole = tile_size is None or tile_size >= input_size
    seen = input_size if tile_size is None or whole else tile_size
    if not whole:
        _require_multiple("tile_size", seen, step, at_least=2 * step)
        tile_overlap = -(-tile_overlap // step) * step
        if not 0 <= tile_overlap < seen:
            raise ValueError(f"tile_overlap is {tile_overlap}; it must be at least 0 and less than tile_size, {seen}")
    feature_space = FeatureSpace(
        backbone=backbone,
        weights_sha256=network.weights_sha256,
        layers=network.layers,
        reductions=network.reductions,
        input_size=input_size,
        tile_size=seen,
        tile_overlap=0 if whole else tile_overlap,
        mean=network.mean,
        std=network.std,
        pooling=_POOLING,
        context_weight=_CONTEXT_WEIGHT,
        border_weight=_BORDER_WEIGHT,
        channels=sum(network.channels),
        grid=input_size // min(network.reductions),
    )
    _require_feature_maps(network, feature_space)
    return FeatureExtractor(network.module, feature_space).to(resolve_device(device))


def resolve_device(device: str) -> str:
    """The torch device meant by "auto", "cpu" or "cuda".

    Raises:
        ValueError: "cuda" where there is none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError("device is 'cuda', but torch sees no CUDA device; use 'cpu' or 'auto'")
    return ("cuda" if available else "cpu") if device == "auto" else device


def _require_multiple(name: str, value: int, step: int, at_least: int) -> None:
    if value % step or value < at_least:
        raise ValueError(f"{name} is {value}; it must be a multiple of {step}, at least {at_least}")


def _require_feature_maps(network: Network, space: FeatureSpace) -> None:
    """Tries one image, because some architectures take one size only, and say so when they see another."""
    side = space.tile_size
    try:
        with torch.inference_mode():
            maps = network.module(torch.zeros(1, 3, side, side))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"backbone {space.backbone!r} does not take images of {side} x {side} pixels: {error}"
        ) from error
    shapes = [tuple(m.shape[1:]) for m in maps]
    expected = [(c, side // r, side // r) for c, r in zip(network.channels, network.reductions, strict=True)]
    if shapes != expected:
        raise ValueError(f"backbone {space.backbone!r} gives feature maps of shapes {shapes}; expected {expected}")
