"""One image on its way through the batcher, from acceptance to result."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
from opentelemetry.trace import Span
from torch import Tensor

from feddymem.backbone import PreparedImage
from feddymem.image_data import EncodedImage, RawImage
from feddymem.scoring import Inspection
from services.inference import metrics
from services.inference.active import Active
from services.runtime import tracing
from services.runtime.errors import Refusal

Result = TypeVar("Result")
Afterwards = Callable[["Scored | None"], None]
"""Called when the result is out and nobody waits; with None where there is no time for it."""


@dataclass(frozen=True, eq=False)
class Scored:
    """A score, and how long it took.

    Attributes:
        inspection: the result.
        height: rows of the image.
        width: columns of the image.
        queue_seconds: from acceptance to the start of its computation, decoding included.
        compute_seconds: of the batch that the image was in.
        features: (1, patches, channels) float32, what was scored; None unless something is to be done afterwards.
    """

    inspection: Inspection
    height: int
    width: int
    queue_seconds: float
    compute_seconds: float
    features: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Job(Generic[Result]):
    """An image that somebody waits for.

    Attributes:
        active: what scores it.
        image: not decoded.
        finish: makes the result of the score.
        accepted: when it was, in seconds of the monotonic clock.
        expires: from when on nobody waits any more, by the same clock; None for never.
        result: what the caller waits for.
        afterwards: what more is to be done of the score; None for nothing.
        span: of the caller, which the parts of the way are added to.
    """

    active: Active
    image: EncodedImage | RawImage
    finish: Callable[[Scored], Result]
    accepted: float
    expires: float | None
    result: Future[Result]
    afterwards: Afterwards | None
    span: Span

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for it; if time is up, says so to the caller."""
        if self.result.cancelled():
            return False
        if self.expires is None or time.monotonic() < self.expires:
            return True
        self.fail(late())
        return False

    def claim(self) -> bool:
        """Whether the result is still wanted; from here on it cannot be cancelled."""
        return not self.result.done() and self.result.set_running_or_notify_cancel()

    def fail(self, error: Exception) -> None:
        """Hands an error to the caller, if it still waits."""
        if self.claim():
            self.result.set_exception(error)

    def answer(self, scored: Scored) -> None:
        """Makes the result of the score, and hands it to the caller. The job is claimed by then."""
        started = time.monotonic()
        try:
            with metrics.ENCODE_SECONDS.time():
                result = self.finish(scored)
        except Exception as error:  # noqa: BLE001 - handed to the caller, who logs it
            self.result.set_exception(error)
        else:
            tracing.add_part(self.span, "encode", started, time.monotonic())
            self.result.set_result(result)


@dataclass(frozen=True, eq=False)
class Decoded:
    """A job whose image is ready to be scored.

    Attributes:
        job: the job.
        prepared: its image.
        seconds: that decoding took.
    """

    job: Job[Any]
    prepared: PreparedImage
    seconds: float


def late() -> Refusal:
    """What an image is refused with whose time is up."""
    return Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the image was computed")
