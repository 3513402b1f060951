"""How a service refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest


def refused(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    """Status and words with which a call is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details() or ""
