"""The backbone: a frozen, pretrained timm network that turns images into patch features."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from feddymem import images
from feddymem.feature_network import MapNetwork, PatchFeatures
from feddymem.feature_space import FeatureSpace
from feddymem.image_data import EncodedImage, RawImage
from feddymem.images import MAX_PIXELS, ImageError, Pixels
from feddymem.network import EMBEDDED_BACKBONE, Network, load_network
from feddymem.runtimes import Compute, Precision, RuntimeName, compiled
from feddymem.search import Screen
from feddymem.threads import team
from feddymem.tiles import tiled

with warnings.catch_warnings():
    # Torch warns once of arrays that are not to be written to, as raw images are; here they are only read.
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"\0", np.uint8))

_POOLING = 11
_CONTEXT_WEIGHT = 1.25
_PREPARATION = 2
"""Since 2: JPEGs decoded at reduced scale, 8-bit images stretched in 8 bits."""
_BORDER_WEIGHT = 0.6875
"""Like the weight of the context exact in float32, the type in which it goes over the wire."""


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image as the backbone takes it.

    Attributes:
        pixels: (3, input_size, input_size) float32 on the CPU, R, G, B, values 0..255.
        height: rows of the image as it was sent.
        width: columns of the image as it was sent.
    """

    pixels: Tensor
    height: int
    width: int


class FeatureExtractor:
    """Patch features of images.

    Args:
        feature_space: what it extracts.
        features: computes the patch features of prepared images, see `__call__`.
        screen: what their nearest items are searched with, see `feddymem.search`.
        device: where it computes.
        precision: of the arithmetic; it moves features a little, and does not make another feature space.
    """

    def __init__(
        self,
        feature_space: FeatureSpace,
        features: Callable[[Tensor], Tensor],
        screen: Screen,
        device: torch.device,
        precision: Precision = "float32",
    ) -> None:
        self.feature_space, self.screen, self.device, self.precision = feature_space, screen, device, precision
        self._features = features

    def read(self, image: EncodedImage | RawImage, max_pixels: int = MAX_PIXELS) -> PreparedImage:
        """Decodes an image and prepares it.

        Raises:
            ImageError: see `feddymem.images.read`.
        """
        picture = images.read(image, max_pixels, self.feature_space.input_size)
        return PreparedImage(self.prepare(picture.pixels), picture.height, picture.width)

    def read_file(self, path: Path, max_pixels: int = MAX_PIXELS) -> PreparedImage:
        """Decodes an image file and prepares it.

        Raises:
            ImageError: the file cannot be read or decoded; the text names it.
        """
        try:
            return self.read(EncodedImage(path.read_bytes()), max_pixels)
        except (ImageError, OSError) as error:
            raise ImageError(f"{path}: {error}") from error

    def prepare(self, pixels: Pixels) -> Tensor:
        """The whole image, stretched to a square.

        Args:
            pixels: (height, width, 3), R, G, B, values 0..255. Those of 8 bits are rounded to 8 bits again.

        Returns:
            (3, input_size, input_size) float32 on the CPU, values 0..255.
        """
        size = self.feature_space.input_size
        with team(1):
            stored = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
            stretched = functional.interpolate(stored, (size, size), mode="bilinear", antialias=True)
            return stretched[0].to(torch.float32).contiguous()

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Patch features of prepared images.

        Args:
            pixels: (n, 3, input_size, input_size) float32, values 0..255.

        Returns:
            (n, grid * grid, channels) float32, patches row by row.
        """
        with team(1):  # whatever of torch is beside the runtime; where torch is the runtime, that takes its threads
            return self._features(pixels)


def load_extractor(
    backbone: str = EMBEDDED_BACKBONE,
    checkpoint: Path | None = None,
    input_size: int = 224,
    tile_size: int | None = None,
    tile_overlap: int = 64,
    device: str = "auto",
    runtime: RuntimeName = "auto",
    precision: Precision = "float32",
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
        runtime: what computes the backbone, see `feddymem.runtimes.compiled`.
        precision: of the backbone's arithmetic, see there.

    Raises:
        ValueError: an unknown backbone, no feature maps of the needed reductions, bad sizes, a checkpoint of another
            model, or a runtime that cannot be.
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
        preparation=_PREPARATION,
    )
    _require_feature_maps(network, feature_space)
    where = torch.device(resolve_device(device))
    key = f"{backbone} {network.weights_sha256} {network.layers}"
    maps, patches = MapNetwork(network), PatchFeatures(feature_space)
    if not whole:
        run = compiled(maps.to(where), seen, key, runtime, precision, where)
        return FeatureExtractor(
            feature_space, _of_tiles(run.network, patches.to(where), feature_space), run.screen, where, precision
        )
    key = f"{key} {_POOLING} {_CONTEXT_WEIGHT} {_BORDER_WEIGHT}"
    run = compiled(nn.Sequential(maps, patches).eval().to(where), seen, key, runtime, precision, where)
    return FeatureExtractor(feature_space, run.network, run.screen, where, precision)


def _of_tiles(maps: Compute, patches: PatchFeatures, space: FeatureSpace) -> Callable[[Tensor], Tensor]:
    """Patch features of images that a network sees in tiles."""
    step, reduction = max(space.reductions), min(space.reductions)

    def features(pixels: Tensor) -> Tensor:
        joined = tiled(maps, pixels, space.tile_size, space.tile_overlap, step, reduction)
        return torch.as_tensor(patches(joined))

    return features


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
