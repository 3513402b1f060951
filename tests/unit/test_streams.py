"""Streams of requests: what a refusal and a fault are to the other requests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from feddymem.feature_space import FingerprintMismatchError
from feddymem.images import ImageError
from services.inference.streams import answer_stream
from services.runtime.errors import Refusal, not_found


async def requests(*given: Exception | str) -> AsyncIterator[Exception | str]:
    for request in given:
        yield request


async def answer(request: Exception | str) -> str:
    if isinstance(request, Exception):
        raise request
    return request


def refuse(request: Exception | str, refusal: Refusal) -> str:
    return f"{refusal.status.name}: {refusal.text}"


async def test_a_refused_request_is_answered_in_its_place_and_the_stream_goes_on() -> None:
    given = ("a", not_found("no b"), ImageError("c"), FingerprintMismatchError("d"), "e")
    answers = [each async for each in answer_stream(requests(*given), answer, refuse)]
    precondition = grpc.StatusCode.FAILED_PRECONDITION.name
    assert answers == ["a", "NOT_FOUND: no b", "INVALID_ARGUMENT: c", f"{precondition}: d", "e"]


async def test_a_fault_of_ours_ends_the_stream() -> None:
    answers = answer_stream(requests("a", RuntimeError("fault"), "b"), answer, refuse)
    assert await anext(answers) == "a"
    with pytest.raises(RuntimeError, match="fault"):
        await anext(answers)
