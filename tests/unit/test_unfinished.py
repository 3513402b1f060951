"""Long computations in threads of their own."""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar

import pytest

from services.runtime.unfinished import computed

asked: ContextVar[str] = ContextVar("asked")


async def test_what_it_comes_to_or_why_it_failed_is_told_to_who_awaits_it() -> None:
    asked.set("here")
    assert await computed(lambda: (asked.get(), threading.current_thread().daemon)) == ("here", True)

    def failing() -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        await computed(failing)


async def test_who_stops_awaiting_it_goes_on_at_once() -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        go_on.wait(30)
        ended.set()

    waiting = asyncio.ensure_future(computed(slow))
    await asyncio.to_thread(begun.wait, 30)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not ended.is_set()
    go_on.set()
    assert await asyncio.to_thread(ended.wait, 30)
