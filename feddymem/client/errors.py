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

from typing import ClassVar

import grpc


class InspectionError(Exception):
    """An image has no result. The text says why, and what to do.

    Attributes:
        status: the gRPC status that says so.
    """

    advice: ClassVar[str] = ""

    def __init__(self, status: grpc.StatusCode, text: str) -> None:
        super().__init__(status, text)  # what it is made of, so that it can be sent to another process
        self.status, self._text = status, text

    def __str__(self) -> str:
        return f"{self._text}; {self.advice}" if self.advice else self._text


class InvalidRequestError(InspectionError):
    """The image cannot be read or decoded, is too large, or a setting is wrong; it is no use to try again."""


class NotServedError(InspectionError):
    """The service has no such federation, or no such site."""


class UnavailableError(InspectionError):
    """The service cannot be reached, stopped while it was at it, or has no release to score with yet."""

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
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: InspectionTimeoutError,
}


def from_rpc_error(error: grpc.RpcError) -> InspectionError:
    """The error that an unsuccessful call becomes."""
    text = error.details() or error.code().name
    if "larger than max" in text:  # so gRPC says that a message has more bytes than the other end accepts
        return InvalidRequestError(error.code(), text)
    return _KINDS.get(error.code(), ServiceFailedError)(error.code(), text)
