"""Arrays on the wire: the same values come back, and nothing damaged or dishonest is taken."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from feddymem.memory import InvalidBankError, MemoryBank
from feddymem.method import ItemType
from feddymem.v1.array_pb2 import (
    DATA_TYPE_FLOAT16,
    DATA_TYPE_FLOAT32,
    DATA_TYPE_UINT8,
    DATA_TYPE_UNSPECIFIED,
    Array,
    ArrayChunk,
    DataType,
    Quantisation,
)
from services.runtime.arrays import (
    BANK_ARRAYS,
    CHUNK_BYTES,
    MAX_CHUNK_BYTES,
    WireArray,
    bank_from_wire,
    bank_to_wire,
    check_chunk,
    check_manifest,
    chunks,
    decode,
    encode,
)
from services.runtime.errors import Refusal

Floats = NDArray[np.float32]

LIMIT = 2**20
SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, max_side=6)
MODERATE = st.floats(-60_000, 60_000, width=32)
TYPES: list[DataType.ValueType] = [DATA_TYPE_FLOAT16, DATA_TYPE_FLOAT32, DATA_TYPE_UINT8]


def values(*shape: int) -> Floats:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def bank(items: int = 5, channels: int = 3) -> MemoryBank:
    weights = np.arange(1, items + 1, dtype=np.float32)
    return MemoryBank(items=values(items, channels), weights=weights[:, None], spreads=weights / np.float32(8))


def returned(wire: WireArray) -> Floats:
    check_manifest(wire.manifest, LIMIT)
    return decode(wire.manifest, wire.data)


def with_field(change: Callable[[Array], object], data_type: DataType.ValueType = DATA_TYPE_FLOAT32) -> Array:
    """The manifest of a 4 x 3 array after a change."""
    manifest = Array()
    manifest.CopyFrom(encode("items", values(4, 3), data_type).manifest)
    change(manifest)
    return manifest


def assert_refused(check: Callable[[], object], status: grpc.StatusCode, *words: str) -> None:
    with pytest.raises(Refusal) as caught:
        check()
    assert caught.value.status == status
    for word in words:
        assert word in caught.value.text


@given(hnp.arrays(np.float32, SHAPES, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_float32_comes_back_exactly(sent: Floats) -> None:
    got = returned(encode("items", sent, DATA_TYPE_FLOAT32))
    np.testing.assert_array_equal(got, sent)
    assert got.dtype == np.float32


@given(hnp.arrays(np.float32, SHAPES, elements=MODERATE))
def test_float16_comes_back_to_eleven_bits(sent: Floats) -> None:
    got = returned(encode("items", sent, DATA_TYPE_FLOAT16))
    np.testing.assert_allclose(got, sent, rtol=2**-11, atol=2**-25)
    assert got.dtype == np.float32


@given(hnp.arrays(np.float32, SHAPES, elements=MODERATE))
def test_uint8_comes_back_to_half_a_step_of_its_column(sent: Floats) -> None:
    got = returned(encode("items", sent, DATA_TYPE_UINT8))
    columns = sent.reshape(-1, sent.shape[-1]).astype(np.float64)
    step = (columns.max(0) - columns.min(0)) / 255
    rounding = 4 * np.finfo(np.float32).eps * np.abs(columns).max(0)
    assert (np.abs(got.astype(np.float64) - sent) <= 0.501 * step + rounding + 1e-40).all()
    assert got.dtype == np.float32


@given(st.floats(-60_000, 60_000, width=32), st.integers(1, 5))
def test_a_constant_column_of_uint8_comes_back_exactly(value: float, rows: int) -> None:
    sent = np.full((rows, 2), value, np.float32)
    np.testing.assert_array_equal(returned(encode("items", sent, DATA_TYPE_UINT8)), sent)


@pytest.mark.parametrize("data_type", TYPES)
def test_bytes_are_little_endian_in_c_order(data_type: DataType.ValueType) -> None:
    wire = encode("items", np.asfortranarray(np.array([[0, 1], [255, 2]], np.float32)), data_type)
    expected = {
        DATA_TYPE_FLOAT16: "0000 003c f85b 0040",
        DATA_TYPE_FLOAT32: "00000000 0000803f 00007f43 00000040",
        DATA_TYPE_UINT8: "00 00 ff ff",
    }
    assert wire.data == bytes.fromhex(expected[data_type])


@pytest.mark.parametrize("data_type", TYPES)
def test_the_manifest_describes_the_bytes(data_type: DataType.ValueType) -> None:
    wire = encode("items", values(4, 3), data_type)
    assert (wire.manifest.name, list(wire.manifest.shape)) == ("items", [4, 3])
    assert wire.manifest.size_bytes == len(wire.data)
    assert wire.manifest.sha256 == hashlib.sha256(wire.data).digest()


@pytest.mark.parametrize("value", [65_520.0, -1e6, 3e38])
def test_a_value_beyond_float16_is_refused(value: float) -> None:
    with pytest.raises(InvalidBankError, match=r"items: values up to .* do not fit into float16"):
        encode("items", np.array([1, value], np.float32), DATA_TYPE_FLOAT16)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("data_type", [DATA_TYPE_FLOAT16, DATA_TYPE_FLOAT32])
def test_values_that_are_not_finite_are_refused(data_type: DataType.ValueType, value: float) -> None:
    with pytest.raises(InvalidBankError):
        encode("items", np.array([1, value], np.float32), data_type)


@pytest.mark.parametrize("data_type", TYPES)
def test_any_flipped_bit_of_an_array_is_noticed(data_type: DataType.ValueType) -> None:
    wire = encode("items", values(4, 3), data_type)
    for position in range(8 * len(wire.data)):
        damaged = bytearray(wire.data)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(Refusal) as caught:
            decode(wire.manifest, bytes(damaged))
        assert caught.value.status == grpc.StatusCode.DATA_LOSS


@pytest.mark.parametrize("cut", [0, 1, 47])
def test_missing_bytes_of_an_array_are_noticed(cut: int) -> None:
    wire = encode("items", values(4, 3))
    assert_refused(lambda: decode(wire.manifest, wire.data[:cut]), grpc.StatusCode.DATA_LOSS, "'items'", "SHA-256")


def test_a_manifest_with_the_hash_of_another_array_is_refused() -> None:
    """Where that one is held already, no byte of it is looked at before it is decoded."""
    items, spreads = encode("items", values(4, 3)), encode("spreads", values(4))
    spreads.manifest.sha256 = items.manifest.sha256
    assert_refused(
        lambda: decode(spreads.manifest, items.data), grpc.StatusCode.INVALID_ARGUMENT, "'spreads'", "16", "48"
    )


@pytest.mark.parametrize("data_type", TYPES)
def test_a_good_manifest_is_accepted_up_to_the_limit(data_type: DataType.ValueType) -> None:
    manifest = encode("items", values(4, 3), data_type).manifest
    check_manifest(manifest, manifest.size_bytes)
    assert_refused(
        lambda: check_manifest(manifest, manifest.size_bytes - 1),
        grpc.StatusCode.INVALID_ARGUMENT,
        f"{manifest.size_bytes} bytes; at most {manifest.size_bytes - 1} are allowed",
    )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        pytest.param(lambda m: setattr(m, "data_type", DATA_TYPE_UNSPECIFIED), "data_type 0 is unknown", id="no type"),
        pytest.param(lambda m: setattr(m, "data_type", 99), "data_type 99 is unknown", id="unknown type"),
        pytest.param(lambda m: m.ClearField("shape"), "shape [] must have", id="no shape"),
        pytest.param(lambda m: m.shape.extend([1, 1, 1]), "1 to 4 dimensions", id="many dimensions"),
        pytest.param(lambda m: m.shape.append(0), "each at least 1", id="empty dimension"),
        pytest.param(lambda m: m.shape.append(2), "size_bytes is 48, its shape and data_type need 96", id="shape"),
        pytest.param(lambda m: setattr(m, "size_bytes", 47), "size_bytes is 47", id="size too small"),
        pytest.param(lambda m: setattr(m, "size_bytes", 2**40), "size_bytes is 1099511627776", id="size too large"),
        pytest.param(lambda m: m.ClearField("sha256"), "sha256 has 0 bytes, expected 32", id="no sha256"),
        pytest.param(lambda m: setattr(m, "sha256", bytes(31)), "sha256 has 31 bytes", id="short sha256"),
        pytest.param(lambda m: setattr(m, "sha256", bytes(33)), "sha256 has 33 bytes", id="long sha256"),
        pytest.param(
            lambda m: m.quantisation.SetInParent(), "if and only if data_type is UINT8", id="quantised floats"
        ),
    ],
)
def test_every_bad_field_of_a_manifest_is_named(change: Callable[[Array], object], word: str) -> None:
    manifest = with_field(change)
    assert_refused(lambda: check_manifest(manifest, LIMIT), grpc.StatusCode.INVALID_ARGUMENT, "array 'items'", word)


def test_a_shape_whose_product_is_huge_is_refused() -> None:
    manifest = Array(name="items", data_type=DATA_TYPE_FLOAT32, shape=[2**32 - 1] * 4, sha256=bytes(32))
    for size in (0, 2**32, 2**64 - 1):
        manifest.size_bytes = size
        assert_refused(lambda: check_manifest(manifest, LIMIT), grpc.StatusCode.INVALID_ARGUMENT, "size_bytes")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        pytest.param(lambda m: m.ClearField("quantisation"), "must be set if and only if", id="none"),
        pytest.param(lambda m: m.quantisation.scale.pop(), "one offset for each of 3 columns", id="missing scale"),
        pytest.param(
            lambda m: m.quantisation.offset.append(1), "one offset for each of 3 columns", id="further offset"
        ),
        pytest.param(
            lambda m: m.quantisation.scale.__setitem__(1, math.nan), "NaN, infinite or negative", id="NaN scale"
        ),
        pytest.param(
            lambda m: m.quantisation.scale.__setitem__(1, math.inf), "NaN, infinite or negative", id="inf scale"
        ),
        pytest.param(lambda m: m.quantisation.scale.__setitem__(1, -1), "NaN, infinite or negative", id="minus scale"),
        pytest.param(lambda m: m.quantisation.offset.__setitem__(0, math.nan), "NaN, infinite or", id="NaN offset"),
        pytest.param(lambda m: m.quantisation.offset.__setitem__(0, -math.inf), "NaN, infinite or", id="inf offset"),
    ],
)
def test_every_bad_field_of_a_quantisation_is_named(change: Callable[[Array], object], word: str) -> None:
    manifest = with_field(change, DATA_TYPE_UINT8)
    assert_refused(lambda: check_manifest(manifest, LIMIT), grpc.StatusCode.INVALID_ARGUMENT, "quantisation", word)


@pytest.mark.parametrize("size", [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 5])
def test_chunks_are_the_bytes_in_order(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    sent = list(chunks(bytes(32), data))
    assert b"".join(chunk.data for chunk in sent) == data
    assert [chunk.offset for chunk in sent] == list(range(0, size, CHUNK_BYTES))
    for chunk in sent:
        check_chunk(chunk)
        assert chunk.sha256 == bytes(32)
        assert chunk.ByteSize() < 2**20


@pytest.mark.parametrize("offset", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 7, 2 * CHUNK_BYTES - 1, 2 * CHUNK_BYTES])
def test_chunks_go_on_from_an_offset(offset: int) -> None:
    data = np.random.default_rng(0).bytes(2 * CHUNK_BYTES)
    sent = list(chunks(bytes(32), data, offset))
    assert b"".join(chunk.data for chunk in sent) == data[offset:]
    assert all(chunk.data == data[chunk.offset :][: len(chunk.data)] for chunk in sent)


@pytest.mark.parametrize("size", [0, MAX_CHUNK_BYTES + 1])
def test_a_chunk_of_a_bad_size_is_refused(size: int) -> None:
    data = bytes(size)
    chunk = ArrayChunk(offset=7, data=data, crc32=zlib.crc32(data))
    assert_refused(
        lambda: check_chunk(chunk), grpc.StatusCode.INVALID_ARGUMENT, f"offset 7 has {size} bytes; expected 1 to"
    )


def test_a_chunk_of_the_largest_size_is_accepted() -> None:
    data = bytes(MAX_CHUNK_BYTES)
    check_chunk(ArrayChunk(data=data, crc32=zlib.crc32(data)))
    assert MAX_CHUNK_BYTES < 2**20


@given(st.binary(min_size=1, max_size=64), st.integers(0))
def test_any_flipped_bit_of_a_chunk_is_noticed(data: bytes, position: int) -> None:
    position %= 8 * len(data)
    damaged = bytearray(data)
    damaged[position // 8] ^= 1 << position % 8
    chunk = ArrayChunk(offset=5, data=bytes(damaged), crc32=zlib.crc32(data))
    assert_refused(lambda: check_chunk(chunk), grpc.StatusCode.DATA_LOSS, "offset 5", "CRC-32")


@pytest.mark.parametrize("bit", range(32))
def test_any_flipped_bit_of_a_checksum_is_noticed(bit: int) -> None:
    chunk = ArrayChunk(data=b"bytes", crc32=zlib.crc32(b"bytes") ^ 1 << bit)
    assert_refused(lambda: check_chunk(chunk), grpc.StatusCode.DATA_LOSS)


@pytest.mark.parametrize(("item_type", "tolerance"), [("float16", 2e-3), ("uint8", 2e-2)])
def test_a_bank_comes_back(item_type: ItemType, tolerance: float) -> None:
    sent = bank(20)
    wires = bank_to_wire(sent, item_type)
    assert [wire.manifest.name for wire in wires] == list(BANK_ARRAYS)
    got = bank_from_wire((wire.manifest, wire.data) for wire in reversed(wires))
    np.testing.assert_allclose(got.items, sent.items, atol=tolerance)
    np.testing.assert_array_equal(got.weights, sent.weights)
    np.testing.assert_array_equal(got.spreads, sent.spreads)


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["items", "weights"], "got items, weights"),
        ([], "got none"),
        (["items", "weights", "spreads", "labels"], "got items, labels, spreads, weights"),
        (["items", "weights", "spread"], "got items, spread, weights"),
        (["items", "items", "weights", "spreads"], "items, weights, spreads"),
    ],
)
def test_missing_and_further_arrays_of_a_bank_are_refused(names: list[str], word: str) -> None:
    wires = [encode(name, np.ones((2, 3) if name == "items" else 2, np.float32)) for name in names]
    assert_refused(
        lambda: bank_from_wire((wire.manifest, wire.data) for wire in wires), grpc.StatusCode.INVALID_ARGUMENT, word
    )


def test_a_damaged_bank_is_refused() -> None:
    items, *others = [(wire.manifest, wire.data) for wire in bank_to_wire(bank(), "float16")]
    damaged = (items[0], items[1][:-1] + b"\xff")
    assert_refused(lambda: bank_from_wire([damaged, *others]), grpc.StatusCode.DATA_LOSS, "'items'")


@pytest.mark.parametrize(("name", "value"), [("items", math.nan), ("weights", 0.5), ("spreads", -1.0)])
def test_a_dishonest_bank_is_refused(name: str, value: float) -> None:
    arrays = {wire.manifest.name: (wire.manifest, wire.data) for wire in bank_to_wire(bank(), "float16")}
    manifest = Array()
    manifest.CopyFrom(arrays[name][0])
    manifest.data_type = DATA_TYPE_FLOAT32
    data = np.full(tuple(manifest.shape), value, "<f4").tobytes()
    manifest.sha256, manifest.size_bytes = hashlib.sha256(data).digest(), len(data)
    check_manifest(manifest, LIMIT)
    with pytest.raises(InvalidBankError, match=name.rstrip("s")):
        bank_from_wire((arrays | {name: (manifest, data)}).values())


def test_a_bank_whose_quantisation_overflows_is_refused() -> None:
    items, *others = [(wire.manifest, wire.data) for wire in bank_to_wire(bank(), "uint8")]
    manifest = Array()
    manifest.CopyFrom(items[0])
    manifest.quantisation.CopyFrom(Quantisation(scale=[3e38] * 3, offset=[3e38] * 3))
    check_manifest(manifest, LIMIT)
    with pytest.raises(InvalidBankError, match="NaN or infinite"):
        bank_from_wire([(manifest, items[1]), *others])
