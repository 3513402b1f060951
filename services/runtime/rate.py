"""How often something may happen, by who does it: token buckets."""

from __future__ import annotations

import time
from collections import OrderedDict

BURST_SECONDS = 10
"""What was not used of a rate for so long may come at once: whoever starts has much to ask."""
_MOST_BUCKETS = 10_000
"""Those who came longest ago are forgotten; their buckets are full again by then, but for a flood of names."""


class Rate:
    """At most so many a second, and `BURST_SECONDS` of that at once, for each key.

    Args:
        per_second: on average, of each key.
    """

    def __init__(self, per_second: float) -> None:
        self._per_second, self._most = per_second, max(1.0, per_second * BURST_SECONDS)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str) -> bool:
        """Whether once more is not too often; counts it if so."""
        now = time.monotonic()
        left, then = self._buckets.pop(key, (self._most, now))
        left = min(self._most, left + (now - then) * self._per_second)
        taken = left >= 1
        self._buckets[key] = (left - taken, now)
        if len(self._buckets) > _MOST_BUCKETS:
            self._buckets.popitem(last=False)
        return taken
