"""Decoding images: JPEG, PNG, BMP and TIFF, 8 and 16 bits, grey, RGB and RGBA.

Pillow reads the header, so that a decompression bomb is refused before a pixel is decoded; OpenCV decodes: faster than
Pillow on JPEG, keeps 16 bits, and refuses truncated files (`python -m benchmarks.decoders`, docs/method.md).
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from feddymem.image_data import EncodedImage, RawImage

FORMATS = ("JPEG", "PNG", "BMP", "TIFF")
MAX_PIXELS = 64_000_000
"""Default limit of an image's pixels, checked before decoding: 8,000 x 8,000."""

_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR, _TILE_WIDTH, _TILE_LENGTH = 258, 262, 284, 322, 323
_WHITE_IS_ZERO = 0
_SAMPLE_FORMAT, _UNSIGNED = 339, 1
_LARGEST_TILE = 2**20
_ORIENTATION, _TURNED = 274, range(2, 9)

_JPEGS = ("JPEG", "MPO")
"""Pillow's names of a JPEG; the latter is one with others behind it, as of many cameras."""

_REDUCED_SIDES = 2
"""A JPEG is decoded at a smaller scale only if that is still so many times the side it will be stretched to (ours)."""
_FLAGS = {
    1: cv2.IMREAD_UNCHANGED,
    2: cv2.IMREAD_REDUCED_COLOR_2 | cv2.IMREAD_IGNORE_ORIENTATION,
    4: cv2.IMREAD_REDUCED_COLOR_4 | cv2.IMREAD_IGNORE_ORIENTATION,
    8: cv2.IMREAD_REDUCED_COLOR_8 | cv2.IMREAD_IGNORE_ORIENTATION,
}
_RAW_TYPES: dict[int, np.dtype[Any]] = {8: np.dtype(np.uint8), 16: np.dtype("<u2"), 32: np.dtype("<f4")}

_Value = TypeVar("_Value", np.uint8, np.float32)

Pixels = NDArray[np.uint8] | NDArray[np.float32]
"""(height, width, 3), R, G, B, values 0..255; float32 where the source has more than 8 bits."""

# The limit is ours, by argument, and an error; Pillow's own is a process-wide warning.
Image.MAX_IMAGE_PIXELS = None
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
# What Pillow warns of is in a file that somebody has sent; Python keeps each text of a warning for ever.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class ImageError(ValueError):
    """An image cannot be decoded, or is larger than allowed."""


class TooManyPixelsError(ImageError):
    """An image is larger than allowed.

    Attributes:
        pixels: that it has.
    """

    def __init__(self, text: str, pixels: int) -> None:
        super().__init__(text)
        self.pixels = pixels


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded image, which may be smaller than it was sent.

    Attributes:
        pixels: see `Pixels`.
        height: rows of the image as it was sent.
        width: columns of the image as it was sent.
    """

    pixels: Pixels
    height: int
    width: int


def read(image: EncodedImage | RawImage, max_pixels: int = MAX_PIXELS, side: int | None = None) -> Picture:
    """Decodes an image.

    16-bit values are scaled to 0..255 with their fractions kept; alpha is dropped; EXIF orientation is not applied, so
    that results line up with the stored pixels (a TIFF that is to be turned is refused: no decoder leaves it as it is).

    Args:
        image: the image.
        max_pixels: of the image as it was sent; checked before anything is decoded.
        side: of the square that it will be stretched to: a JPEG that is several times as large is decoded at a half,
            quarter or eighth of its size, of which both sides are still at least twice this long. None for full size.

    Raises:
        ImageError: not a JPEG, PNG, BMP or TIFF, corrupt, truncated, of a depth other than 8 or 16 bits, or raw with
            sizes that do not fit together; `TooManyPixelsError` for more than `max_pixels`.
    """
    if isinstance(image, RawImage):
        return Picture(_from_raw(image, max_pixels), image.height, image.width)
    if not image.data:
        raise ImageError("image is empty (0 bytes)")
    header = _check_header(image.data, max_pixels)
    if header.by_pillow:
        pixels: Pixels = _decode_by_pillow(image.data)
    else:
        pixels = to_rgb(_decode_by_opencv(image.data, _reduction(header, side)))
    return Picture(pixels, header.height, header.width)


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decodes an image file's bytes at full size; see `read`."""
    return read(EncodedImage(data), max_pixels).pixels


def _reduction(header: _Header, side: int | None) -> int:
    if side is None or not header.is_jpeg:
        return 1
    return next((r for r in (8, 4, 2) if min(header.height, header.width) >= _REDUCED_SIDES * r * side), 1)


def _decode_by_opencv(data: bytes, reduction: int) -> NDArray[np.generic]:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _FLAGS[reduction])
    except cv2.error as error:
        raise ImageError(f"image cannot be decoded: {error.err or 'corrupt data'}") from error
    if pixels is None:
        raise ImageError(f"image cannot be decoded: its {len(data)} bytes are corrupt or truncated")
    if pixels.ndim == 3 and pixels.shape[2] >= 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGB)
    return np.asarray(pixels)


