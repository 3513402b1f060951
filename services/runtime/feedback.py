"""What feedback must be like, at the inference service that takes it and at the edge client that keeps it."""

from __future__ import annotations

from typing import Protocol

from feddymem.v1.feedback_pb2 import OPINION_BAD_PART, OPINION_FALSE_ALARM, Opinion
from services.runtime.errors import invalid

MAX_NOTE = 1_000
"""Characters of a note, at most."""
OPINIONS: dict[Opinion.ValueType, str] = {OPINION_FALSE_ALARM: "false_alarm", OPINION_BAD_PART: "bad_part"}
"""Names of the opinions that can be had, as metrics have them."""


class _Said(Protocol):
    """What the requests to report and to keep feedback have in common."""

    @property
    def encoded(self) -> bytes: ...
    @property
    def opinion(self) -> Opinion.ValueType: ...
    @property
    def note(self) -> str: ...


def require_feedback(said: _Said) -> None:
    """Checks all but whether the image can be decoded.

    Raises:
        Refusal: INVALID_ARGUMENT for no image, no opinion, or a note that is too long or would do something to a
            terminal.
    """
    if not said.encoded:
        raise invalid("the request has no image; set `encoded` to the image file as it was inspected")
    if said.opinion not in OPINIONS:
        raise invalid(f"opinion is {said.opinion}; expected FALSE_ALARM ({OPINION_FALSE_ALARM}) or BAD_PART (2)")
    if len(said.note) > MAX_NOTE:
        raise invalid(f"the note has {len(said.note)} characters; at most {MAX_NOTE} are kept")
    if not all(character.isprintable() or character in "\t\n" for character in said.note):
        raise invalid("the note has control characters; take them out, all but tabs and new lines")
