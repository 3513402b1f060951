"""Watches: streams that say something when it has changed, and nothing for hours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

from grpc import aio

_Request = TypeVar("_Request")
_Message = TypeVar("_Message")


async def watched(
    method: aio.UnaryStreamMultiCallable[_Request, _Message], request: _Request, seconds: float
) -> AsyncGenerator[_Message | None, None]:
    """What a watch says, until the other end ends it; None each time that it has said nothing for so long.

    It is begun anew then, and says again how things are: one whose messages got lost, on a connection on which all else
    goes on and pings are answered, would wait for ever.

    Args:
        method: of a stub.
        request: says what to watch.
        seconds: of silence.
    """
    while True:
        call = method(request)
        try:
            while True:
                async with asyncio.timeout(seconds):
                    message: Any = await call.read()
                if message is aio.EOF:
                    return
                yield message
        except TimeoutError:
            yield None
        finally:
            call.cancel()
