"""What a caller may hand in as an image."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import grpc
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from feddymem.client.errors import InvalidRequestError
from feddymem.image_data import EncodedImage, RawImage

Image: TypeAlias = bytes | str | os.PathLike[str] | NDArray[np.uint8] | NDArray[np.uint16] | PIL.Image.Image
"""A file's bytes or path (JPEG, PNG, BMP or TIFF); pixels as an array of (height, width), or (height, width, 1, 3 or 4)
in R, G, B, alpha order; or a PIL image."""

_SENT_AS_THEY_ARE = ("L", "RGB", "RGBA")
_DEPTH_UNKNOWN = ("I", "F")


def as_library_image(image: Image) -> EncodedImage | RawImage:
    """An image as the library takes it; files and bytes are not decoded, pixels not encoded.

    Raises:
        InvalidRequestError: a file cannot be read, or pixels have a form that has no meaning as an image.
        TypeError: not an image at all.
    """
    if isinstance(image, bytes):
        return EncodedImage(image)
    if isinstance(image, str | os.PathLike):
        return EncodedImage(_read(Path(image)))
    if isinstance(image, PIL.Image.Image):
        return _from_array(_pil_pixels(image))
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise TypeError(f"cannot inspect {type(image).__name__}; expected bytes, a path, a numpy array or a PIL image")


def as_file(image: Image) -> bytes:
    """An image as an image file: files and bytes as they are, pixels as PNG, which loses nothing.

    Raises:
        InvalidRequestError: a file cannot be read, or pixels have a form that has no meaning as an image.
        TypeError: not an image at all.
    """
    sent = as_library_image(image)
    if isinstance(sent, EncodedImage):
        return sent.data
    depth: np.dtype[Any] = np.dtype(np.uint8) if sent.bits == 8 else np.dtype("<u2")
    pixels: NDArray[Any] = np.frombuffer(sent.data, depth).reshape(sent.height, sent.width, sent.channels)
    if not pixels.size:
        raise _invalid(f"image of {sent.height} x {sent.width} pixels; both sides must be at least 1")
    if sent.channels > 1:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR if sent.channels == 3 else cv2.COLOR_RGBA2BGRA)
    return cv2.imencode(".png", pixels)[1].tobytes()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # the latter for a path with a NUL
        raise _invalid(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _pil_pixels(image: PIL.Image.Image) -> NDArray[Any]:
    if image.mode in _DEPTH_UNKNOWN:
        raise _invalid(f"PIL image of mode {image.mode}: its range is unknown; convert it to L, I;16 or RGB")
    try:  # only here are the pixels of a file read that PIL has opened
        if image.mode in _SENT_AS_THEY_ARE or image.mode.startswith("I;16"):
            return np.asarray(image)
        return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise _invalid(f"PIL image cannot be read: {error}") from error


def _from_array(pixels: NDArray[Any]) -> RawImage:
    channels = 1 if pixels.ndim == 2 else pixels.shape[-1]
    if pixels.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise _invalid(
            f"array of shape {pixels.shape}; expected (height, width) or (height, width, 1, 3 or 4), channels last"
        )
    if pixels.dtype.kind != "u" or pixels.dtype.itemsize not in (1, 2):
        raise _invalid(f"array of {pixels.dtype}; expected uint8 or uint16 with values over its full range")
    bits = 8 * pixels.dtype.itemsize
    # The only copy: protobuf takes bytes and nothing else.
    data = pixels.astype(pixels.dtype.newbyteorder("<"), copy=False).tobytes()
    return RawImage(data, height=pixels.shape[0], width=pixels.shape[1], channels=channels, bits=bits)


def _invalid(text: str) -> InvalidRequestError:
    return InvalidRequestError(grpc.StatusCode.INVALID_ARGUMENT, text)
