"""Images written in every format that is decoded."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from feddymem.images import Pixels

Stored = NDArray[Any]

HEIGHT, WIDTH = 22, 31
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}

LOSSLESS = [
    *[("PNG", dtype, channels) for dtype in ("uint8", "uint16") for channels in (1, 2, 3, 4)],
    *[("TIFF", dtype, channels) for dtype in ("uint8", "uint16") for channels in (1, 3, 4)],
    *[("BMP", "uint8", channels) for channels in (1, 3, 4)],
]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int, bits: int, colour_type: int) -> bytes:
    return PNG_SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))


def png(stored: Stored) -> bytes:
    """Written here because Pillow cannot write 16-bit RGB, and OpenCV is what is under test."""
    stored = stored.reshape(*stored.shape[:2], -1)
    height, width, channels = stored.shape
    rows = stored.astype(">u2" if stored.dtype == np.uint16 else "u1")
    scanlines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = png_header(width, height, 8 * stored.dtype.itemsize, PNG_COLOUR_TYPES[channels])
    return header + chunk(b"IDAT", zlib.compress(scanlines)) + chunk(b"IEND", b"")


def tiff(stored: Stored, **options: Any) -> bytes:
    colour: dict[str, Any] = {"photometric": "minisblack"}
    if stored.ndim == 3:
        colour = {"photometric": "rgb", "extrasamples": ["unassalpha"] * (stored.shape[2] - 3)}
    file = io.BytesIO()
    tifffile.imwrite(file, stored, **(colour | options))
    return file.getvalue()


def pillow(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def random_values(dtype: str, channels: int, seed: int = 0) -> Stored:
    shape = (HEIGHT, WIDTH) if channels == 1 else (HEIGHT, WIDTH, channels)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def smooth() -> NDArray[np.uint8]:
    """Red grows to the right, green downwards; blue is constant."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([columns * 7, rows * 10, np.full_like(rows, 60)], axis=2).astype(np.uint8)


def encode(kind: str, stored: Stored) -> bytes:
    if kind == "PNG":
        return png(stored)
    return tiff(stored) if kind == "TIFF" else pillow(Image.fromarray(stored), kind)


def expected(stored: Stored) -> NDArray[np.float64]:
    """R, G, B in 0..255 of stored grey, grey and alpha, RGB or RGBA."""
    stored = stored.reshape(*stored.shape[:2], -1)
    values = stored.astype(np.float64) * 255 / np.iinfo(stored.dtype).max
    return np.repeat(values[:, :, :1], 3, axis=2) if stored.shape[2] < 3 else values[:, :, :3]


def assert_is_pixels(pixels: Pixels) -> None:
    assert pixels.dtype in (np.uint8, np.float32)
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.min() >= 0
    assert pixels.max() <= 255


SAMPLES: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: png(smooth()),
    "PNG, 16 bits, RGBA": lambda: png(random_values("uint16", 4)),
    "PNG, palette": lambda: pillow(Image.fromarray(smooth()).quantize(8), "PNG"),
    "JPEG": lambda: pillow(Image.fromarray(smooth()), "JPEG"),
    "JPEG, progressive": lambda: pillow(Image.fromarray(smooth()), "JPEG", progressive=True),
    "BMP": lambda: pillow(Image.fromarray(smooth()), "BMP"),
    "BMP, palette": lambda: pillow(Image.fromarray(smooth()).quantize(8), "BMP"),
    "TIFF": lambda: tiff(smooth()),
    "TIFF, strips": lambda: tiff(smooth(), rowsperstrip=4),
    "TIFF, zlib, 16 bits": lambda: tiff(random_values("uint16", 3), compression="zlib"),
    "TIFF, LZW": lambda: tiff(smooth(), compression="lzw"),
}


def huge_png() -> bytes:
    return png_header(30_000, 30_000, 8, 2) + chunk(b"IDAT", zlib.compress(bytes(30_000))) + chunk(b"IEND", b"")


def huge_bmp() -> bytes:
    return (
        b"BM" + struct.pack("<IHHI", 1000, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 30_000, 30_000, 1, 24, *[0] * 6)
    )


def huge_jpeg() -> bytes:
    data = bytearray(pillow(Image.fromarray(smooth()), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 30_000, 30_000)
    return bytes(data)


def with_tags(data: bytes, values: dict[int, int]) -> bytes:
    """A little-endian TIFF with other values of some tags of one value each."""
    changed = bytearray(data)
    for tag, value in values.items():
        entry = next(at for kind in (3, 4) if (at := data.find(struct.pack("<HHI", tag, kind, 1))) > 0)
        changed[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, value)
    return bytes(changed)


def huge_tiff() -> bytes:
    return with_tags(tiff(smooth()), {256: 30_000, 257: 30_000})


def png_that_claims_a_long_chunk() -> bytes:
    data = bytearray(png(smooth()))
    data[33:37] = struct.pack(">I", 512 * 2**20)
    return bytes(data)


def png_whose_end_claims_to_be_long() -> bytes:
    return png_header(WIDTH, HEIGHT, 8, 0) + struct.pack(">I", 512 * 2**20) + b"IEND" + bytes(40)


def tiff_that_claims_a_huge_tile() -> bytes:
    return with_tags(tiff(smooth(), tile=(32, 32)), {322: 16_384, 323: 8_192})


BOMBS = (
    *(huge_png, huge_bmp, huge_jpeg, huge_tiff),
    *(png_that_claims_a_long_chunk, png_whose_end_claims_to_be_long, tiff_that_claims_a_huge_tile),
)
"""Small files that claim to be huge."""
