"""Values of enums as people read them."""

from __future__ import annotations


def word_of(value: str) -> str:
    """The word of an enum's value, given its name: "calibrating" of PHASE_CALIBRATING."""
    return value.partition("_")[2].lower()
