"""Honest calls made into such as nobody sane would send."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_HUGE_VARINTS = (b"\xff" * 9 + b"\x01", b"\xff\xff\xff\xff\x07", b"\x80" * 9 + b"\x7f", b"\x80" * 12)
_FLOATS = (0.0, -0.0, -1.0, 1e-45, 3e38, -3e38, float("inf"), float("-inf"), float("nan"))
_PILE = "\N{PILE OF POO}"
_TEXTS = ("", "\0", "..", "../../etc/passwd", "a/b", "a\nb", _PILE, "%s%n{0}", "nan", "'; DROP TABLE site; --")
_LONG = 100_000
_OVERSIZED = b"\x82\x80\x80\x80\x08" + b"\x80\x80\xc0\x02" + bytes(5 * 2**20)
"""Field 268,435,456, which no message has, of 5 MiB: more than the services take, but for images."""
_MANY = 200


def mangled_call(messages: Sequence[Message], rng: random.Random) -> list[bytes]:
    """A call's messages on the wire, at least one of them changed; of several, some may be gone, doubled or swapped."""
    sent = [message.SerializeToString() for message in messages]
    victim = rng.choice((0, rng.randrange(len(sent))))  # what comes first says what the others are
    while sent[victim] == messages[victim].SerializeToString():
        sent[victim] = mangled(messages[victim], rng)
    if rng.random() < 0.1:
        return [data for data in sent for _ in range(rng.choice((0, 1, 2)))]
    if rng.random() < 0.1:
        rng.shuffle(sent)
    return sent


def mangled(message: Message, rng: random.Random) -> bytes:
    """A message, on the wire, with some of its fields or of its bytes changed; now and then nothing of it is left."""
    changed = type(message)()
    changed.CopyFrom(message)
    by_field = bool(message.DESCRIPTOR.fields) and rng.random() < 0.7
    for _ in range(rng.choice((1, 1, 2, 4)) if by_field else 0):
        make_hostile(changed, rng)
    data = changed.SerializeToString()
    if rng.random() < 0.005:
        return data + _OVERSIZED
    return mangled_bytes(data, rng) if not by_field or rng.random() < 0.1 else data


def mangled_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with bits flipped, cut, repeated, put in, or replaced altogether."""
    changes: tuple[Callable[[bytes, random.Random], bytes], ...] = (
        _flip,
        _flip,
        _cut,
        _repeat,
        _insert,
        _nest,
        _replace,
    )
    return rng.choice(changes)(data, rng)


def make_hostile(message: Message, rng: random.Random) -> None:
    """Sets one field, somewhere in a message, to what is at the edge of its type or beyond sense."""
    if not message.DESCRIPTOR.fields:
        return
    set_already = [field for field, _ in message.ListFields()]
    field: FieldDescriptor = rng.choice(
        set_already if set_already and rng.random() < 0.7 else [*message.DESCRIPTOR.fields]
    )
    if field.is_repeated:
        _make_repeated_hostile(message, field, rng)
    elif field.message_type is None:
        setattr(message, field.name, _hostile_value(field, getattr(message, field.name), rng))
    elif rng.random() < 0.1:
        message.ClearField(field.name)
    else:
        make_hostile(getattr(message, field.name), rng)


def _make_repeated_hostile(message: Message, field: FieldDescriptor, rng: random.Random) -> None:
    values: Any = getattr(message, field.name)
    if rng.random() < 0.2:
        message.ClearField(field.name)
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = values[rng.choice((*_TEXTS, "site", "threshold"))]
        make_hostile(entry, rng)
    elif field.message_type is not None:
        if values and rng.random() < 0.8:
            make_hostile(rng.choice(values), rng)
        else:
            copies = [*values] or [values.add()]
            values.extend(copies * rng.choice((1, 100 if len(values) < _MANY else 1)))
    elif values and rng.random() < 0.6:
        at = rng.randrange(len(values))
        values[at] = _hostile_value(field, values[at], rng)
    else:
        value = _hostile_value(field, field.default_value or b"", rng)
        short = not isinstance(value, str | bytes) or len(value) < _MANY
        values.extend([value] * rng.choice((1, 3, 1000 if short else 1)))


def _hostile_value(field: FieldDescriptor, value: Any, rng: random.Random) -> Any:
    types = FieldDescriptor
    if field.type == types.TYPE_STRING:
        return rng.choice((*_TEXTS, "x" * _LONG, _PILE * _LONG))
    if field.type == types.TYPE_BYTES:
        if rng.random() < 0.7:
            return mangled_bytes(value or b"", rng)
        return rng.choice((b"", b"\0" * 32, rng.randbytes(32), rng.randbytes(rng.randrange(1000)), b"\xff" * _LONG))
    if field.type == types.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type in (types.TYPE_FLOAT, types.TYPE_DOUBLE):
        return rng.choice(_FLOATS)
    if field.type == types.TYPE_ENUM:
        return rng.choice((0, 1, 2, 99, -1, 2**31 - 1))
    kind = _INTEGERS[field.type]
    bits = 64 if "64" in kind else 32
    least, most = (0, 2**bits - 1) if kind.startswith(("uint", "fixed")) else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return rng.choice((least, most, most, max(least, -1), 0, 1, 2, 255, 65_536, rng.randint(least, most)))


_INTEGERS = {
    getattr(FieldDescriptor, f"TYPE_{name.upper()}"): name
    for name in ("int32", "int64", "uint32", "uint64", "sint32", "sint64", "fixed32", "fixed64", "sfixed32", "sfixed64")
}


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + rng.choice((1, 8, 64, 1024))]
    return data[:start] + piece * rng.choice((2, 16, 256)) + data[start:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    piece = rng.choice((*_HUGE_VARINTS, rng.randbytes(rng.choice((1, 4, 32)))))
    return data[:start] + piece + data[start + rng.choice((0, len(piece))) :]


def _nest(data: bytes, rng: random.Random) -> bytes:
    return data + bytes([rng.randrange(1, 16) << 3 | rng.choice((2, 3))]) * rng.choice((10, 200, 20_000))


def _replace(_data: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((1, 2, 10, 100, 10_000)))


_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip, _flip, _cut, _repeat, _insert, _nest, _replace)
