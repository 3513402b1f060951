"""The connection of a client whose certificate is renewed on disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from feddymem.client.tls import AUTHORITY, CERTIFICATE, KEY, TlsError

_Channel = TypeVar("_Channel")


class Renewed(Generic[_Channel]):
    """A channel, and another one from the moment on that its TLS files have changed. May be used by several threads.

    Args:
        connect: makes a channel with the files as they are then.
        tls_dir: their folder; none where there is no TLS.

    Raises:
        TlsError: the TLS files cannot be used.
    """

    def __init__(self, connect: Callable[[], _Channel], tls_dir: Path | None) -> None:
        self._connect = connect
        self._files = [tls_dir / name for name in (CERTIFICATE, KEY, AUTHORITY)] if tls_dir else []
        self._lock = threading.Lock()
        self._seen = self._look()
        # The one before may have calls still; those of two renewals ago have long ended.
        self._made = deque([connect()], maxlen=2)

    def channel(self) -> _Channel:
        """The channel for the next call."""
        if self._files and self._look() != self._seen:
            with self._lock:
                self._renew()
        return self._made[-1]

    def all(self) -> list[_Channel]:
        """Those to close."""
        return list(self._made)

    def _renew(self) -> None:
        seen = self._look()
        if seen == self._seen:  # another thread was first
            return
        try:
            self._made.append(self._connect())
        except TlsError:  # they are being replaced just now, and looked at again for the next call
            return
        self._seen = seen

    def _look(self) -> tuple[object, ...]:
        try:
            return tuple((status.st_ino, status.st_mtime_ns) for status in map(Path.stat, self._files))
        except OSError:  # replaced just now
            return ()
