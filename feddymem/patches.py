"""Streams of patch features: read again and again, in blocks of bounded size, never all held at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK_BYTES = 32 * 2**20
"""Bytes of one block of float32 patch features; the working memory of memory-reduce is a small multiple of it."""


class PatchSource(Protocol):
    """Patch features of a site's normal images."""

    @property
    def images(self) -> int:
        """Number of images."""

    @property
    def patches_per_image(self) -> int:
        """Patches of each image."""

    @property
    def channels(self) -> int:
        """Length of a patch feature."""

    def blocks(self) -> Iterator[Tensor]:
        """All patches in a fixed order, as (images, patches_per_image, channels) float32 of at most BLOCK_BYTES
        (or one image, where that is larger).
        """


class PatchArray:
    """Patch features in memory: (images, patches_per_image, channels), float16 or float32."""

    def __init__(self, features: NDArray[np.floating]) -> None:
        self._features = features
        self.images, self.patches_per_image, self.channels = features.shape

    def blocks(self) -> Iterator[Tensor]:
        """See PatchSource."""
        step = images_per_block(self.patches_per_image, self.channels)
        for start in range(0, self.images, step):
            yield torch.from_numpy(self._features[start : start + step].astype(np.float32))


def images_per_block(patches_per_image: int, channels: int) -> int:
    """Images whose float32 patches fit into BLOCK_BYTES; at least 1."""
    return max(1, BLOCK_BYTES // (patches_per_image * channels * 4))
