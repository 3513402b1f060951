"""The backbone: a frozen, pretrained timm network that turns images into patch features."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from feddymem import images
from feddymem.feature_space import FeatureSpace
from feddymem.image_data import EncodedImage, RawImage
from feddymem.images import MAX_PIXELS, ImageError, Pixels
from feddymem.network import EMBEDDED_BACKBONE, Network, load_network
from feddymem.runtimes import FeatureMaps, Precision, RuntimeName, compiled
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
    """Patch features of images: what a patch looks like, plus what its neighbourhood looks like.

    1. Feature maps of two layers, brought to the finer grid and joined; of large images tile by tile.
    2. To each patch is added the mean of its neighbourhood, with its channels turned by half their number and every
       second one negated. So patch and context share the channels without cancelling or reinforcing each other:
       squared distances are close to the sum of both squared distances, at half the bytes and search of joining them.
    3. The outermost patches are made smaller, and with them their distances: what is visible there depends on how a
       part was cut out more than on the part.

    What 2 and 3 are worth: docs/method.md. Both are ours.

    Args:
        feature_space: what it extracts.
        maps: computes feature maps of images or tiles, see `feddymem.runtimes`.
        device: where it computes.
    """

    def __init__(self, feature_space: FeatureSpace, maps: FeatureMaps, device: torch.device) -> None:
        self.feature_space, self.device = feature_space, device
        self.feature_maps = maps
        self._averaging = _averaging(feature_space.grid, feature_space.pooling).to(device)
        signs = torch.ones(feature_space.channels, device=device)
        signs[1::2] = -1
        self._signs = feature_space.context_weight * signs
        weights = torch.full((feature_space.grid, feature_space.grid), feature_space.border_weight, device=device)
        weights[1:-1, 1:-1] = 1
        self._weights = weights.flatten()[:, None]

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
        stored = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
        stretched = functional.interpolate(stored, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return stretched[0].to(torch.float32).contiguous()

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Patch features of prepared images.

        Args:
            pixels: (n, 3, input_size, input_size) float32, values 0..255.

        Returns:
            (n, grid * grid, channels) float32, patches row by row.
        """
        space = self.feature_space
        if space.tile_size < space.input_size:
            maps = tiled(
                self.feature_maps,
                pixels,
                space.tile_size,
                space.tile_overlap,
                max(space.reductions),
                min(space.reductions),
            )
        else:
            maps = self.feature_maps(pixels)
        patches = maps.flatten(2).transpose(1, 2).contiguous()
        context = self._context(patches).roll(space.channels // 2, -1)
        return torch.addcmul(patches, self._signs, context).mul_(self._weights)

    def _context(self, patches: Tensor) -> Tensor:
        """(n, patches, channels): the mean of each patch's neighbourhood, as a product for rows and one for columns."""
        grid = self.feature_space.grid
        down = self._averaging @ patches.view(len(patches), grid, -1)
        return (self._averaging @ down.view(len(patches) * grid, grid, -1)).view_as(patches)


class MapNetwork(nn.Module):
    """A backbone from pixels of 0..255 to its layers' feature maps, joined on the finest grid."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network.module
        self.register_buffer("mean", torch.tensor(network.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(network.std).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """See feddymem.runtimes.FeatureMaps."""
        maps = self.network((pixels - self.mean) / self.std)
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
    maps = compiled(MapNetwork(network).to(where), seen, key, runtime, precision, where)
    return FeatureExtractor(feature_space, maps, where)


def resolve_device(device: str) -> str:
    """The torch device meant by "auto", "cpu" or "cuda".

    Raises:
        ValueError: "cuda" where there is none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError("device is 'cuda', but torch sees no CUDA device; use 'cpu' or 'auto'")
    return ("cuda" if available else "cpu") if device == "auto" else device


def _averaging(grid: int, window: int) -> Tensor:
    """(grid, grid): row i averages over the places at most window // 2 from i that there are."""
    place = torch.arange(grid)
    near = ((place[:, None] - place).abs() <= window // 2).float()
    return near / near.sum(1, keepdim=True)


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
