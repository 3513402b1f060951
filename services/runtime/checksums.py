"""A checksum at the end of each message between services, so that a bit that was flipped on the way is found.

TLS finds it, too; without TLS there is TCP's checksum of 16 bits, and a flipped bit in a number is another number.
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any, cast

from google.protobuf.message import DecodeError
from grpc import aio

from services.runtime.errors import data_loss

_TAG = b"\xfd\xff\xff\xff\x0f"
"""Of field 536,870,911, the last that there can be, as fixed32: receivers that do not know it pass over it."""
_CRC_BYTES = 4

Serializer = Callable[[Any], bytes]
Deserializer = Callable[[bytes], Any]


def with_checksum(serialize: Serializer) -> Serializer:
    """Serializes messages with the CRC-32 (zlib polynomial) of their bytes behind them."""

    def serialized(message: Any) -> bytes:
        raw = serialize(message)
        return b"".join((raw, _TAG, zlib.crc32(raw).to_bytes(_CRC_BYTES, "little")))

    return serialized


def without_checksum(raw: bytes) -> bytes:
    """The bytes of a message, checked where the sender has given a checksum.

    Raises:
        Refusal: DATA_LOSS if they are not what was sent.
    """
    end = len(raw) - _CRC_BYTES - len(_TAG)
    if end < 0 or raw[end:-_CRC_BYTES] != _TAG:
        return raw
    message = raw[:end]
    if zlib.crc32(message) != int.from_bytes(raw[-_CRC_BYTES:], "little"):
        raise data_loss(f"a message of {end} bytes has a bad CRC-32; send it again")
    return message


def checked_channel(channel: aio.Channel) -> aio.Channel:
    """A channel for stubs whose messages have checksums, those that are sent and those that come."""
    return cast("aio.Channel", _CheckedChannel(channel))


class _CheckedChannel:
    def __init__(self, channel: aio.Channel) -> None:
        self._channel = channel

    def __getattr__(self, name: str) -> Any:
        """Of the kinds of methods, `unary_unary` to `stream_stream`."""
        make = getattr(self._channel, name)

        def made(
            method: str,
            request_serializer: Serializer = bytes,
            response_deserializer: Deserializer = bytes,
            **more: Any,
        ) -> Any:
            # gRPC itself would log a message that cannot be read, and give None.
            call = make(method, request_serializer=with_checksum(request_serializer), **more)
            return lambda *args, **kwargs: _CheckedCall(call(*args, **kwargs), response_deserializer)

        return made


class _CheckedCall:
    """A call whose responses raise `Refusal`, DATA_LOSS, where they are damaged; it is cancelled then."""

    def __init__(self, call: Any, deserializer: Deserializer) -> None:
        self._call, self._deserializer = call, deserializer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._response().__await__()

    async def __aiter__(self) -> AsyncIterator[Any]:
        async for raw in self._call:
            yield self._message(raw)

    async def read(self) -> Any:
        """As that of gRPC."""
        raw = await self._call.read()
        return self._message(raw) if isinstance(raw, bytes) else raw

    async def _response(self) -> Any:
        return self._message(await self._call)

    def _message(self, raw: bytes | None) -> Any:
        if raw is None:  # gRPC's word for a call that ended well without a message, as a flipped bit can make of one
            raise data_loss("a call was answered without a message; make it again")
        try:
            return self._deserializer(without_checksum(raw))
        except DecodeError as error:
            self._call.cancel()
            raise data_loss(f"a message of {len(raw)} bytes cannot be read: {error}; send it again") from error
        except Exception:
            self._call.cancel()
            raise
