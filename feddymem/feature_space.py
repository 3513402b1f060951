"""The feature space: everything that decides what a patch feature means, and its fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property


class FingerprintMismatchError(ValueError):
    """Banks, generators or releases of different feature spaces were about to mix."""


@dataclass(frozen=True)
class FeatureSpace:
    """Describes how an image becomes patch features. Banks of different fingerprints never mix.

    Attributes:
        backbone: timm model name.
        weights_sha256: hash of the backbone's parameters and buffers as loaded, hex.
        layers: which of the backbone's feature maps are used: indices in timm's list, shallowest first.
        reductions: input pixels per patch side of those feature maps.
        input_size: side of the square that an image is stretched to, in pixels.
        tile_size: side of the squares that the backbone sees at a time, in pixels; input_size for the whole image.
        tile_overlap: how far neighbouring tiles overlap at least, in pixels; 0 for the whole image.
        mean: per channel (R, G, B), subtracted from pixel values 0..255.
        std: per channel (R, G, B), divisor after the mean.
        pooling: side of the mean pooling over neighbouring patches, whose outcome is added to each patch; odd.
        context_weight: factor of that mean.
        border_weight: factor of the outermost patches of the image.
        channels: length of a patch feature.
        grid: patches along one side of the image.
        preparation: number of the way in which an image becomes pixels of input_size: decoding and stretching.
    """

    backbone: str
    weights_sha256: str
    layers: tuple[int, ...]
    reductions: tuple[int, ...]
    input_size: int
    tile_size: int
    tile_overlap: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pooling: int
    context_weight: float
    border_weight: float
    channels: int
    grid: int
    preparation: int

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, hex, of all fields in canonical form."""
        canonical = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return self.grid * self.grid

    def require_same(self, other: FeatureSpace, mine: str, theirs: str) -> None:
        """Checks that another feature space is this one.

        Args:
            other: the other feature space.
            mine: whose this one is, for the error's text.
            theirs: whose the other one is.

        Raises:
            FingerprintMismatchError: names both fingerprints and every field that differs.
        """
        if other.fingerprint == self.fingerprint:
            return
        differences = "; ".join(
            f"{field.name}: {getattr(self, field.name)} against {getattr(other, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        )
        raise FingerprintMismatchError(
            f"{mine} has fingerprint {self.fingerprint}, {theirs} has {other.fingerprint}; "
            f"they differ in {differences}. "
            "Use the same backbone, weights, input size, tiles and version of this program at every site."
        )
