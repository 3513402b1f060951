"""Small files on disk: written whole or not at all, and never read when they were damaged since."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import Counter

from services.runtime.logs import get_logger

QUARANTINED_FILES = 8
"""Damaged files that a quarantine keeps, the newest: enough to see what happens to a disk, too few to fill it."""

DAMAGED = Counter("feddymem_damaged_files_total", "Files of the state folder that were found damaged.")

_DIGEST_BYTES = hashlib.sha256().digest_size

_log = get_logger()


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """A state folder is this process's alone inside the block; when it dies, however, the folder is free.

    Raises:
        ValueError: it is another process's.
        OSError: it cannot be written.
    """
    make_folder(folder)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"state_dir: {folder} is in use by another process; stop that one, or give another folder"
            ) from error
        yield


def write_record(path: Path, data: bytes) -> None:
    """Writes a small file for `read_record`; on disk when it returns."""
    write_atomically(path, hashlib.sha256(data).digest() + data)


def read_record(path: Path) -> bytes | None:
    """What `write_record` wrote; None where there is none, or where it was damaged and now is in quarantine."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        quarantine(path)
        return None
    return data


def quarantine(path: Path) -> None:
    """Moves a damaged file to the folder `quarantine` beside it, for whoever wants to know what happened to it."""
    _log.error("file_damaged", path=str(path))
    DAMAGED.inc()
    folder = path.parent / "quarantine"
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # another thread was first
        path.replace(folder / f"{time.time_ns()}-{path.name}")
    for old in sorted(folder.iterdir())[:-QUARANTINED_FILES]:
        old.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, or a restart, sees the old or the new content and nothing between.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        part.unlink(missing_ok=True)
        raise
    part.replace(path)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Makes a folder, with those above it, that survives a power cut."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
