"""The adapter, with nothing real behind it."""

from __future__ import annotations

from typing import cast

import pytest

from feddymem.calibration import Limit, Normals
from feddymem.sketch import ScoreSketch
from feddymem.verdicts import SiteLimits
from services.inference.inspector import Inspector
from services.inference.open_inference import OpenInferenceServicer
from services.inference.registry import Registry
from tests.unit.open_inference.fakes import FakeActive, FakeInspector, FakeRegistry


@pytest.fixture
def inspector() -> FakeInspector:
    return FakeInspector()


@pytest.fixture
def servicer(inspector: FakeInspector) -> OpenInferenceServicer:
    return OpenInferenceServicer(cast(Inspector, inspector), cast(Registry, FakeRegistry()))


@pytest.fixture
def calibrated(inspector: FakeInspector, monkeypatch: pytest.MonkeyPatch) -> Limit:
    """The limit of a release that is calibrated by 40 images with scores about 1."""
    limit = Normals({"north": ScoreSketch.of([1.0] * 40)}).limit("north", 0.1)
    assert limit is not None
    monkeypatch.setattr(FakeActive, "limits", lambda _self, _site: SiteLimits(limit, limit))
    inspector.limit = limit
    return limit
