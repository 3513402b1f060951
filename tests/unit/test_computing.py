"""Long work of an edge client: it waits while the disk is full, and ends when the service does."""

from __future__ import annotations

import asyncio
import errno
import threading

import pytest
from structlog.testing import capture_logs

from feddymem.progress import no_progress
from services.edge_client import metrics
from services.edge_client.computing import Computing
from services.edge_client.settings import EdgeClientSettings

PATIENCE_SECONDS = 10


def settings() -> EdgeClientSettings:
    fixed = {"aggregator": "127.0.0.1:1", "federation": "parts", "site": "a", "data": "."}
    return EdgeClientSettings(**fixed, retry_seconds=0.001)  # type: ignore[arg-type]


@pytest.fixture
def computing() -> Computing:
    return Computing(settings(), no_progress)


async def test_work_gets_its_arguments_and_gives_its_result(computing: Computing) -> None:
    assert await computing.run(int, "ff", base=16) == 255


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_a_full_disk_is_told_and_waited_for(computing: Computing, number: int) -> None:
    room = iter([False, False, True])

    def write(what: str) -> str:
        if not next(room):
            raise OSError(number, "no room")
        return what

    before = metrics.DISK_FULL._value.get()
    with capture_logs() as logs:
        assert await computing.run(write, "a bank") == "a bank"
    assert metrics.DISK_FULL._value.get() == before + 2
    assert [entry["event"] for entry in logs] == ["disk_full", "disk_full"]
    assert "no room" in logs[0]["reason"]


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied"), ValueError("a fault of ours")])
async def test_other_errors_are_not_waited_for(computing: Computing, error: Exception) -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        await computing.run(fail)
    assert len(calls) == 1


async def test_work_whose_service_stops_ends_at_its_next_step() -> None:
    began, stopped, ended = threading.Event(), threading.Event(), threading.Event()
    steps: list[int] = []
    computing = Computing(settings(), lambda _what, done, _total: steps.append(done))

    def work() -> None:
        try:
            computing.progress("features", 1, 3)
            began.set()
            assert stopped.wait(PATIENCE_SECONDS)
            computing.progress("features", 2, 3)
            computing.progress("features", 3, 3)
        finally:
            ended.set()

    running = asyncio.ensure_future(computing.run(work))
    assert await asyncio.to_thread(began.wait, PATIENCE_SECONDS)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    stopped.set()
    assert await asyncio.to_thread(ended.wait, PATIENCE_SECONDS)
    assert steps == [1]


async def test_who_waits_for_room_stops_at_once() -> None:
    full = threading.Event()
    computing = Computing(settings().model_copy(update={"retry_seconds": 3600.0}), no_progress)

    def write() -> None:
        full.set()
        raise OSError(errno.ENOSPC, "no room")

    running = asyncio.ensure_future(computing.run(write))
    assert await asyncio.to_thread(full.wait, PATIENCE_SECONDS)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, PATIENCE_SECONDS)
