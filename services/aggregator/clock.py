"""Time that nobody sets: deadlines go by the monotonic clock, which begins anew with each process."""

from __future__ import annotations

import time
from functools import lru_cache


@lru_cache(maxsize=1000)
def monotonic(moment: float) -> float:
    """A moment that has passed, in seconds since the epoch, by the monotonic clock.

    The clocks are compared when a moment is first asked for: at once, or after a restart, when only the wall clock can
    tell. A moment that is in the future then, because the clock was set back, is now.
    """
    return time.monotonic() - max(0.0, time.time() - moment)
