"""How an inspection ends, counted once for all protocols."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from services.inference import metrics
from services.runtime.errors import as_refusal

_TRY_AGAIN = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass
class Ending:
    """How an inspection ends.

    Attributes:
        anomalous: the verdict that is answered; None for none.
    """

    anomalous: bool | None = None


@contextmanager
def counted() -> Iterator[Ending]:
    """Counts one inspection when the block is left, by how it is left and what verdict it has noted."""
    ending = Ending()
    with counted_if_raised():
        yield ending
    metrics.ENDED["anomalous" if ending.anomalous else "ok"].inc()


@contextmanager
def counted_if_raised() -> Iterator[None]:
    """Counts one inspection if the block raises, by what it raises."""
    try:
        yield
    except BaseException as error:
        metrics.ENDED[_outcome(error)].inc()
        raise


def _outcome(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    refusal = as_refusal(error) if isinstance(error, Exception) else None
    if refusal is None:
        return "failed"
    return "rejected" if refusal.status in _TRY_AGAIN else "invalid"
