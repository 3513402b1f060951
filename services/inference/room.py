"""Who waits for room in the queue instead of being refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque


class Room:
    """Waiters of one event loop, told of room one by one: each place is for the one that has waited the longest.

    Args:
        most: waiters, at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def crowded(self) -> bool:
        """Whether as many wait as may."""
        return len(self._waiters) >= self._most

    async def wait(self, seconds: float | None) -> None:
        """Waits until told of room, at most so long; whoever does not use it then has to `notify` the next."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(seconds):
                await waiter
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():  # told of room, and does not use it
                self.notify()
            raise
        finally:
            with contextlib.suppress(ValueError):
                self._waiters.remove(waiter)

    def notify(self) -> None:
        """Wakes who waits the longest."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
