"""From image files to patch features on disk: decoding in parallel with the backbone, unreadable files skipped and
named."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from feddymem.backbone import FeatureExtractor
from feddymem.datasets import DatasetError
from feddymem.images import MAX_PIXELS, ImageError
from feddymem.memory_reduce import Progress, no_progress
from feddymem.patches import PatchFile
from feddymem.threads import decoders, leave_cores


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
    batch_size: int = 8,
    max_pixels: int = MAX_PIXELS,
    progress: Progress = no_progress,
) -> Extraction:
    """Extracts the patch features of image files to one file of float16.

    Args:
        paths: the image files.
        extractor: the feature space's backbone.
        file: where the features go; overwritten.
        batch_size: images per pass of the backbone.
        max_pixels: larger images are skipped.
        progress: told after every batch.

    Raises:
        DatasetError: not one of the files could be read.
    """
    space = extractor.feature_space
    patches = PatchFile(file, space.patches, space.channels)
    skipped: list[str] = []
    batch: list[Tensor] = []

    def flush() -> None:
        if batch:
            patches.append(extractor(torch.stack(batch)).half().cpu().numpy())
            batch.clear()
            progress("features", patches.images + len(skipped), len(paths))

    for prepared in _prepare(paths, extractor, max_pixels, window=2 * batch_size):
        if isinstance(prepared, ImageError):
            skipped.append(str(prepared))
            continue
        batch.append(prepared)
        if len(batch) == batch_size:
            flush()
    flush()
    if not paths:
        raise DatasetError("there are no images to extract features from")
    if not patches.images:
        raise DatasetError(f"none of the {len(paths)} images could be read; the first: {skipped[0]}")
    return Extraction(patches, tuple(skipped))


def _prepare(
    paths: Sequence[Path], extractor: FeatureExtractor, max_pixels: int, window: int
) -> Iterator[Tensor | ImageError]:
    """Network inputs in the order of the files, decoded by threads a bounded number of images ahead."""

    def prepare(path: Path) -> Tensor | ImageError:
        try:
            return extractor.read_file(path, max_pixels).pixels
        except ImageError as error:
            return error

    with ThreadPoolExecutor(decoders(), thread_name_prefix="decode", initializer=leave_cores) as pool:
        ahead: deque[Future[Tensor | ImageError]] = deque()
        for path in paths:
            ahead.append(pool.submit(prepare, path))
            if len(ahead) > window:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
