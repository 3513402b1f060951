"""Who is served which releases, and what serving them costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from feddymem.v1.release_pb2 import Release, WatchReleasesRequest
from services.runtime import publisher as module
from services.runtime.array_store import ArrayStore
from services.runtime.errors import Refusal
from services.runtime.identity import Identity, Role
from services.runtime.publisher import Publisher

PLANT = Identity(Role.INFERENCE, "plant-a")
CONTEXT: Any = None


@pytest.fixture
def readable(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Federations that the caller may read."""
    monkeypatch.setattr(module, "caller", lambda _context: PLANT)
    return {"parts"}


@pytest.fixture
def publisher(tmp_path: Path, readable: set[str]) -> Publisher:
    return Publisher(ArrayStore(tmp_path), frozenset({Role.INFERENCE}), lambda _who, name: name in readable)


async def test_a_federation_that_is_closed_to_a_site_does_not_cost_it_the_others(
    publisher: Publisher, readable: set[str]
) -> None:
    for name in ("boats", "parts"):
        publisher.publish(Release(federation=name, version=1))
    watch = publisher.WatchReleases(WatchReleasesRequest(federations=["parts", "boats", "not-yet"]), CONTEXT)
    with capture_logs() as logs:
        assert (await anext(watch)).release.federation == "parts"
    [said] = logs
    assert (said["event"], said["federations"]) == ("releases_not_readable", ["boats", "not-yet"])
    publisher.publish(Release(federation="boats", version=2))
    publisher.publish(Release(federation="parts", version=0))  # rolled back
    assert (await anext(watch)).release == Release(federation="parts", version=0)
    readable.add("boats")
    assert (await anext(watch)).release == Release(federation="boats", version=2)


async def test_who_may_read_none_of_what_he_names_is_told_so(publisher: Publisher) -> None:
    request = WatchReleasesRequest(federations=["boats", "not-yet"])
    with pytest.raises(Refusal, match="inference 'plant-a', who may not read releases of 'boats', 'not-yet'") as caught:
        await anext(publisher.WatchReleases(request, CONTEXT))
    assert caught.value.status is grpc.StatusCode.PERMISSION_DENIED
