from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from numpy.typing import NDArray

from feddymem.client import InspectionError, InvalidRequestError
from feddymem.client.images import as_file, as_library_image
from feddymem.client.requests import ClientSettings
from feddymem.image_data import EncodedImage, RawImage
from feddymem.images import decode, read, to_rgb

SIDES = st.integers(1, 7)
SHAPES = st.one_of(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES, st.sampled_from([1, 3, 4])))
TYPES: st.SearchStrategy[np.dtype[Any]] = st.sampled_from([np.dtype(np.uint8), np.dtype("<u2"), np.dtype(">u2")])


@given(pixels=numpy_strategies.arrays(TYPES, SHAPES), turned=st.booleans())
def test_an_array_arrives_as_it_is_whatever_its_memory_layout(pixels: NDArray[Any], turned: bool) -> None:
    pixels = pixels.swapaxes(0, 1) if turned else pixels
    raw = as_library_image(pixels)
    assert isinstance(raw, RawImage)
    np.testing.assert_array_equal(read(raw).pixels, to_rgb(pixels.astype(pixels.dtype.newbyteorder("="))))


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (np.zeros((2, 2), np.float32), "float32"),
        (np.zeros((2, 2), np.int16), "int16"),
        (np.zeros((2, 2), np.bool_), "bool"),
        (np.zeros((2, 2), np.uint32), "uint32"),
        (np.zeros((3, 2, 2), np.uint8), r"\(3, 2, 2\).*channels last"),
        (np.zeros(4, np.uint8), r"\(4,\)"),
        (np.zeros((1, 2, 2, 3), np.uint8), r"\(1, 2, 2, 3\)"),
    ],
)
def test_an_array_without_a_meaning_is_named(pixels: NDArray[Any], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        as_library_image(pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_a_pil_image_shows_the_same_colours(mode: str) -> None:
    colours = np.array([[[250, 10, 30], [0, 0, 0]], [[255, 255, 255], [90, 200, 40]]], np.uint8)
    image = PIL.Image.fromarray(colours).convert(mode)
    np.testing.assert_array_equal(read(as_library_image(image)).pixels, np.asarray(image.convert("RGB")))


def test_a_pil_image_of_16_bits_keeps_them() -> None:
    wide = np.array([[0, 1], [40_000, 65_535]], np.uint16)
    raw = as_library_image(PIL.Image.fromarray(wide))
    assert isinstance(raw, RawImage)
    assert (raw.bits, raw.data) == (16, wide.astype("<u2").tobytes())


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_pil_image_of_unknown_range_is_refused(mode: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"mode {mode}: .*convert"):
        as_library_image(PIL.Image.new(mode, (2, 2)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
def test_pixels_as_a_file_lose_nothing(shape: tuple[int, ...], dtype: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)
    for layout in (pixels, pixels[:, ::-1], pixels.astype(pixels.dtype.newbyteorder(">"))):
        np.testing.assert_array_equal(decode(as_file(layout)), to_rgb(layout.astype(dtype)))


def test_no_pixels_are_no_file() -> None:
    with pytest.raises(InvalidRequestError, match="0 x 3"):
        as_file(np.zeros((0, 3), np.uint8))


def test_a_file_as_a_file_is_what_it_was(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"whatever")
    assert as_file(tmp_path / "part") == as_file(b"whatever") == b"whatever"


def test_files_and_bytes_are_sent_as_they_are(tmp_path: Path) -> None:
    file = io.BytesIO()
    PIL.Image.new("L", (3, 2)).save(file, "PNG")
    path = tmp_path / "x.png"
    path.write_bytes(file.getvalue())
    for image in (path, str(path), file.getvalue()):
        encoded = as_library_image(image)
        assert isinstance(encoded, EncodedImage)
        assert encoded.data == file.getvalue()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InspectionError, match=r"missing\.png: No such file"):
        as_library_image(tmp_path / "missing.png")


def test_a_path_that_cannot_be_one_is_named() -> None:
    with pytest.raises(InvalidRequestError, match="cannot read part\0a: embedded null byte"):
        as_library_image(Path("part\0a"))


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_pil_image_whose_file_ends_too_soon_is_refused(mode: str) -> None:
    file = io.BytesIO()
    PIL.Image.new(mode, (64, 64), 7).save(file, "JPEG")
    with pytest.raises(InvalidRequestError, match="PIL image cannot be read: image file is truncated"):
        as_library_image(PIL.Image.open(io.BytesIO(file.getvalue()[:-40])))


def test_what_is_no_image_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="cannot inspect int"):
        as_library_image(3)  # type: ignore[arg-type]


def test_a_wish_that_there_is_not_is_named() -> None:
    wishes: Any = {"regions": True, "site": "plant-a", "false_alarms": 0.1}
    with pytest.raises(TypeError, match="nobody can wish for false_alarms, site; expected some of map_kind, threshold"):
        ClientSettings("", "", 30, 4).request(b"x", wishes)


def test_a_request_has_what_was_wished_for_and_nothing_else() -> None:
    line = ClientSettings("bricks", "plant-a", 30, 8)
    plain = line.request(np.zeros((2, 3, 4), np.uint16), {})
    raw = plain.raw
    assert (raw.height, raw.width, raw.channels, raw.bits, len(raw.data)) == (2, 3, 4, 16, 48)
    assert (plain.federation, plain.site, plain.map_format) == ("bricks", "plant-a", 0)
    assert not plain.HasField("threshold")
    assert not plain.HasField("pixel_threshold")
    wished = line.request(b"x", {"map_kind": "png", "threshold": 0.0, "pixel_threshold": None})
    assert (wished.encoded, wished.map_format, wished.threshold) == (b"x", 2, 0)
    assert wished.HasField("threshold")
    assert not wished.HasField("pixel_threshold")
    assert (line.timeout({}), line.timeout({"timeout_seconds": 2})) == (30, 2)
    with pytest.raises(ValueError, match="map_kind is 'jpg'; expected one of none, float32, png"):
        line.request(b"x", {"map_kind": "jpg"})  # type: ignore[typeddict-item]
