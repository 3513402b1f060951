"""From image files to patch features: files in parallel, in their order, unreadable ones skipped and named."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feddymem.backbone import FeatureExtractor
from feddymem.datasets import DatasetError
from feddymem.images import MAX_PIXELS, ImageError
from feddymem.memory_reduce import Progress, no_progress
from feddymem.patches import PatchFile
from feddymem.threads import leave_cores, workers

_BATCH = {"cpu": 4, "cuda": 32}
"""Images that a thread decodes and then passes through the backbone together."""


@dataclass(frozen=True)
class Extraction:
    """Patch features of a folder's images.

    Attributes:
        patches: the features, in the order of the files.
        skipped: one text for each file that could not be read; it names the file and the reason.
    """

    patches: PatchFile
    skipped: tuple[str, ...]


def extract(
    paths: Sequence[Path],
    extractor: FeatureExtractor,
    file: Path,
    batch_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Progress = no_progress,
) -> Extraction:
    """Extracts the patch features of image files to one file of float16.

    Args:
        paths: the image files.
        extractor: the feature space's backbone.
        file: where the features go; overwritten.
        batch_size: see `features_of`.
        max_pixels: larger images are skipped.
        progress: told after every batch.

    Raises:
        DatasetError: not one of the files could be read.
    """
    space = extractor.feature_space
    patches = PatchFile(file, space.patches, space.channels)
    skipped: list[str] = []
    for features, unreadable in features_of(paths, extractor, batch_size, max_pixels):
        if len(features):
            patches.append(features)
        skipped += [str(error) for error in unreadable]
        progress("features", patches.images + len(skipped), len(paths))
    if not paths:
        raise DatasetError("there are no images to extract features from")
    if not patches.images:
        raise DatasetError(f"none of the {len(paths)} images could be read; the first: {skipped[0]}")
    return Extraction(patches, tuple(skipped))


def features_of(
    paths: Sequence[Path], extractor: FeatureExtractor, batch_size: int | None = None, max_pixels: int = MAX_PIXELS
) -> Generator[tuple[NDArray[np.float16], list[ImageError]], None, None]:
    """Patch features of image files, a few files at a time, in their order; as many as there are threads are ahead.

    Each thread decodes a batch and computes its features: so decoding and the backbone fill each other's gaps.

    Args:
        paths: the image files.
        extractor: the feature space's backbone.
        batch_size: images that a thread decodes and passes through the backbone together; None for 4 on a CPU, 32 on
            a GPU.
        max_pixels: larger images cannot be read.

    Yields:
        (n, patches, channels) float16 of those that could be read, and the errors of the others.
    """

    def features(some: Sequence[Path]) -> tuple[NDArray[np.float16], list[ImageError]]:
        read: list[Tensor] = []
        unreadable: list[ImageError] = []
        for path in some:
            try:
                read.append(extractor.read_file(path, max_pixels).pixels)
            except ImageError as error:
                unreadable.append(error)
        if not read:
            space = extractor.feature_space
            return np.empty((0, space.patches, space.channels), np.float16), unreadable
        return extractor(torch.stack(read)).half().cpu().numpy(), unreadable

    threads, batch = workers(), batch_size or _BATCH[extractor.device.type]
    with ThreadPoolExecutor(threads, thread_name_prefix="extract", initializer=leave_cores) as pool:
        ahead: deque[Future[tuple[NDArray[np.float16], list[ImageError]]]] = deque()
        try:
            for start in range(0, len(paths), batch):
                ahead.append(pool.submit(features, paths[start : start + batch]))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:  # of a caller who has seen enough
                future.cancel()
