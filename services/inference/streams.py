"""Streams of requests: several in work at once, answered in the order in which they came, one refused not the last."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from feddymem.in_order import in_order_async
from services.runtime.errors import Refusal, as_refusal

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

_WINDOW = 8
"""Requests of one stream in work at once."""


def answer_stream(
    requests: AsyncIterator[_Request],
    answer: Callable[[_Request], Coroutine[Any, Any, _Response]],
    refuse: Callable[[_Request, Refusal], _Response],
) -> AsyncIterator[_Response]:
    """Answers requests as they come; a fault of ours ends the stream.

    Args:
        requests: read only as far as answers are taken.
        answer: answers one request.
        refuse: says to one request why it has no answer.
    """

    async def outcome(request: _Request) -> _Response:
        try:
            return await answer(request)
        except Exception as error:
            refusal = as_refusal(error)
            if refusal is None:
                raise
            return refuse(request, refusal)

    return in_order_async(outcome, requests, _WINDOW)
