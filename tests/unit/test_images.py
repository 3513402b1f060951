"""Decoding: right values from every format and from raw pixels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from feddymem.images import ImageError, decode, decode_file, from_raw, to_rgb
from tests.unit.encoded_images import (
    HEIGHT,
    LOSSLESS,
    WIDTH,
    encode,
    expected,
    pillow,
    png,
    random_values,
    smooth,
    tiff,
)


@pytest.mark.parametrize(("kind", "dtype", "channels"), LOSSLESS)
def test_lossless_formats_give_exact_values(kind: str, dtype: str, channels: int) -> None:
    stored = random_values(dtype, channels)
    pixels = decode(encode(kind, stored))
    assert pixels.dtype == (np.uint8 if dtype == "uint8" else np.float32)
    np.testing.assert_allclose(pixels, expected(stored), atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_gives_the_values_up_to_its_loss(channels: int) -> None:
    stored = smooth() if channels == 3 else smooth()[:, :, 0]
    data = pillow(Image.fromarray(stored), "JPEG", quality=100, subsampling=0)
    np.testing.assert_allclose(decode(data), expected(stored), atol=3)


@pytest.mark.parametrize(("colour", "channel"), [((200, 10, 10), 0), ((10, 200, 10), 1), ((10, 10, 200), 2)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF"])
def test_channels_come_as_red_green_blue(kind: str, colour: tuple[int, int, int], channel: int) -> None:
    pixels = decode(pillow(Image.new("RGB", (16, 16), colour), kind))
    means = pixels.mean(axis=(0, 1))
    assert means.argmax() == channel
    assert means[channel] > 190


def test_16_bits_keep_their_fractions() -> None:
    stored = np.array([[0, 1, 256, 257, 32_768, 65_534, 65_535]], np.uint16)
    pixels = decode(png(stored))
    np.testing.assert_allclose(pixels[0, :, 0], [0, 1 / 257, 256 / 257, 1, 32_768 / 257, 65_534 / 257, 255], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_alpha_is_dropped_and_does_not_darken(kind: str, dtype: str) -> None:
    full = np.iinfo(dtype).max
    stored = np.full((HEIGHT, WIDTH, 4), full, dtype)
    stored[:, :, 1], stored[:, :, 3] = full // 5, full // 3
    np.testing.assert_allclose(decode(encode(kind, stored))[0, 0], [255, 51, 255], atol=0.1)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"byteorder": ">"}, id="big-endian"),
        pytest.param({"compression": "zlib", "predictor": True}, id="zlib with predictor"),
        pytest.param({"compression": "lzw"}, id="lzw"),
        pytest.param({"rowsperstrip": 5}, id="strips"),
        pytest.param({"tile": (32, 32)}, id="tiles"),
        pytest.param({"bigtiff": True}, id="bigtiff"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_kinds_of_tiff_give_the_same_values(channels: int, options: dict[str, Any], dtype: str) -> None:
    stored = random_values(dtype, channels)
    np.testing.assert_allclose(decode(tiff(stored, **options)), expected(stored), atol=1e-4)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_tiff_of_separate_colour_planes_has_right_colours_or_is_refused(dtype: str) -> None:
    stored = random_values(dtype, 3)
    data = tiff(np.ascontiguousarray(stored.transpose(2, 0, 1)), planarconfig="separate", extrasamples=[])
    try:
        pixels = decode(data)
    except ImageError:
        return
    np.testing.assert_allclose(pixels, expected(stored), atol=1e-4)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_tiff_in_which_zero_is_white_is_inverted_or_refused(dtype: str) -> None:
    stored = random_values(dtype, 1)
    data = tiff(stored, photometric="miniswhite")
    try:
        pixels = decode(data)
    except ImageError:
        return
    np.testing.assert_allclose(pixels, 255 - expected(stored), atol=1e-4)


def test_a_tiff_of_several_pages_gives_the_first() -> None:
    pages = np.stack([random_values("uint8", 1, seed) for seed in range(3)])
    np.testing.assert_array_equal(decode(tiff(pages, photometric="minisblack", extrasamples=[])), expected(pages[0]))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_a_palette_is_looked_up(kind: str) -> None:
    image = Image.fromarray(smooth()).quantize(16)
    np.testing.assert_array_equal(decode(pillow(image, kind)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_converted_to_rgb(kind: str) -> None:
    data = pillow(Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK"), kind)
    np.testing.assert_allclose(decode(data), np.broadcast_to([200, 30, 60], (16, 16, 3)), atol=3)


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = decode(pillow(Image.fromarray(smooth()), "JPEG", exif=exif.tobytes(), quality=100, subsampling=0))
    np.testing.assert_allclose(pixels, smooth(), atol=3)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int16", "int32", "uint32"])
def test_other_depths_are_refused(dtype: str) -> None:
    with pytest.raises(ImageError):
        decode(tiff((smooth()[:, :, 0]).astype(dtype)))


def test_a_refused_depth_is_named() -> None:
    with pytest.raises(ImageError, match="floating-point values; expected unsigned 8 or 16 bits"):
        decode(tiff((smooth()[:, :, 0] / 255).astype(np.float32)))


@pytest.mark.parametrize("channels", [2, 5])
def test_other_numbers_of_channels_are_refused(channels: int) -> None:
    with pytest.raises(ImageError, match=f"{channels} channels"):
        to_rgb(np.zeros((4, 4, channels), np.uint8))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_raw_pixels_give_exact_values(channels: int, bits: int) -> None:
    stored = random_values(f"uint{bits}", channels)
    data = stored.astype(f"<u{bits // 8}").tobytes()
    np.testing.assert_allclose(from_raw(data, HEIGHT, WIDTH, channels, bits), expected(stored), atol=1e-4)


def test_raw_16_bit_values_are_little_endian() -> None:
    assert from_raw(b"\x00\x01\xff\x00", 1, 2, 1, 16)[0, :, 0].tolist() == pytest.approx([256 / 257, 255 / 257])


@pytest.mark.parametrize("length", [0, 1, 11, 13, 24])
def test_raw_pixels_of_another_length_are_refused(length: int) -> None:
    with pytest.raises(ImageError, match=f"{length} bytes; 2 x 2 x 3 x 8 bits need 12"):
        from_raw(bytes(length), 2, 2, 3, 8)


@pytest.mark.parametrize(("channels", "bits"), [(0, 8), (2, 8), (5, 8), (3, 1), (3, 12), (3, 32), (-1, 8)])
def test_raw_pixels_of_another_layout_are_refused(channels: int, bits: int) -> None:
    with pytest.raises(ImageError, match=f"{channels} channels of {bits} bits"):
        from_raw(bytes(12), 2, 2, channels, bits)


@pytest.mark.parametrize(("height", "width"), [(0, 4), (4, 0), (-2, -2), (-1, 4)])
def test_raw_pixels_without_an_area_are_refused(height: int, width: int) -> None:
    with pytest.raises(ImageError, match="both sides must be at least 1"):
        from_raw(bytes(abs(height * width)), height, width, 1, 8)


def test_raw_pixels_beyond_the_limit_are_refused() -> None:
    with pytest.raises(ImageError, match="at most 15 are allowed"):
        from_raw(bytes(16), 4, 4, 1, 8, max_pixels=15)


def test_a_file_is_decoded_like_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "part.png"
    path.write_bytes(png(smooth()))
    np.testing.assert_array_equal(decode_file(path), smooth())


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(ImageError, match=re.escape(str(path))):
            decode_file(path)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"text")
    with pytest.raises(ImageError, match=r"broken\.png: image is not a readable"):
        decode_file(broken)
