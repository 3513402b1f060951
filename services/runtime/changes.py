"""Waiting for a change instead of sleeping."""

from __future__ import annotations

import asyncio


class Changes:
    """Wakes every waiter of one event loop when something has changed.

    Look at the state, then wait, with no `await` between: no change is missed.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wakes all who wait now."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, seconds: float | None = None) -> bool:
        """Waits for the next change, at most so long; whether there was one."""
        event = self._event
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return False
        return True
