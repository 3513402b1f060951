"""Patch features on disk by content, so that an image passes the backbone once: not for every evaluation, and not again
after a kill in the middle of many.

An entry is named by the fingerprint of the feature space, the precision of the backbone's arithmetic where it is not
float32, and the SHA-256 of the image file. It appears whole or not at
all, and one that was damaged since is discarded and extracted again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feddymem import digested_files
from feddymem.backbone import FeatureExtractor
from feddymem.datasets import DatasetError
from feddymem.extraction import ImageFile, Stamp, features_of, stamp_of
from feddymem.hold_out import held_out
from feddymem.images import MAX_PIXELS, ImageError
from feddymem.patches import images_per_block
from feddymem.progress import Progress, no_progress

LIMIT_BYTES = 4 * 2**30
"""Default bound of the whole folder; about 17,000 images of the default feature space."""
_KEPT_SHARE = 0.9
"""What is left of the bound after old entries were removed, so that they are not removed one by one."""
_SUFFIX = ".features"


@dataclass(frozen=True, eq=False)
class Extraction:
    """Patch features of a folder's images.

    Attributes:
        patches: the features, in the order of the files.
        extracted: how many images passed the backbone for it; the others were in the cache.
        skipped: one text for each file that could not be read; it names the file and the reason.
    """

    patches: CachedPatches
    extracted: int
    skipped: tuple[str, ...]


class FeatureCache:
    """Patch features of image files, in a folder of bounded size; the entries used longest ago go first.

    Several processes may use one folder; each keeps to the bound for itself.

    Args:
        folder: where the entries are; made if missing.
        extractor: extracts what is missing.
        limit_bytes: bound of all entries in the folder; None for none. Less than a data set needs is allowed, and slow.
        batch_size: see `features_of`.
        max_pixels: see `features_of`.
        discard: what becomes of a damaged entry; it must not be there afterwards.
    """

    def __init__(
        self,
        folder: Path,
        extractor: FeatureExtractor,
        limit_bytes: int | None = LIMIT_BYTES,
        batch_size: int | None = None,
        max_pixels: int = MAX_PIXELS,
        discard: Callable[[Path], object] = Path.unlink,
    ) -> None:
        self.extractor = extractor
        self._folder = folder / _folder_name(extractor)
        self._root, self._limit, self._discard = folder, limit_bytes, discard
        self._batch_size, self._max_pixels = batch_size, max_pixels
        self._read_before: dict[Path, tuple[Stamp, str]] = {}
        self._folder.mkdir(parents=True, exist_ok=True)
        self._held = 0 if limit_bytes is None else sum(size for _, size, _ in self._files())

    def extract(self, paths: Sequence[Path], progress: Progress = no_progress) -> Extraction:
        """Features of those files that can be read; looks at each file, and reads it again where it has changed.

        Args:
            paths: the image files.
            progress: is told how far it is.

        Raises:
            DatasetError: not one of the files could be read.
            OSError: the folder cannot be written; what was extracted until then stays.
        """
        if not paths:
            raise DatasetError("there are no images to extract features from")
        missing = [path for path in paths if not self._unchanged(path)]
        skipped: dict[Path, str] = {}
        extracted = 0
        for number, (path, file) in enumerate(zip(missing, self._features_of(missing), strict=True), 1):
            if isinstance(file, ImageError):
                skipped[path] = str(file)
            else:
                extracted += self._keep(path, file)
            progress("features", len(paths) - len(missing) + number, len(paths))
        readable = [path for path in paths if path not in skipped]
        if not readable:
            raise DatasetError(f"none of the {len(paths)} images could be read; the first: {skipped[paths[0]]}")
        return Extraction(CachedPatches(self, readable), extracted, tuple(skipped.values()))

    def features(self, paths: Sequence[Path]) -> Tensor:
        """(n, patches, channels) float32 of n image files, extracted where they are not in the folder.

        A file is taken to be what it was when it was first read here, or by the last `extract`.

        Raises:
            ImageError: a file cannot be read or decoded, or has changed; the text names it.
            OSError: the folder cannot be written.
        """
        space = self.extractor.feature_space
        block = np.empty((len(paths), space.patches, space.channels), np.float32)
        missing = []
        for number, path in enumerate(paths):  # one by one: two copies of a block would be half as much memory again
            entry = self._read(path)
            if entry is None:
                missing.append(number)
            else:
                block[number] = entry
        for number, file in zip(missing, self._features_of([paths[n] for n in missing], again=True), strict=True):
            if isinstance(file, ImageError):
                raise file
            if file.sha256 != self.name(paths[number]):
                raise ImageError(f"{paths[number]}: has changed since it was read")
            self._keep(paths[number], file)
            block[number] = file.features
        return torch.from_numpy(block)

    def keep_only(self, paths: Collection[Path]) -> None:
        """Removes the entries of all but these files, of which `extract` has read each."""
        kept = {self._entry(self._read_before[path][1]) for path in paths}
        self._read_before = {path: self._read_before[path] for path in paths}
        for _, _, path in self._files():
            if path not in kept:
                path.unlink(missing_ok=True)

    def _features_of(self, paths: Sequence[Path], again: bool = False) -> Iterator[ImageFile | ImageError]:
        def known(sha256: str) -> bool:
            return not again and self._entry(sha256).exists()

        return features_of(paths, self.extractor, known, self._batch_size, self._max_pixels)

    def _unchanged(self, image: Path) -> bool:
        """Whether there is an entry of an image file as it is now."""
        stamp, sha256 = self._read_before.get(image, (None, ""))
        try:
            return stamp == stamp_of(image.stat()) and self._entry(sha256).exists()
        except OSError:  # told when it is read
            return False

    def name(self, image: Path) -> str:
        """SHA-256 of an image file, in hex."""
        if image not in self._read_before:
            try:
                with image.open("rb") as file:
                    stamp = stamp_of(os.fstat(file.fileno()))
                    self._read_before[image] = stamp, hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise ImageError(f"{image}: {error}") from error
        return self._read_before[image][1]

    def _entry(self, sha256: str) -> Path:
        return self._folder / f"{sha256}{_SUFFIX}"

    def _read(self, image: Path) -> NDArray[np.float16] | None:
        """An image's entry; None where there is none, or none that is whole."""
        entry, space = self._entry(self.name(image)), self.extractor.feature_space
        try:
            size, data = entry.stat().st_size, digested_files.read(entry)
            if self._limit is not None:
                os.utime(entry)
        except FileNotFoundError:  # never there, or removed by another process
            return None
        if data is None or len(data) != space.patches * space.channels * 2:
            with contextlib.suppress(FileNotFoundError):
                self._discard(entry)
            self._held -= size
            return None
        return np.frombuffer(data, np.float16).reshape(space.patches, space.channels)

    def _keep(self, image: Path, file: ImageFile) -> bool:
        """Notes a file, and its features where they are new: whether they are."""
        self._read_before[image] = file.stamp, file.sha256
        if file.features is None:
            return False
        data = np.ascontiguousarray(file.features).tobytes()
        digested_files.write(self._entry(file.sha256), data)
        self._held += len(data) + digested_files.DIGEST_BYTES
        if self._limit is not None and self._held > self._limit:
            self._remove_oldest(self._limit)
        return True

    def _remove_oldest(self, limit: int) -> None:
        """Down to a share of the bound, by what is in the folder now: other processes may have written too."""
        files = sorted(self._files())
        self._held = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._held <= _KEPT_SHARE * limit:
                break
            path.unlink(missing_ok=True)
            self._held -= size

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Time of last use, bytes and path of each entry, and of what a killed process left of one."""
        for path in self._root.glob(f"*/*{_SUFFIX}*"):
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path


def _folder_name(extractor: FeatureExtractor) -> str:
    space = extractor.feature_space
    return space.fingerprint if extractor.precision == "float32" else f"{space.fingerprint}-{extractor.precision}"


class CachedPatches:
    """Patch features of image files as a PatchSource, read from a cache block by block.

    Args:
        cache: has the features, or extracts them.
        paths: the image files.
        arrivals: see `held_out`, of those of them that `split` may hold out; None for all, in the order of `paths`.
    """

    def __init__(self, cache: FeatureCache, paths: Sequence[Path], arrivals: Mapping[str, int] | None = None) -> None:
        space = cache.extractor.feature_space
        self._cache, self.paths, self._arrivals = cache, tuple(paths), arrivals
        self.images, self.patches_per_image, self.channels = len(paths), space.patches, space.channels

    def split(self, share: float, seed: int) -> tuple[CachedPatches, CachedPatches | None]:
        """Those of the images that make the bank, and those that are held out; None for none. See `held_out`.

        The share is of the images that may be held out.
        """
        arrivals = self._arrivals
        if arrivals is None:
            arrivals = {name: number for number, name in enumerate(dict.fromkeys(self.names.values()))}
        held = self.only(held_out(arrivals, share, seed))
        held_paths = set() if held is None else set(held.paths)
        return CachedPatches(self._cache, [path for path in self.paths if path not in held_paths]), held

    def only(self, images: Collection[str]) -> CachedPatches | None:
        """Those of the images that have one of the names; None for none."""
        chosen = [path for path, name in self.names.items() if name in images]
        return CachedPatches(self._cache, chosen) if chosen else None

    @property
    def names(self) -> dict[Path, str]:
        """Each file's SHA-256, in hex; equal images have one name."""
        return {path: self._cache.name(path) for path in self.paths}

    def blocks(self) -> Iterator[Tensor]:
        """See PatchSource."""
        return self.batches(images_per_block(self.patches_per_image, self.channels))

    def batches(self, images: int) -> Iterator[Tensor]:
        """All patches in the order of the files, as (at most `images`, patches_per_image, channels) float32."""
        for start in range(0, self.images, images):
            yield self._cache.features(self.paths[start : start + images])
