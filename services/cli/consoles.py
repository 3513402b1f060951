"""Where commands print for people: names that people have chosen come out as they are."""

from __future__ import annotations

import os

from rich.console import Console

_WIDE = 250
"""Columns where there is no terminal, as through `kubectl exec` or into a file: a table is as wide as what is in it,
and nothing is cut off."""


def standard_output() -> Console:
    """For results."""
    return _console(stderr=False)


def standard_error() -> Console:
    """For everything else; whoever searches it wants each line whole."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    # A file may be called [red].png or :x:.png: rich would read it as a colour, or as an emoji.
    console = Console(stderr=stderr, soft_wrap=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDE
    return console
