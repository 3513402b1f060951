"""Arrays on the wire: manifests, element types, chunks, checksums. No pickle."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feddymem.item_types import Quantised, quantise
from feddymem.memory import FloatArray, InvalidBankError, MemoryBank
from feddymem.method import ItemType
from feddymem.v1.array_pb2 import (
    DATA_TYPE_FLOAT16,
    DATA_TYPE_FLOAT32,
    DATA_TYPE_UINT8,
    Array,
    ArrayChunk,
    DataType,
    Quantisation,
)
from services.runtime.errors import data_loss, invalid

CHUNK_BYTES = 256 * 2**10
"""Bytes of a chunk sent; a chunk received may have MAX_CHUNK_BYTES."""
MAX_CHUNK_BYTES = 512 * 2**10
MAX_DIMENSIONS = 4

BANK_ARRAYS = ("items", "weights", "spreads")

_DTYPES: dict[int, np.dtype[np.generic]] = {
    DATA_TYPE_FLOAT16: np.dtype("<f2"),
    DATA_TYPE_FLOAT32: np.dtype("<f4"),
    DATA_TYPE_UINT8: np.dtype("u1"),
}
ITEM_TYPES: dict[ItemType, DataType.ValueType] = {"float16": DATA_TYPE_FLOAT16, "uint8": DATA_TYPE_UINT8}


@dataclass(frozen=True)
class WireArray:
    """An array ready to be sent: its manifest and all its bytes."""

    manifest: Array
    data: bytes


def encode(name: str, values: FloatArray, data_type: DataType.ValueType = DATA_TYPE_FLOAT32) -> WireArray:
    """Encodes float32 values of any shape.

    Raises:
        InvalidBankError: a value does not fit into float16.
    """
    quantisation = None
    if data_type == DATA_TYPE_UINT8:
        quantised = quantise(values)
        stored: NDArray[np.generic] = quantised.steps
        quantisation = Quantisation(scale=quantised.scale.tolist(), offset=quantised.offset.tolist())
    else:
        with np.errstate(over="ignore"):
            stored = values.astype(_DTYPES[data_type])
        if not np.isfinite(stored).all():
            raise InvalidBankError(f"{name}: values up to {np.abs(values).max():g} do not fit into {stored.dtype}")
    data = np.ascontiguousarray(stored).tobytes()
    manifest = Array(
        name=name,
        data_type=data_type,
        shape=values.shape,
        sha256=hashlib.sha256(data).digest(),
        size_bytes=len(data),
        quantisation=quantisation,
    )
    return WireArray(manifest, data)


def decode(manifest: Array, data: bytes) -> FloatArray:
    """Values of an array, from a checked manifest and all its bytes.

    Raises:
        Refusal: DATA_LOSS if the bytes are not those of the manifest, INVALID_ARGUMENT if they are and it is wrong.
    """
    if hashlib.sha256(data).digest() != manifest.sha256:
        raise data_loss(f"array {manifest.name!r}: its bytes do not have the SHA-256 of the manifest; send it again")
    if len(data) != manifest.size_bytes:
        raise invalid(
            f"array {manifest.name!r}: size_bytes is {manifest.size_bytes}, its SHA-256 is of {len(data)} bytes"
        )
    stored = np.frombuffer(data, _DTYPES[manifest.data_type]).reshape(tuple(manifest.shape))
    if manifest.data_type == DATA_TYPE_UINT8:
        scale, offset = (np.array(v, np.float32) for v in (manifest.quantisation.scale, manifest.quantisation.offset))
        return Quantised(stored, scale, offset).values
    return stored.astype(np.float32)


def check_manifest(manifest: Array, max_bytes: int) -> None:
    """Checks a manifest from another process before its bytes are accepted.

    Raises:
        Refusal: INVALID_ARGUMENT that names the field that is off.
    """
    name, shape = repr(manifest.name), list(manifest.shape)
    if manifest.data_type not in _DTYPES:
        raise invalid(f"array {name}: data_type {manifest.data_type} is unknown; send FLOAT16, FLOAT32 or UINT8")
    if not 1 <= len(shape) <= MAX_DIMENSIONS or 0 in shape:
        raise invalid(f"array {name}: shape {shape} must have 1 to {MAX_DIMENSIONS} dimensions, each at least 1")
    if len(manifest.sha256) != hashlib.sha256().digest_size:
        raise invalid(f"array {name}: sha256 has {len(manifest.sha256)} bytes, expected 32")
    expected = math.prod(shape) * _DTYPES[manifest.data_type].itemsize
    if manifest.size_bytes != expected:
        raise invalid(f"array {name}: size_bytes is {manifest.size_bytes}, its shape and data_type need {expected}")
    if manifest.size_bytes > max_bytes:
        raise invalid(f"array {name}: {manifest.size_bytes} bytes; at most {max_bytes} are allowed here")
    _check_quantisation(manifest, shape[-1])


def items_of(arrays: Iterable[Array]) -> Array:
    """Of a bank's manifests, that of its items; an empty one where there are none."""
    return next((array for array in arrays if array.name == "items"), Array())


