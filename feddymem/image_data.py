"""Images as they are sent, not decoded; a client needs no more than this."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """A JPEG, PNG, BMP or TIFF file.

    Attributes:
        data: the file's bytes.
    """

    data: bytes


@dataclass(frozen=True, eq=False)
class RawImage:
    """Pixels without a codec.

    Attributes:
        data: rows of interleaved channels, little-endian.
        height: rows.
        width: columns.
        channels: 1 (grey), 3 (R, G, B) or 4 (R, G, B, alpha).
        bits: of a channel: 8 or 16, of which the full range counts, or 32 for floats of 0..255.
    """

    data: bytes | memoryview
    height: int
    width: int
    channels: int
    bits: int
