"""Files that appear whole or not at all, with their SHA-256 before their content, so that a damaged one is found."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

DIGEST_BYTES = hashlib.sha256().digest_size


def read(path: Path) -> memoryview | None:
    """The content of a file that `write` has written; None where it is damaged.

    Raises:
        OSError: it cannot be read.
    """
    stored = memoryview(path.read_bytes())
    digest, content = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


def write(path: Path, content: bytes) -> None:
    """Writes a file, or replaces it, so that others see it whole or not at all.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=f"{path.suffix}.part", delete=False) as part:
        try:
            part.write(hashlib.sha256(content).digest() + content)
            part.close()
            Path(part.name).replace(path)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise
