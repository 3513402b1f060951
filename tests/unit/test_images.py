"""Decoding: right values from every format and from raw pixels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from feddymem.image_data import EncodedImage, RawImage
from feddymem.images import ImageError, Pixels, decode, decode_file, read, to_rgb
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


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_that_is_to_be_turned_is_refused(dtype: str, orientation: int) -> None:
    stored = random_values(dtype, 3)
    data = tiff(stored, extratags=[(274, "H", 1, orientation, True)])
    if orientation == 1:
        np.testing.assert_allclose(decode(data), expected(stored), rtol=1e-6)
        return
    with pytest.raises(ImageError, match=rf"to be turned \(orientation {orientation}\)"):
        decode(data)


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


def from_raw(data: bytes, height: int, width: int, channels: int, bits: int, max_pixels: int = 100) -> Pixels:
    return read(RawImage(data, height, width, channels, bits), max_pixels).pixels


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_raw_pixels_give_exact_values(channels: int, bits: int) -> None:
    stored = random_values(f"uint{bits}", channels)
    data = stored.astype(f"<u{bits // 8}").tobytes()
    np.testing.assert_allclose(
        from_raw(data, HEIGHT, WIDTH, channels, bits, HEIGHT * WIDTH), expected(stored), atol=1e-4
    )


def test_raw_16_bit_values_are_little_endian() -> None:
    assert from_raw(b"\x00\x01\xff\x00", 1, 2, 1, 16)[0, :, 0].tolist() == pytest.approx([256 / 257, 255 / 257])


@pytest.mark.parametrize("length", [0, 1, 11, 13, 24])
def test_raw_pixels_of_another_length_are_refused(length: int) -> None:
    with pytest.raises(ImageError, match=f"{length} bytes; 2 x 2 x 3 x 8 bits need 12"):
        from_raw(bytes(length), 2, 2, 3, 8)


@pytest.mark.parametrize(("channels", "bits"), [(0, 8), (2, 8), (5, 8), (3, 1), (3, 12), (3, 64), (-1, 8)])
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


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def test_raw_floats_are_taken_as_they_are() -> None:
    assert from_raw(floats(0, 0.25, 254.9, 255), 2, 2, 1, 32)[:, :, 1].tolist() == [
        [0, 0.25],
        [pytest.approx(254.9), 255],
    ]
    colours = from_raw(floats(1.5, 2.5, 3.5, 255), 1, 1, 4, 32)
    assert colours.dtype == np.float32
    assert colours.tolist() == [[[1.5, 2.5, 3.5]]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.001, 255.001, 1e30])
@pytest.mark.parametrize("place", [0, 3, 5])
def test_raw_floats_that_are_no_brightness_are_refused(place: int, value: float) -> None:
    values = [7.0] * 6
    values[place] = value
    with pytest.raises(ImageError, match=r"float values that are NaN or outside of 0\.\.255"):
        from_raw(floats(*values), 1, 2, 3, 32)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_raw_pixels_may_be_a_view_of_memory(bits: int) -> None:
    """Of a part of a larger message, or of an array."""
    array = (np.arange(12) * 20).astype({8: "u1", 16: "<u2", 32: "<f4"}[bits])
    expected_pixels = from_raw(array.tobytes(), 2, 2, 3, bits)
    message = memoryview(b"abc" + array.tobytes() + b"d")
    for view in (message[3:-1], array.data, array.reshape(2, 2, 3).data):
        picture = read(RawImage(view, 2, 2, 3, bits))
        np.testing.assert_array_equal(picture.pixels, expected_pixels)
    with pytest.raises(ImageError, match=f"{len(message)} bytes; 2 x 2 x 3 x {bits} bits need {12 * bits // 8}"):
        read(RawImage(message, 2, 2, 3, bits))


def jpeg(height: int, width: int, grey: bool = False, **options: Any) -> bytes:
    """Smooth: brighter to the right and, in green, downwards."""
    rows, columns = np.mgrid[:height, :width]
    stored = np.stack([columns * 255 / width, rows * 255 / height, np.full(rows.shape, 60)], 2).astype(np.uint8)
    return pillow(Image.fromarray(stored[:, :, 0] if grey else stored), "JPEG", quality=95, **options)


@pytest.mark.parametrize(
    ("height", "width", "side", "reduction"),
    [
        (512, 512, None, 1),
        (512, 512, 32, 8),
        (511, 700, 32, 4),
        (700, 511, 32, 4),
        (256, 300, 32, 4),
        (255, 255, 32, 2),
        (128, 1000, 32, 2),
        (127, 1000, 32, 1),
        (64, 64, 64, 1),
        (515, 601, 32, 8),
    ],
)
@pytest.mark.parametrize("grey", [False, True])
def test_a_jpeg_is_decoded_smaller_where_it_stays_twice_as_large_as_needed(
    grey: bool, height: int, width: int, side: int | None, reduction: int
) -> None:
    data = jpeg(height, width, grey)
    picture = read(EncodedImage(data), side=side)
    assert (picture.height, picture.width) == (height, width)
    assert picture.pixels.dtype == np.uint8
    assert picture.pixels.shape == (-(-height // reduction), -(-width // reduction), 3)
    full = Image.fromarray(np.asarray(decode(data), np.uint8))
    whole = height // reduction * reduction, width // reduction * reduction  # without blocks that are not full
    smaller = np.asarray(full.crop((0, 0, whole[1], whole[0])).reduce(reduction)).astype(int)
    kept = picture.pixels[: whole[0] // reduction, : whole[1] // reduction]
    np.testing.assert_allclose(kept, smaller, atol=4)


def test_a_reduced_jpeg_has_red_green_and_blue_in_this_order() -> None:
    data = pillow(Image.new("RGB", (128, 128), (200, 100, 10)), "JPEG", quality=95)
    picture = read(EncodedImage(data), side=16)
    assert picture.pixels.shape == (32, 32, 3)
    np.testing.assert_allclose(picture.pixels, np.broadcast_to([200, 100, 10], (32, 32, 3)), atol=3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_not_applied_at_a_smaller_scale(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain, turned = (
        read(EncodedImage(data), side=32) for data in (jpeg(256, 384), jpeg(256, 384, exif=exif.tobytes()))
    )
    assert (turned.height, turned.width, turned.pixels.shape) == (256, 384, (64, 96, 3))
    np.testing.assert_array_equal(turned.pixels, plain.pixels)


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
@pytest.mark.parametrize("side", [None, 64, 32, 16])
def test_a_truncated_jpeg_is_refused_at_every_scale(side: int | None, options: dict[str, Any]) -> None:
    data = jpeg(256, 256, **options)
    assert read(EncodedImage(data), side=side).height == 256
    for share in (0.3, 0.6, 0.9, 0.99):
        with pytest.raises(ImageError):
            read(EncodedImage(data[: int(share * len(data))]), side=side)


def test_a_jpeg_with_another_behind_it_is_decoded_like_it_alone() -> None:
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 280, 3)).astype(np.uint8))
    several = pillow(pixels, "MPO", save_all=True, append_images=[Image.new("RGB", (300, 300))])
    alone, first = (read(EncodedImage(data), side=32) for data in (pillow(pixels, "JPEG"), several))
    assert (first.height, first.width, first.pixels.shape) == (300, 280, (75, 70, 3))
    np.testing.assert_array_equal(first.pixels, alone.pixels)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_only_jpegs_are_decoded_smaller(kind: str) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (300, 280, 3)).astype(np.uint8)
    picture = read(EncodedImage(pillow(Image.fromarray(stored), kind)), side=16)
    np.testing.assert_array_equal(picture.pixels, stored)
    assert (picture.height, picture.width) == (300, 280)


def test_the_limit_counts_the_pixels_of_the_file_and_not_those_that_are_decoded() -> None:
    with pytest.raises(ImageError, match="at most 65535 are allowed"):
        read(EncodedImage(jpeg(256, 256)), max_pixels=65_535, side=16)


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
