"""Where commands print for people: names that people have chosen come out as they are."""

from __future__ import annotations

from rich.console import Console


def standard_output() -> Console:
    """For results."""
    return _console(stderr=False)


def standard_error() -> Console:
    """For everything else; whoever searches it wants each line whole."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    # A file may be called [red].png or :x:.png: rich would read it as a colour, or as an emoji.
    return Console(stderr=stderr, soft_wrap=stderr, markup=False, emoji=False, highlight=False)
