"""The audit log: one line for every change of state that somebody asked for, done or refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from grpc import aio

from services.runtime.errors import as_refusal
from services.runtime.identity import caller
from services.runtime.logs import get_logger

_LONGEST_NAME = 63
"""Names are not longer; a caller may send more."""

_log = get_logger()


@contextmanager
def audited(context: aio.ServicerContext[Any, Any], action: str, federation: str, site: str = "") -> Iterator[None]:
    """Writes who did what to which federation, and how it ended, when the block is left.

    Args:
        context: of the RPC that asks for it.
        action: what is done, as a verb.
        federation: to which federation.
        site: to, or for, which site.
    """
    who = caller(context)
    result = grpc.StatusCode.CANCELLED.name
    try:
        yield
        result = grpc.StatusCode.OK.name
    except Exception as error:
        refusal = as_refusal(error)
        result = refusal.status.name if refusal else grpc.StatusCode.INTERNAL.name
        raise
    finally:
        _log.info(
            "audit",
            who=context.peer() if who is None else who.uri,
            action=action,
            federation=federation[:_LONGEST_NAME],
            site=site[:_LONGEST_NAME],
            result=result,
        )
