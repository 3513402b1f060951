"""Streams of patch features: read again and again, in blocks of bounded size, never all held at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

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


class PatchFile:
    """Patch features in a file of float16, written once by `append` and then read in blocks.

    Read with plain reads rather than a memory map, whose touched pages would count as this process's memory.
    """

    def __init__(self, path: Path, patches_per_image: int, channels: int) -> None:
        self.path, self.patches_per_image, self.channels = path, patches_per_image, channels
        self.images = 0
        path.write_bytes(b"")

    def append(self, features: NDArray[np.float16]) -> None:
        """Writes (n, patches_per_image, channels) behind what is there.

        Raises:
            OSError: the disk is full.
        """
        if features.shape[1:] != (self.patches_per_image, self.channels) or features.dtype != np.float16:
            raise ValueError(f"features are {features.dtype} {features.shape}; expected float16 of this file's shape")
        with self.path.open("ab") as file:
            file.write(np.ascontiguousarray(features).data)
        self.images += len(features)

    def blocks(self) -> Iterator[Tensor]:
        """See PatchSource."""
        step = images_per_block(self.patches_per_image, self.channels)
        with self.path.open("rb") as file:
            for start in range(0, self.images, step):
                yield self._read(file, min(step, self.images - start))

    def _read(self, file: BinaryIO, count: int) -> Tensor:
        block = torch.empty(count, self.patches_per_image, self.channels)
        for image in block:  # one by one: the float16 of a whole block would be half as much memory again
            image.view(-1).copy_(torch.from_numpy(np.fromfile(file, np.float16, image.numel())))
        return block


def images_per_block(patches_per_image: int, channels: int) -> int:
    """Images whose float32 patches fit into BLOCK_BYTES; at least 1."""
    return max(1, BLOCK_BYTES // (patches_per_image * channels * 4))
