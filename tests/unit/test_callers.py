"""Who asks, as the adapters tell the inspector: callers are served in turn, whatever connections each of them has."""

from __future__ import annotations

from typing import Any, cast

import pytest
from grpc import aio

from feddymem.v1.inspection_pb2 import InspectRequest
from services.inference.feedback import FeedbackForwarder
from services.inference.inspector import Inspector
from services.inference.open_inference import OpenInferenceServicer
from services.inference.registry import Registry
from services.inference.servicer import InspectionServicer
from tests.unit.open_inference.fakes import FakeContext, FakeInspector, FakeRegistry
from tests.unit.open_inference.requests import encoded


@pytest.mark.parametrize("protocol", ["feddymem", "open inference"])
async def test_connections_from_one_address_are_one_caller(protocol: str) -> None:
    fake, registry = FakeInspector(), cast(Registry, FakeRegistry())
    inspector = cast(Inspector, fake)
    ours = InspectionServicer(inspector, registry, cast(FeedbackForwarder, None))
    theirs = OpenInferenceServicer(inspector, registry)
    for port in (50_000, 50_001):
        context = cast(aio.ServicerContext[Any, Any], FakeContext(port))
        if protocol == "feddymem":
            await ours.Inspect(InspectRequest(encoded=b"\1"), context)
        else:
            await theirs.ModelInfer(encoded(b"\1"), context)
    assert [inspection.caller for inspection in fake.seen] == ["ipv4:10.0.0.7"] * 2
