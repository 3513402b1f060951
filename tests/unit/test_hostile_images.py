"""Decoding: an ImageError and nothing else, in bounded memory, from what is not an image or claims too much."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from feddymem.images import ImageError, decode
from tests.unit.encoded_images import (
    HEIGHT,
    PNG_SIGNATURE,
    SAMPLES,
    WIDTH,
    assert_is_pixels,
    chunk,
    huge_bmp,
    huge_jpeg,
    huge_png,
    huge_tiff,
    pillow,
    png,
    png_that_claims_a_long_chunk,
    png_whose_end_claims_to_be_long,
    smooth,
    tiff,
    tiff_that_claims_a_huge_tile,
)


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


@pytest.mark.parametrize(
    "tag",
    [
        (322, "s", 0, b"16", True),  # the width of a tile, as text
        (323, "2I", 1, (0, 0), True),  # its length, as nothing of nothing
        (274, "s", 0, b"six", True),
        (339, "d", 1, 1.5, True),
    ],
    ids=["tile width", "tile length", "orientation", "sample format"],
)
def test_tiff_tags_of_another_type_give_pixels_or_an_image_error(tag: tuple[int, str, int, object, bool]) -> None:
    data = tiff(smooth(), extratags=[tag])
    try:
        np.testing.assert_array_equal(decode(data), smooth())
    except ImageError:
        return


EMPTY_SEGMENT = b"\xff\xe5\x00\x02"


@pytest.mark.parametrize("mib", [1, 20])
@pytest.mark.parametrize("end", [EMPTY_SEGMENT, b"\xff", b"\x00"], ids=["segments", "fill bytes", "junk"])
def test_a_jpeg_with_endless_segments_is_refused(mib: int, end: bytes) -> None:
    data = pillow(Image.fromarray(smooth()), "JPEG")
    with pytest.raises(ImageError, match="too much before its pixels"):
        decode(data[:2] + EMPTY_SEGMENT + end * (mib * 2**20 // len(end)) + data[2:])


@pytest.mark.parametrize("count_and_length", [(10_000, 0), (20, 2**20)], ids=["chunks", "bytes"])
def test_a_png_with_endless_chunks_is_refused(count_and_length: tuple[int, int]) -> None:
    count, length = count_and_length
    data = png(smooth())
    with pytest.raises(ImageError, match="too much before its pixels"):
        decode(data[:33] + chunk(b"teSt", bytes(length)) * count + data[33:])


@pytest.mark.parametrize("length", [60_000, 1_000_000])
def test_an_image_may_have_as_much_metadata_as_cameras_write(length: int) -> None:
    profile = bytes(length)
    for kind in ("JPEG", "PNG", "TIFF"):
        np.testing.assert_allclose(
            decode(pillow(Image.fromarray(smooth()), kind, icc_profile=profile)), smooth(), atol=40
        )


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
        (png_whose_end_claims_to_be_long, "image"),
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
