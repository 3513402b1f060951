"""Clients of the inference service, for programs with and without asyncio.

Example:
    with InspectionClient("127.0.0.1:7072", site="plant-a") as client:
        result = client.inspect("part.png")
        print(result.score, result.verdict, result.p_value)

docs/clients.md has more, and callers in other languages.
"""

from __future__ import annotations

from feddymem.client.asynchronous import AsyncInspectionClient
from feddymem.client.errors import (
    InspectionError,
    InspectionTimeoutError,
    InvalidRequestError,
    NotServedError,
    OverloadedError,
    ServiceFailedError,
    UnavailableError,
)
from feddymem.client.images import Image
from feddymem.client.requests import Wishes
from feddymem.client.results import Guarantee, InspectionResult, Verdict
from feddymem.client.synchronous import InspectionClient
from feddymem.client.tls import TlsError
from feddymem.maps import HeatScale, MapKind, Region

__all__ = [
    "AsyncInspectionClient",
    "Guarantee",
    "HeatScale",
    "Image",
    "InspectionClient",
    "InspectionError",
    "InspectionResult",
    "InspectionTimeoutError",
    "InvalidRequestError",
    "MapKind",
    "NotServedError",
    "OverloadedError",
    "Region",
    "ServiceFailedError",
    "TlsError",
    "UnavailableError",
    "Verdict",
    "Wishes",
]