def bank_to_wire(bank: MemoryBank, item_type: ItemType) -> list[WireArray]:
    """A memory bank's arrays: items in the type wanted, weights and spreads in float32."""
    types: dict[str, DataType.ValueType] = {
        "items": ITEM_TYPES[item_type],
        "weights": DATA_TYPE_FLOAT32,
        "spreads": DATA_TYPE_FLOAT32,
    }
    return [encode(name, getattr(bank, name), types[name]) for name in BANK_ARRAYS]


def bank_from_wire(arrays: Iterable[tuple[Array, bytes]]) -> MemoryBank:
    """A memory bank from its arrays.

    Raises:
        Refusal: INVALID_ARGUMENT for missing or further arrays, DATA_LOSS for damaged ones.
        InvalidBankError: values that no honest site would make.
    """
    pairs = list(arrays)
    names = sorted(manifest.name for manifest, _ in pairs)
    if names != sorted(BANK_ARRAYS):
        raise invalid(f"a memory bank has the arrays {', '.join(BANK_ARRAYS)}; got {', '.join(names) or 'none'}")
    return MemoryBank(**{manifest.name: decode(manifest, data) for manifest, data in pairs})


def chunks(sha256: bytes, data: bytes, offset: int = 0) -> Iterator[ArrayChunk]:
    """The chunks of an array's bytes from an offset on."""
    for start in range(offset, len(data), CHUNK_BYTES):
        yield make_chunk(sha256, start, data[start : start + CHUNK_BYTES])


def make_chunk(sha256: bytes, offset: int, piece: bytes) -> ArrayChunk:
    """A chunk of an array, from its bytes."""
    return ArrayChunk(sha256=sha256, offset=offset, data=piece, crc32=zlib.crc32(piece))


def check_chunk(chunk: ArrayChunk) -> None:
    """Checks a chunk from another process.

    Raises:
        Refusal: INVALID_ARGUMENT for a size that is off, DATA_LOSS for a checksum that does not fit.
    """
    if not 1 <= len(chunk.data) <= MAX_CHUNK_BYTES:
        raise invalid(f"chunk at offset {chunk.offset} has {len(chunk.data)} bytes; expected 1 to {MAX_CHUNK_BYTES}")
    if zlib.crc32(chunk.data) != chunk.crc32:
        raise data_loss(f"chunk at offset {chunk.offset} has a bad CRC-32; send it again")


def _check_quantisation(manifest: Array, columns: int) -> None:
    wanted = manifest.data_type == DATA_TYPE_UINT8
    if manifest.HasField("quantisation") != wanted:
        raise invalid(f"array {manifest.name!r}: quantisation must be set if and only if data_type is UINT8")
    if wanted:
        scale, offset = np.array(manifest.quantisation.scale), np.array(manifest.quantisation.offset)
        if len(scale) != columns or len(offset) != columns:
            raise invalid(
                f"array {manifest.name!r}: quantisation needs one scale and one offset for each of {columns} columns"
            )
        if not (np.isfinite(scale).all() and np.isfinite(offset).all() and (scale >= 0).all()):
            raise invalid(f"array {manifest.name!r}: quantisation has NaN, infinite or negative values")
