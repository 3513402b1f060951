"""A `feddymem` one of whose functions fails for as long as a file is there.

python -m tests.monitoring.fault feddymem.scoring:Scorer.inspect_features FILE inference --aggregator 127.0.0.1:7070
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def failing(function: Callable[..., Any], file: Path) -> Callable[..., Any]:
    """The function, but that it fails for as long as the file is there."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if file.exists():
            raise RuntimeError(f"fault of a test: {file} is there")
        return function(*args, **kwargs)

    return called


def main(target: str, file: str, *arguments: str) -> None:
    """Makes the function fail, then is `feddymem` with the other arguments."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    setattr(owner, name, failing(getattr(owner, name), Path(file)))
    from services.cli.main import main as feddymem

    sys.argv = ["feddymem", *arguments]
    feddymem()


if __name__ == "__main__":
    main(*sys.argv[1:])
