"""Decoding: right values from every format, an ImageError and nothing else from everything that is not an image."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from feddymem.images import ImageError, Pixels, decode, decode_file, from_raw, to_rgb

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


def test_no_bytes_are_refused() -> None:
    with pytest.raises(ImageError, match="empty"):
        decode(b"")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"not an image at all, but a line of text\n" * 20, id="text"),
        pytest.param(b"\0" * 1000, id="zeros"),
        pytest.param(PNG_SIGNATURE, id="PNG signature alone"),
        pytest.param(b"\xff\xd8\xff", id="JPEG signature alone"),
        pytest.param(b"BM", id="BMP signature alone"),
        pytest.param(b"II*\0", id="TIFF signature alone"),
        pytest.param(pillow(Image.new("RGB", (8, 8)), "GIF"), id="GIF"),
        pytest.param(pillow(Image.new("RGB", (8, 8)), "PPM"), id="PPM"),
    ],
)
def test_what_is_not_one_of_the_formats_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode(data)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_truncated_file_is_refused_wherever_it_ends(name: str) -> None:
    data = SAMPLES[name]()
    ends = {*range(0, len(data), 1 + len(data) // 150), *range(len(data) - 20, len(data))}
    for end in sorted(ends):
        with pytest.raises(ImageError):
            decode(data[:end])


@pytest.mark.parametrize("name", SAMPLES)
def test_a_file_of_which_half_is_overwritten_gives_pixels_or_an_image_error(name: str) -> None:
    data = SAMPLES[name]()
    noise = np.random.default_rng(0).bytes(len(data))
    for start in range(0, len(data), 1 + len(data) // 40):
        try:
            assert_is_pixels(decode(data[:start] + noise[start:], max_pixels=20_000))
        except ImageError:
            continue


@given(st.sampled_from([b"", PNG_SIGNATURE, b"\xff\xd8\xff\xe0", b"BM", b"II*\0", b"MM\0*"]), st.binary(max_size=200))
def test_random_bytes_give_pixels_or_an_image_error(signature: bytes, rest: bytes) -> None:
    try:
        assert_is_pixels(decode(signature + rest, max_pixels=20_000))
    except ImageError:
        return


@given(st.sampled_from(sorted(SAMPLES)), st.lists(st.integers(0, 2**20), min_size=1, max_size=6))
def test_flipped_bits_give_pixels_within_the_limit_or_an_image_error(name: str, flips: list[int]) -> None:
    data = bytearray(SAMPLES[name]())
    for flip in flips:
        data[flip // 8 % len(data)] ^= 1 << flip % 8
    try:
        pixels = decode(bytes(data), max_pixels=20_000)
    except ImageError:
        return
    assert_is_pixels(pixels)
    assert pixels.shape[0] * pixels.shape[1] <= 20_000


def test_the_limit_of_pixels_is_inclusive() -> None:
    data = png(smooth())
    assert decode(data, max_pixels=HEIGHT * WIDTH).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(ImageError, match=f"{WIDTH} x {HEIGHT} = {HEIGHT * WIDTH} pixels; at most {HEIGHT * WIDTH - 1}"):
        decode(data, max_pixels=HEIGHT * WIDTH - 1)


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


def tiff_that_claims_a_huge_tile() -> bytes:
    return with_tags(tiff(smooth(), tile=(32, 32)), {322: 16_384, 323: 8_192})


MEASURE = """
import re, sys
from pathlib import Path
from feddymem.images import ImageError, decode
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
try:
    print(decode(sys.stdin.buffer.read()).shape)
except ImageError as error:
    print(error)
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("bomb", "reason"),
    [
        (huge_png, "30000 x 30000 = 900000000 pixels; at most 64000000 are allowed"),
        (huge_bmp, "30000 x 30000 = 900000000 pixels; at most 64000000 are allowed"),
        (huge_jpeg, "30000 x 30000 = 900000000 pixels; at most 64000000 are allowed"),
        (huge_tiff, "30000 x 30000 = 900000000 pixels; at most 64000000 are allowed"),
        (png_that_claims_a_long_chunk, "image"),
        (tiff_that_claims_a_huge_tile, "image"),
    ],
)
def test_a_small_file_that_claims_to_be_huge_is_refused_without_the_memory(
    bomb: Callable[[], bytes], reason: str
) -> None:
    """In a process of its own, whose peak of memory is its own."""
    data = bomb()
    assert len(data) < 5_000
    done = subprocess.run([sys.executable, "-c", MEASURE], input=data, capture_output=True, check=True, timeout=60)
    said, grown = done.stdout.decode().splitlines()
    assert re.search(reason, said)
    assert int(grown) < 64 * 1024, f"{int(grown) // 1024} MiB for a file of {len(data)} bytes"


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
