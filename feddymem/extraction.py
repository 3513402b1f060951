"""From image files to patch features: files in parallel, in their order, each by its content."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feddymem.backbone import FeatureExtractor
from feddymem.image_data import EncodedImage
from feddymem.images import MAX_PIXELS, ImageError
from feddymem.threads import leave_cores, workers

_BATCH = {"cpu": 4, "cuda": 32}
"""Images that a thread decodes and then passes through the backbone together."""

Stamp = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds: another one means that a file has to be read again."""


@dataclass(frozen=True, eq=False)
class ImageFile:
    """An image file as it was read.

    Attributes:
        stamp: from before it was read.
        sha256: of its content, in hex.
        features: (patches, channels) float16; None where they are known already.
    """

    stamp: Stamp
    sha256: str
    features: NDArray[np.float16] | None


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file."""
    return status.st_size, status.st_mtime_ns


def features_of(
    paths: Sequence[Path],
    extractor: FeatureExtractor,
    known: Callable[[str], bool] = lambda _sha256: False,
    batch_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Generator[ImageFile | ImageError, None, None]:
    """Patch features of image files, one by one in their order; a few batches for each thread are ahead.

    Each thread decodes a batch and computes its features: so decoding and the backbone fill each other's gaps.

    Args:
        paths: the image files.
        extractor: the feature space's backbone.
        known: whether the features of a content, by its SHA-256 in hex, are known already; called in threads.
        batch_size: images that a thread decodes and passes through the backbone together; None for 4 on a CPU, 32 on
            a GPU.
        max_pixels: larger images cannot be read.

    Yields:
        For each path the file, or why it cannot be read; the text names it.
    """

    def read(path: Path) -> tuple[Stamp, str, Tensor | None] | ImageError:
        try:
            with path.open("rb") as file:
                stamp, content = stamp_of(os.fstat(file.fileno())), file.read()
            sha256 = hashlib.sha256(content).hexdigest()
            pixels = None if known(sha256) else extractor.read(EncodedImage(content), max_pixels).pixels
        except (ImageError, OSError) as error:
            return ImageError(f"{path}: {error}")
        return stamp, sha256, pixels

    def files(some: Sequence[Path]) -> list[ImageFile | ImageError]:
        found = [read(path) for path in some]
        pixels = [file[2] for file in found if not isinstance(file, ImageError) and file[2] is not None]
        features = iter(extractor(torch.stack(pixels)).half().cpu().numpy() if pixels else ())
        return [
            file if isinstance(file, ImageError) else ImageFile(*file[:2], None if file[2] is None else next(features))
            for file in found
        ]

    threads, batch = workers(), batch_size or _BATCH[extractor.device.type]
    with ThreadPoolExecutor(threads, thread_name_prefix="extract", initializer=leave_cores) as pool:
        ahead: deque[Future[list[ImageFile | ImageError]]] = deque()
        try:
            for start in range(0, len(paths), batch):
                ahead.append(pool.submit(files, paths[start : start + batch]))
                if len(ahead) > 2 * threads:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        finally:
            for future in ahead:  # of a caller who has seen enough
                future.cancel()
