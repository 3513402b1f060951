"""What a person says of a verdict."""

from __future__ import annotations

import enum

from feddymem.v1 import feedback_pb2


class Opinion(enum.Enum):
    """What was wrong with a verdict."""

    FALSE_ALARM = "false_alarm"
    """The image was called anomalous and is normal."""
    BAD_PART = "bad_part"
    """The part is bad, whatever it was called."""


OPINIONS: dict[Opinion, feedback_pb2.Opinion.ValueType] = {
    Opinion.FALSE_ALARM: feedback_pb2.OPINION_FALSE_ALARM,
    Opinion.BAD_PART: feedback_pb2.OPINION_BAD_PART,
}
"""As they are sent."""
