"""When those who watch the rounds of a federation are told to look again."""

from __future__ import annotations

import asyncio

from services.runtime.changes import Changes

WAITS_FOR_SECONDS = 2
"""Time within which watchers hear what a round waits for: a thousand sites need not hear of each bank at once."""


class News(Changes):
    """Changes of which some can wait, to be told together with what else comes meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._later: asyncio.TimerHandle | None = None

    def notify(self) -> None:
        """Wakes all who wait now."""
        if self._later is not None:
            self._later.cancel()
            self._later = None
        super().notify()

    def notify_soon(self) -> None:
        """Wakes all who wait within WAITS_FOR_SECONDS."""
        if self._later is None:
            self._later = asyncio.get_running_loop().call_later(WAITS_FOR_SECONDS, self.notify)
