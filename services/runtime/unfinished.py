"""Long computations that a process which is told to stop does not wait for: nothing is lost when they are given up."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import TypeVar

_NAME = "may-be-given-up"

_Result = TypeVar("_Result")


async def computed(work: Callable[[], _Result]) -> _Result:
    """What work comes to, in a thread of its own; as `asyncio.to_thread`, whose threads the end of a process waits for.

    Raises:
        Exception: as the work does.
    """
    future: Future[_Result] = Future()
    future.set_running_or_notify_cancel()  # nobody can take it back any more

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is for who awaits this
            future.set_exception(error)

    threading.Thread(target=copy_context().run, args=(run,), name=_NAME, daemon=True).start()
    return await asyncio.wrap_future(future)


def exit_if_unfinished() -> None:
    """Ends this process at once, with exit code 0, where work was given up; else returns. For when all else is done.

    Python's own end takes away what the thread needs, and a thread that is in torch then aborts the process.
    """
    if any(thread.name == _NAME for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
