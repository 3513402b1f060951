"""Arrays on disk, by content: a file is named by the SHA-256 of its bytes, whole or not there at all."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path

from feddymem.v1.array_pb2 import Array, ArrayChunk
from services.runtime.arrays import CHUNK_BYTES, check_chunk, make_chunk
from services.runtime.errors import data_loss, invalid, not_found
from services.runtime.files import make_folder, quarantine, sync_folder


class ArrayStore:
    """A folder of arrays, and of the parts of those still on their way."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Two streams may carry the same array, each in a thread of its own.
        self._lock = threading.RLock()
        make_folder(folder)

    def __contains__(self, sha256: bytes) -> bool:
        return self._path(sha256).exists()

    def held_bytes(self, manifest: Array) -> int:
        """Bytes of an array that are here already, from its start on."""
        with self._lock:
            if manifest.sha256 in self:
                return manifest.size_bytes
            part = self._part(manifest.sha256)
            if not part.exists():
                return 0
            held = part.stat().st_size
            if held < manifest.size_bytes:
                return held
            # All bytes, and no rename: a process died between the two.
            if not self._intact(part, manifest):
                part.unlink()
                return 0
            self._finish(part, manifest.sha256)
            return manifest.size_bytes

    def read(self, sha256: bytes) -> bytes:
        """All bytes of an array.

        Raises:
            Refusal: NOT_FOUND if it is not here; DATA_LOSS if it was damaged on the disk, and now is in quarantine.
        """
        with self._opened(sha256) as file:
            data = file.read()
        self._require_intact(sha256, hashlib.sha256(data).digest())
        return data

    def size_bytes(self, sha256: bytes) -> int:
        """Bytes of an array, which all are read to see that they are intact; for `chunk`.

        Raises:
            Refusal: as `read`.
        """
        with self._opened(sha256) as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            size = file.tell()
        self._require_intact(sha256, digest)
        return size

    def chunk(self, sha256: bytes, offset: int) -> ArrayChunk:
        """The chunk of an array at an offset, without what is before and behind it.

        Raises:
            Refusal: NOT_FOUND if the array is not here any more.
        """
        with self._opened(sha256) as file:
            file.seek(offset)
            return make_chunk(sha256, offset, file.read(CHUNK_BYTES))

    def put(self, sha256: bytes, data: bytes) -> None:
        """Keeps an array; on disk when it returns."""
        with self._lock:
            if sha256 not in self:
                part = self._part(sha256)
                try:
                    part.write_bytes(data)
                except OSError:  # as where the disk is full: what was written is of no use to anybody
                    part.unlink(missing_ok=True)
                    raise
                self._finish(part, sha256)

    def append(self, manifest: Array, chunk: ArrayChunk) -> None:
        """Keeps the next chunk of an array; the whole array is on disk when its last chunk has been appended.

        A chunk that is here already is passed over, so sending one twice is harmless.

        Raises:
            Refusal: DATA_LOSS for a bad checksum of chunk or array, INVALID_ARGUMENT for a gap or bytes behind the
                end. Nothing
                of a chunk that is refused is kept, nor anything of an array with a bad checksum.
        """
        with self._lock:
            check_chunk(chunk)
            end = chunk.offset + len(chunk.data)
            if end > manifest.size_bytes:
                raise invalid(f"array {manifest.name!r}: chunk ends at {end}, behind its {manifest.size_bytes} bytes")
            held = self.held_bytes(manifest)
            if end <= held:
                return
            if chunk.offset > held:
                raise invalid(f"array {manifest.name!r}: chunk starts at {chunk.offset}, expected {held}; resume there")
            part = self._part(manifest.sha256)
            with part.open("ab") as file:
                file.write(chunk.data[held - chunk.offset :])
            if end == manifest.size_bytes:
                if not self._intact(part, manifest):
                    part.unlink()
                    raise data_loss(
                        f"array {manifest.name!r}: its bytes do not have the SHA-256 of the manifest; send it again"
                    )
                self._finish(part, manifest.sha256)

    def discard(self, sha256: bytes) -> None:
        """Removes an array, and what there is of it."""
        with self._lock:
            self._path(sha256).unlink(missing_ok=True)
            self._part(sha256).unlink(missing_ok=True)

    def keep_only(self, wanted: Iterable[bytes], keep_parts: bool = True) -> None:
        """Removes every array that is not wanted any more; of those on their way only where `keep_parts` is false."""
        names = {sha256.hex() for sha256 in wanted}
        with self._lock:
            for path in self._folder.iterdir():
                if path.is_file() and path.stem not in names and not (keep_parts and path.suffix):
                    path.unlink(missing_ok=True)

    def _opened(self, sha256: bytes) -> BufferedReader:
        try:
            return self._path(sha256).open("rb")
        except FileNotFoundError as error:
            raise not_found(f"no array {sha256.hex()} is held here") from error

    def _require_intact(self, sha256: bytes, digest: bytes) -> None:
        if digest != sha256:
            quarantine(self._path(sha256))
            raise data_loss(f"array {sha256.hex()} was damaged on the disk of this service, and has been taken away")

    def _intact(self, part: Path, manifest: Array) -> bool:
        return hashlib.sha256(part.read_bytes()).digest() == manifest.sha256

    def _finish(self, part: Path, sha256: bytes) -> None:
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(self._path(sha256))
        sync_folder(self._folder)

    def _path(self, sha256: bytes) -> Path:
        return self._folder / sha256.hex()

    def _part(self, sha256: bytes) -> Path:
        return self._folder / f"{sha256.hex()}.part"
