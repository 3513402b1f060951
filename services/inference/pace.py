"""How fast images are computed, which tells how long one would wait."""

from __future__ import annotations

import threading

_FORGETTING = 0.1
"""Share of the newest batch in the mean."""


class Pace:
    """What an image takes while there is work: a mean that forgets.

    Args:
        max_delay: seconds that a batch may wait for its images, which count as its own.
    """

    def __init__(self, max_delay: float) -> None:
        self._max_delay = max_delay
        self._seconds_per_image = self._done = 0.0
        self._lock = threading.Lock()

    def note(self, started: float, done: float, images: int) -> None:
        """Takes a batch into account.

        Args:
            started: when it was, in seconds of the monotonic clock.
            done: when it was, by the same clock.
            images: of the batch.
        """
        with self._lock:
            before, self._done = self._done, max(self._done, done)  # of two batches at once, one may be noted late
            seconds = (self._done - max(before, started - self._max_delay)) / images
            self._seconds_per_image += _FORGETTING * (seconds - self._seconds_per_image)

    def seconds(self, images: int) -> float:
        """How long so many images take."""
        return images * self._seconds_per_image
