"""A process that kills itself, as `kill -9` does, exactly before or after the Nth call of a function.

python -m tests.chaos.kill_at services.aggregator.state:State.put_bank after 2 -- aggregator --config aggregator.yaml
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

When = Literal["before", "after"]


@dataclass(frozen=True)
class KillPoint:
    """A moment in the life of a process.

    Attributes:
        target: MODULE:QUALNAME of a function or coroutine function, where its callers look it up.
        when: before the call does anything, or after it has returned and before its caller goes on.
        number: which call, from 1.
    """

    target: str
    when: When
    number: int

    def __str__(self) -> str:
        return f"{self.when} {self.target.partition(':')[2]} #{self.number}"

    def arm(self) -> None:
        """Has this process die at the moment.

        Raises:
            ImportError, AttributeError: there is no such function.
        """
        module, _, path = self.target.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        setattr(owner, name, self._deadly(getattr(owner, name)))

    def _deadly(self, function: Callable[..., Any]) -> Callable[..., Any]:
        calls = itertools.count(1)

        def reached(when: When, number: int) -> None:
            if (when, number) == (self.when, self.number):
                os.kill(os.getpid(), signal.SIGKILL)
                signal.pause()  # other threads may run until the signal is there, this one must not

        @functools.wraps(function)
        async def deadly_coroutine(*args: Any, **kwargs: Any) -> Any:
            number = next(calls)
            reached("before", number)
            result = await function(*args, **kwargs)
            reached("after", number)
            return result

        @functools.wraps(function)
        def deadly(*args: Any, **kwargs: Any) -> Any:
            number = next(calls)
            reached("before", number)
            result = function(*args, **kwargs)
            reached("after", number)
            return result

        return deadly_coroutine if inspect.iscoroutinefunction(function) else deadly


def main(arguments: list[str]) -> None:
    """Arms, then is `feddymem` with what follows `--`."""
    if len(arguments) < 5 or arguments[3] != "--" or arguments[1] not in get_args(When):
        sys.exit("usage: kill_at MODULE:QUALNAME before|after N -- COMMAND...")
    target, when, number = arguments[:3]
    KillPoint(target, "before" if when == "before" else "after", int(number)).arm()
    from services.cli.main import main as feddymem

    sys.argv = ["feddymem", *arguments[4:]]
    feddymem()


if __name__ == "__main__":
    main(sys.argv[1:])
