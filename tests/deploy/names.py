"""DNS of the cluster: the names of its Services, and nothing else. Just enough of RFC 1035 for A records over UDP."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from typing import cast

_HEADER = struct.Struct(">HHHHHH")
_RECORD = struct.Struct(">HHHIH4s")
_POINTER_TO_QUESTION = 0xC000 | _HEADER.size
_A, _INTERNET = 1, 1
_ANSWER = 0x8580
"""Response, authoritative, recursion desired and available."""
_NO_SUCH_NAME = 3
TTL_SECONDS = 5
"""As of CoreDNS's plugin for Kubernetes."""

Lookup = Callable[[str], Sequence[str] | None]
"""The addresses of a name in small letters without its last dot; None for a name that nobody has."""


class NameServer(asyncio.DatagramProtocol):
    """Answers questions for names."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast(asyncio.DatagramTransport, transport)  # which it is, and does not say

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Called by asyncio."""
        try:
            reply = answer(data, self._lookup)
        except (struct.error, IndexError, UnicodeDecodeError):  # not a question, and nobody to tell
            return
        self._transport.sendto(reply, addr)


def answer(query: bytes, lookup: Lookup) -> bytes:
    """The reply to a query, which has one question."""
    identity, *_ = _HEADER.unpack_from(query)
    name, end = _name(query, _HEADER.size)
    kind, _class = struct.unpack_from(">HH", query, end)
    addresses = lookup(name)
    records = [
        _RECORD.pack(_POINTER_TO_QUESTION, _A, _INTERNET, TTL_SECONDS, 4, IPv4Address(address).packed)
        for address in (addresses or ())
        if kind == _A
    ]
    flags = _ANSWER | (_NO_SUCH_NAME if addresses is None else 0)
    return b"".join(
        [_HEADER.pack(identity, flags, 1, len(records), 0, 0), query[_HEADER.size : end + 4], *records],
    )


def _name(query: bytes, position: int) -> tuple[str, int]:
    """The name at a position, and where it ends."""
    labels = []
    while length := query[position]:
        labels.append(query[position + 1 : position + 1 + length].decode("ascii").lower())
        position += 1 + length
    return ".".join(labels), position + 1
