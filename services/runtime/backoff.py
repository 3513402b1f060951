"""Pauses before a call is made again: exponential with full jitter, so that many callers do not come back at once."""

from __future__ import annotations

import asyncio
import math
import random
import time

from services.runtime.settings import ClientSettings

FIRST_RETRY_SECONDS = 0.5
"""Bound of the first pause: a line that broke for a moment is back by then."""


class Backoff:
    """Each pause is random below a bound that doubles from one to the next, up to `retry_seconds`.

    After as long without a failure it starts small again: what breaks at once each time, however well it begins, is not
    tried at full speed for ever.
    """

    def __init__(self, settings: ClientSettings) -> None:
        self._longest = settings.retry_seconds
        self._bound, self._resumed = 0.0, -math.inf

    async def pause(self) -> None:
        """Waits, after a failure."""
        well = time.monotonic() - self._resumed > self._longest
        self._bound = min(FIRST_RETRY_SECONDS if well else 2 * self._bound, self._longest)
        await asyncio.sleep(random.uniform(0, self._bound))  # noqa: S311 - jitter, not a secret
        self._resumed = time.monotonic()
