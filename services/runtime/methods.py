"""Kinds of RPCs, by full name of their method, as in `/package.Service/Method`."""

from __future__ import annotations

_OURS = ("/feddymem.", "/inference.")


def is_ours(method: str) -> bool:
    """Whether it is no health check and no reflection, which every server has."""
    return method.startswith(_OURS)


def is_work(method: str) -> bool:
    """Whether it is ours and ends by itself: watches go on for as long as somebody likes."""
    return is_ours(method) and not method.rpartition("/")[2].startswith("Watch")
