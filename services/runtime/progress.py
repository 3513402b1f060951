"""Progress of long work: a bar with an estimate of the time left on a terminal, log lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from feddymem.progress import Progress as Report
from services.runtime.logs import get_logger

_LOG_SECONDS = 10.0
_log = get_logger()


@contextmanager
def shown_progress() -> Iterator[Report]:
    """Shows what is reported, until the block is left."""
    if not sys.stderr.isatty():
        yield _logged()
        return
    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks or bars.tasks[bars.task_ids.index(tasks[what])].finished:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def _logged() -> Report:
    last = time.monotonic()

    def log(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _LOG_SECONDS:
            last = time.monotonic()
            _log.info("progress", step=what, done=done, total=total)

    return log
