"""Patch features kept on disk by content, so that an image passes the backbone once and not for every evaluation.

An entry is named by the fingerprint of the feature space and the SHA-256 of the image file. It appears whole or not at
all, and one that was damaged since is discarded and extracted again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feddymem.backbone import FeatureExtractor
from feddymem.extraction import features_of
from feddymem.images import ImageError
from feddymem.patches import images_per_block

LIMIT_BYTES = 4 * 2**30
"""Default bound of the whole folder; about 17,000 images of the default feature space."""
_KEPT_SHARE = 0.9
"""What is left of the bound after old entries were removed, so that they are not removed one by one."""
_SUFFIX = ".features"
_DIGEST_BYTES = hashlib.sha256().digest_size


class FeatureCache:
    """Patch features of image files, in a folder of bounded size; the entries used longest ago go first.

    Several processes may use one folder; each keeps to the bound for itself.

    Args:
        folder: where the entries are; made if missing.
        extractor: extracts what is missing.
        limit_bytes: bound of all entries in the folder. Less than a data set needs is allowed, and slow.
    """

    def __init__(self, folder: Path, extractor: FeatureExtractor, limit_bytes: int = LIMIT_BYTES) -> None:
        self.extractor = extractor
        self._folder = folder / extractor.feature_space.fingerprint
        self._root, self._limit = folder, limit_bytes
        self._entries: dict[Path, Path] = {}
        self._folder.mkdir(parents=True, exist_ok=True)
        self._held = sum(size for _, size, _ in self._files())

    def features(self, paths: Sequence[Path]) -> NDArray[np.float16]:
        """(n, patches, channels) of n image files, extracted where they are not in the folder.

        Raises:
            ImageError: a file cannot be read or decoded; the text names it.
            OSError: the folder cannot be written.
        """
        found = [self._read(path) for path in paths]
        missing = [number for number, entry in enumerate(found) if entry is None]
        number_of = iter(missing)
        for entries, unreadable in features_of([paths[number] for number in missing], self.extractor):
            if unreadable:
                raise unreadable[0]
            for entry in entries:
                number = next(number_of)
                self._write(paths[number], entry)
                found[number] = entry
        return np.stack([entry for entry in found if entry is not None])

    def _entry(self, image: Path) -> Path:
        """The file of an image's entry. An image file is taken not to change during a run and is hashed once."""
        if image not in self._entries:
            try:
                with image.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise ImageError(f"{image}: {error}") from error
            self._entries[image] = self._folder / f"{digest}{_SUFFIX}"
        return self._entries[image]

    def _read(self, image: Path) -> NDArray[np.float16] | None:
        """An image's entry; None where there is none, or none that is whole."""
        entry, space = self._entry(image), self.extractor.feature_space
        try:
            content = entry.read_bytes()
            os.utime(entry)
        except FileNotFoundError:  # never there, or removed by another process
            return None
        digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if len(data) != space.patches * space.channels * 2 or hashlib.sha256(data).digest() != digest:
            entry.unlink(missing_ok=True)
            self._held -= len(content)
            return None
        return np.frombuffer(data, np.float16).reshape(space.patches, space.channels)

    def _write(self, image: Path, features: NDArray[np.float16]) -> None:
        data = np.ascontiguousarray(features).tobytes()
        with tempfile.NamedTemporaryFile(dir=self._folder, suffix=f"{_SUFFIX}.part", delete=False) as part:
            try:
                part.write(hashlib.sha256(data).digest() + data)
                part.close()
                Path(part.name).replace(self._entry(image))
            except BaseException:
                Path(part.name).unlink(missing_ok=True)
                raise
        self._held += len(data) + _DIGEST_BYTES
        if self._held > self._limit:
            self._remove_oldest()

    def _remove_oldest(self) -> None:
        """Down to a share of the bound, by what is in the folder now: other processes may have written too."""
        files = sorted(self._files())
        self._held = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._held <= _KEPT_SHARE * self._limit:
                break
            path.unlink(missing_ok=True)
            self._held -= size

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Time of last use, bytes and path of each entry, and of what a killed process left of one."""
        for path in self._root.glob(f"*/*{_SUFFIX}*"):
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path


class CachedPatches:
    """Patch features of image files as a PatchSource, read from a cache block by block."""

    def __init__(self, cache: FeatureCache, paths: Sequence[Path]) -> None:
        space = cache.extractor.feature_space
        self._cache, self._paths = cache, paths
        self.images, self.patches_per_image, self.channels = len(paths), space.patches, space.channels

    def blocks(self) -> Iterator[Tensor]:
        """See PatchSource."""
        return self.batches(images_per_block(self.patches_per_image, self.channels))

    def batches(self, images: int) -> Iterator[Tensor]:
        """All patches in the order of the files, as (at most `images`, patches_per_image, channels) float32."""
        for start in range(0, self.images, images):
            features = self._cache.features(self._paths[start : start + images])
            yield torch.from_numpy(features.astype(np.float32))
