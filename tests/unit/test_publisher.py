"""Who is served which releases, and what serving them costs."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from structlog.testing import capture_logs

from feddymem.v1.array_pb2 import Array
from feddymem.v1.release_pb2 import DownloadArrayRequest, Release, WatchReleasesRequest
from services.runtime import publisher as module
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import CHUNK_BYTES
from services.runtime.errors import Refusal
from services.runtime.identity import Identity, Role
from services.runtime.publisher import Publisher
from tests.samples import total

PLANT = Identity(Role.INFERENCE, "plant-a")
CONTEXT: Any = None


@contextmanager
def tracing_memory() -> Iterator[Callable[[], int]]:
    """Tells how many bytes Python has taken since."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


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


async def test_downloads_that_nobody_reads_hold_no_more_than_a_chunk_each(publisher: Publisher, tmp_path: Path) -> None:
    data, downloads = bytes(16 * CHUNK_BYTES), 30
    array = Array(name="items", sha256=hashlib.sha256(data).digest(), size_bytes=len(data))
    ArrayStore(tmp_path).put(array.sha256, data)
    publisher.publish(Release(federation="parts", version=1, arrays=[array]))
    del data
    with tracing_memory() as held_bytes:
        unread = [publisher.DownloadArray(DownloadArrayRequest(sha256=array.sha256), CONTEXT) for _ in range(downloads)]
        for download in unread:
            await anext(download)
        assert held_bytes() < 2 * downloads * CHUNK_BYTES
    del unread


@pytest.mark.parametrize("offset", [0, 5, CHUNK_BYTES, CHUNK_BYTES + 7])
async def test_bytes_are_counted_that_are_sent_for_the_federation_that_they_are_read_of(
    publisher: Publisher, tmp_path: Path, offset: int
) -> None:
    def sent() -> list[float]:
        return [total("published_bytes_total", federation=name) for name in ("boats", "parts")]

    data = bytes(CHUNK_BYTES + 7)
    array = Array(name="items", sha256=hashlib.sha256(data).digest(), size_bytes=len(data))
    ArrayStore(tmp_path).put(array.sha256, data)
    for name in ("boats", "parts"):  # both have it, but one is closed to the caller
        publisher.publish(Release(federation=name, version=1, arrays=[array]))
    boats, parts = sent()
    async for response in publisher.DownloadArray(DownloadArrayRequest(sha256=array.sha256, offset=offset), CONTEXT):
        assert sent() == [boats, parts], "those before, which have been taken"
        parts += len(response.chunk.data)
    assert sent() == [boats, parts]


async def test_a_download_goes_on_at_its_offset_and_finds_what_was_damaged(
    publisher: Publisher, tmp_path: Path
) -> None:
    data = np.random.default_rng(0).bytes(2 * CHUNK_BYTES + 7)
    array, store = Array(name="items", sha256=hashlib.sha256(data).digest(), size_bytes=len(data)), ArrayStore(tmp_path)
    store.put(array.sha256, data)
    publisher.publish(Release(federation="parts", version=1, arrays=[array]))

    async def downloaded(offset: int) -> bytes:
        request = DownloadArrayRequest(sha256=array.sha256, offset=offset)
        return b"".join([each.chunk.data async for each in publisher.DownloadArray(request, CONTEXT)])

    for offset in (0, 5, 2 * CHUNK_BYTES, len(data)):
        assert await downloaded(offset) == data[offset:]
    for offset, status in ((len(data) + 1, grpc.StatusCode.OUT_OF_RANGE), (0, grpc.StatusCode.DATA_LOSS)):
        if offset == 0:
            (tmp_path / array.sha256.hex()).write_bytes(data[:-1])
        with pytest.raises(Refusal) as caught:
            await downloaded(offset)
        assert caught.value.status is status
    assert array.sha256 not in store


async def test_who_may_read_none_of_what_he_names_is_told_so(publisher: Publisher) -> None:
    request = WatchReleasesRequest(federations=["boats", "not-yet"])
    with pytest.raises(Refusal, match="inference 'plant-a', who may not read releases of 'boats', 'not-yet'") as caught:
        await anext(publisher.WatchReleases(request, CONTEXT))
    assert caught.value.status is grpc.StatusCode.PERMISSION_DENIED
