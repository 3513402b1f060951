"""Long work in threads: it stops when the service stops, and waits while the disk is full."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from feddymem.progress import Progress
from services.edge_client import metrics
from services.runtime import tracing
from services.runtime.backoff import Backoff
from services.runtime.errors import is_disk_full
from services.runtime.logs import get_logger
from services.runtime.settings import ClientSettings

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_log = get_logger()


class _StoppedError(Exception):
    """The service stops; nobody waits for the work any more."""


class Computing:
    """Runs work in threads. Lives on one event loop."""

    def __init__(self, settings: ClientSettings, show: Progress) -> None:
        self._settings, self._show = settings, show
        self._stopped = threading.Event()
        self._step = ""

    def progress(self, what: str, done: int, total: int) -> None:
        """Shows how far work is, which ends here if the service stops: it need not be waited for, and is done again
        from where it was kept last."""
        if self._stopped.is_set():
            raise _StoppedError
        if what != self._step:
            self._step = what
            tracing.add_event(what)
        self._show(what, done, total)

    async def run(
        self, work: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        """Runs work in a thread; where there was no room on the disk for what it writes, again until there is."""
        backoff = Backoff(self._settings)
        while True:
            try:
                return await asyncio.to_thread(work, *args, **kwargs)
            except asyncio.CancelledError:
                self._stopped.set()
                raise
            except OSError as error:
                if not is_disk_full(error):
                    raise
                tell_disk_full(error)
            await backoff.pause()


def tell_disk_full(error: OSError) -> None:
    """Says that something could not be written and will be later."""
    metrics.DISK_FULL.inc()
    _log.error("disk_full", reason=str(error), action="make room; what is waiting goes on by itself")