def decode_file(path: Path, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decodes an image file; see `decode`.

    Raises:
        ImageError: the file cannot be read or decoded; the text names it.
    """
    try:
        return decode(path.read_bytes(), max_pixels)
    except (ImageError, OSError) as error:
        raise ImageError(f"{path}: {error}") from error


def _from_raw(raw: RawImage, max_pixels: int) -> Pixels:
    height, width, channels, bits = raw.height, raw.width, raw.channels, raw.bits
    if channels not in (1, 3, 4) or bits not in _RAW_TYPES:
        raise ImageError(
            f"raw image has {channels} channels of {bits} bits; expected 1, 3 or 4 channels of 8, 16 or 32 bits"
        )
    _check_size(height, width, max_pixels)
    expected = height * width * channels * bits // 8
    size = memoryview(raw.data).nbytes
    if size != expected:
        raise ImageError(f"raw image has {size} bytes; {height} x {width} x {channels} x {bits} bits need {expected}")
    return to_rgb(np.frombuffer(raw.data, _RAW_TYPES[bits]).reshape(height, width, channels))


def to_rgb(pixels: NDArray[np.generic]) -> Pixels:
    """Brings decoded pixels, (height, width) or (height, width, 1, 3 or 4) in R, G, B, alpha order, to `Pixels`.

    Raises:
        ImageError: a depth other than 8 or 16 bits, or another number of channels.
    """
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if channels not in (1, 3, 4):
        raise ImageError(f"image has {channels} channels; expected 1 (grey), 3 (RGB) or 4 (RGBA)")
    if pixels.dtype == np.uint8:
        return _three_channels(pixels.astype(np.uint8, copy=False))
    if pixels.dtype == np.uint16:
        return _three_channels(pixels.astype(np.float32) / np.float32(257))
    if pixels.dtype == np.float32:
        if not (pixels.min() >= 0 and pixels.max() <= 255):  # NaN is neither
            raise ImageError("image has float values that are NaN or outside of 0..255")
        return _three_channels(pixels.astype(np.float32, copy=False))
    raise ImageError(f"image has values of type {pixels.dtype}; expected 8 or 16 bits per channel")


def _three_channels(values: NDArray[_Value]) -> NDArray[_Value]:
    if values.ndim == 2 or values.shape[2] == 1:
        return np.repeat(values.reshape(*values.shape[:2], 1), 3, axis=2)
    return values[:, :, :3]


@dataclass(frozen=True)
class _Header:
    height: int
    width: int
    is_jpeg: bool
    by_pillow: bool


def _check_header(data: bytes, max_pixels: int) -> _Header:
    """Refuses what must not be decoded."""
    try:
        with Image.open(_HeaderBytes(data), formats=FORMATS) as header:
            width, height = header.size
            _check_size(height, width, max_pixels)
            by_pillow = isinstance(header, TiffImageFile) and _check_tiff(header.tag_v2, height, width)
            kind = header.format
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"image is not a readable JPEG, PNG, BMP or TIFF ({len(data)} bytes)") from error
    except Exception as error:  # a corrupt header can fail anywhere in Pillow's parsers, and its tags have any type
        raise ImageError(f"image header is corrupt: {error}") from error
    if kind == "PNG":
        _check_png_chunks(data)
    return _Header(height, width, kind in _JPEGS, by_pillow)


def _check_tiff(tags: ImageFileDirectory_v2, height: int, width: int) -> bool:
    """Refuses a TIFF that must not be decoded; whether Pillow is to decode it, as those of 8 bits.

    OpenCV multiplies the colours of such a TIFF by its alpha, and takes the planes and the inverted greys of 16-bit
    ones for what they are not. Both decoders turn an image that says that it is to be turned.
    """
    tile_width, tile_length = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)
    if tile_width * tile_length > max(_LARGEST_TILE, 4 * height * width):
        raise ImageError(f"image has TIFF tiles of {tile_width} x {tile_length} for {width} x {height} pixels")
    if tags.get(_ORIENTATION, 1) in _TURNED:
        raise ImageError(
            f"image is a TIFF to be turned (orientation {tags[_ORIENTATION]}); save it as it is to be seen"
        )
    if set(tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))) != {_UNSIGNED}:
        raise ImageError("image is a TIFF of signed or floating-point values; expected unsigned 8 or 16 bits")
    if max(tags.get(_BITS_PER_SAMPLE, (1,))) <= 8:
        return True
    if tags.get(_PLANAR, 1) != 1 or tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise ImageError(
            "image is a TIFF of separate planes or inverted greys with more than 8 bits; save it interleaved"
        )
    return False


class _HeaderBytes(io.BytesIO):
    """An image's bytes, of which no more is read than a header has: Pillow takes what comes before the pixels apart in
    Python, and a few MiB of empty segments would keep it at that for seconds, in a hundred times their memory."""

    reads_left, bytes_left = 20_000, 16 * 2**20

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.reads_left -= 1
        self.bytes_left -= len(data)
        if self.reads_left < 0 or self.bytes_left < 0:
            raise ImageError("image has too much before its pixels; save it without metadata")
        return data


def _check_png_chunks(data: bytes) -> None:
    """Refuses a PNG with a chunk that claims to reach behind the end: the decoder would allocate what it claims."""
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        position += 12 + length
        if kind == b"IEND" and position <= len(data):
            return
    if position != len(data):
        raise ImageError(f"image is a PNG that is truncated or corrupt near byte {min(position, len(data))}")


def _decode_by_pillow(data: bytes) -> Pixels:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:  # a corrupt file can fail anywhere in Pillow's parsers
        raise ImageError(f"image cannot be decoded: {error}") from error


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"image is {width} x {height} pixels; both sides must be at least 1")
    if height * width > max_pixels:
        text = f"image is {width} x {height} = {height * width} pixels; at most {max_pixels} are allowed"
        raise TooManyPixelsError(text, height * width)
