"""What an inspection can end with instead of a result.

InspectionError
├── InvalidRequestError       the image or a setting is wrong: mend it, trying again does not help
├── NotServedError            no such federation or site there: check the names
├── UnavailableError          nobody to score: start the service, check the address, or wait for a release
├── OverloadedError           more images than it can score: send fewer at once, or add a server
├── InspectionTimeoutError    no answer in time: allow more, or look at what the service does
└── ServiceFailedError        anything else: a fault of the service, its log tells
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, cast

import grpc

from feddymem.client.channel import REQUEST_ID


class InspectionError(Exception):
    """An image has no result. The text says why, and what to do.

    Attributes:
        status: the gRPC status that says so.
        request_id: of the last attempt, under which the service's log tells of it; empty where none got there.
    """

    advice: ClassVar[str] = ""

    def __init__(self, status: grpc.StatusCode, text: str, request_id: str = "") -> None:
        super().__init__(status, text, request_id)  # what it is made of, so that it can be sent to another process
        self.status, self._text, self.request_id = status, text, request_id

    def __str__(self) -> str:
        text = f"{self._text}; {self.advice}" if self.advice else self._text
        return text if self.request_id in text else f"{text} (request id {self.request_id})"


class InvalidRequestError(InspectionError):
    """The image cannot be read or decoded, is too large, or a setting is wrong; it is no use to try again."""


class NotServedError(InspectionError):
    """The service has no such federation, or no such site."""


class UnavailableError(InspectionError):
    """The service cannot be reached, it or the client stopped while it was at it, or it has no release to score with
    yet."""

    advice = "is the address right, and does the service there have a release?"


class OverloadedError(InspectionError):
    """The service's queue was full at every attempt."""

    advice = "send fewer images at once, or add a server"


class InspectionTimeoutError(InspectionError):
    """There was no answer in time."""

    advice = "allow more by timeout_seconds, or look at the service's load"


class ServiceFailedError(InspectionError):
    """A fault of the service; its log tells."""


_KINDS: dict[grpc.StatusCode, type[InspectionError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotServedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.CANCELLED: UnavailableError,  # gRPC's word for calls that a server or a client leaves behind
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: InspectionTimeoutError,
}


def from_rpc_error(error: grpc.RpcError) -> InspectionError:
    """The error that an unsuccessful call becomes."""
    text, request_id = error.details() or error.code().name, request_id_of(error)
    if "larger than max" in text:  # so gRPC says that a message has more bytes than the other end accepts
        return InvalidRequestError(error.code(), text, request_id)
    return _KINDS.get(error.code(), ServiceFailedError)(error.code(), text, request_id)


def request_id_of(error: grpc.RpcError) -> str:
    """The id under which the log of who has answered tells of a call; empty where nobody has."""
    pairs = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    return next((str(value) for key, value in pairs if key == REQUEST_ID), "")
