"""One catalogue of what goes wrong: which gRPC status and which public text an error becomes."""

from __future__ import annotations

import errno
import sqlite3

import grpc

from feddymem.feature_space import FingerprintMismatchError
from feddymem.images import ImageError
from feddymem.memory import InvalidBankError


class Refusal(Exception):  # noqa: N818 - a refusal is a proper answer, not a fault
    """A request that is answered with a status instead of a result.

    Attributes:
        status: the gRPC status code.
        text: what happened, which value, and what to do; shown to the caller.
    """

    def __init__(self, status: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


_STATUS = {
    FingerprintMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    InvalidBankError: grpc.StatusCode.INVALID_ARGUMENT,
    ImageError: grpc.StatusCode.INVALID_ARGUMENT,
}


_SQLITE_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE}
"""SQLite tells a used-up quota, or no room for the index of its log, as a write that failed."""


def as_refusal(error: Exception) -> Refusal | None:
    """The refusal that an error becomes; None for a fault of ours, which is INTERNAL and logged."""
    if isinstance(error, Refusal):
        return error
    if is_disk_full(error):
        return Refusal(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "the disk of this service is full; try again when its operator has made room, nothing is lost",
        )
    for kind, status in _STATUS.items():
        if isinstance(error, kind):
            return Refusal(status, str(error))
    return None


def is_disk_full(error: BaseException) -> bool:
    """Whether there was no room for what should have been written."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) in _SQLITE_FULL
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def not_found(text: str) -> Refusal:
    """Something that the request names does not exist."""
    return Refusal(grpc.StatusCode.NOT_FOUND, text)


def invalid(text: str) -> Refusal:
    """The request itself is wrong; trying again will not help."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, text)


def precondition(text: str) -> Refusal:
    """The request does not fit the present state."""
    return Refusal(grpc.StatusCode.FAILED_PRECONDITION, text)


def exists(text: str) -> Refusal:
    """Someone else has done or taken this already."""
    return Refusal(grpc.StatusCode.ALREADY_EXISTS, text)


def data_loss(text: str) -> Refusal:
    """Bytes arrived damaged."""
    return Refusal(grpc.StatusCode.DATA_LOSS, text)
