"""Fixtures of the tests of the batcher."""

from __future__ import annotations

import pytest

from services.inference import batcher as batcher_module
from services.inference import job as job_module
from tests.unit.batcher.fakes import THREADS, Clock, Extractor


@pytest.fixture
def extractor() -> Extractor:
    return Extractor()


@pytest.fixture(autouse=True)
def _as_on_a_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher_module, "workers", lambda: THREADS)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (batcher_module, job_module):
        monkeypatch.setattr(module, "time", clock)
    return clock
