"""Following a publisher that says, sends and breaks what a test wants, over a real connection."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio
from structlog.testing import capture_logs

from feddymem.v1 import release_pb2_grpc
from feddymem.v1.release_pb2 import (
    RELEASE_KIND_GLOBAL_MEMORY,
    RELEASE_KIND_MEMORY_GENERATOR,
    DownloadArrayRequest,
    DownloadArrayResponse,
    Release,
    WatchReleasesRequest,
    WatchReleasesResponse,
)
from services.runtime import following
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import WireArray, chunks, encode
from services.runtime.changes import Changes
from services.runtime.errors import data_loss
from services.runtime.following import follow
from services.runtime.identity import Role
from services.runtime.settings import ClientSettings
from tests.certificates import Authority

SECONDS = 30
Name = tuple[str, int]
"""Federation and version of a release."""
SHADOW = 9
"""Version that is in the shadow of the active release, wherever it is said."""


def array(name: Name) -> WireArray:
    federation, version = name
    return encode("items", np.frombuffer(f"{federation:>11}{version}".encode(), np.float32))


def release(name: Name) -> Release:
    federation, version = name
    arrays = [array(name).manifest]
    shadow = version == SHADOW
    kind = RELEASE_KIND_MEMORY_GENERATOR if federation == "generator" else RELEASE_KIND_GLOBAL_MEMORY
    return Release(federation=federation, version=version, kind=kind, arrays=arrays, shadow=shadow)


class ScriptedPublisher(release_pb2_grpc.ReleaseServiceServicer):
    """Says what it is told to.

    Attributes:
        watches: that have begun.
        downloads: that have begun, by name of the release.
        held: releases that are not sent while they are in here.
        refused: releases the next download of which fails.
    """

    def __init__(self) -> None:
        self.watches = 0
        self.downloads: Counter[Name] = Counter()
        self.held: set[Name] = set()
        self.refused: set[Name] = set()
        self._said: list[Name] = []
        self._breaks = 0
        self.changes = Changes()

    def say(self, *names: Name) -> None:
        self._said += names
        self.changes.notify()

    def send(self, name: Name) -> None:
        self.held.discard(name)
        self.changes.notify()

    def break_watches(self) -> None:
        self._breaks += 1
        self.changes.notify()

    async def WatchReleases(  # noqa: N802
        self, request: WatchReleasesRequest, context: Any
    ) -> AsyncIterator[WatchReleasesResponse]:
        self.watches += 1
        self.changes.notify()
        told, breaks = 0, self._breaks
        while True:
            if self._breaks != breaks:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "as told")
            if told < len(self._said):
                told += 1
                yield WatchReleasesResponse(release=release(self._said[told - 1]))
            else:
                await self.changes.wait()

    async def DownloadArray(  # noqa: N802
        self, request: DownloadArrayRequest, context: Any
    ) -> AsyncIterator[DownloadArrayResponse]:
        name = next(name for name in self._said if array(name).manifest.sha256 == request.sha256)
        self.downloads[name] += 1
        self.changes.notify()
        if name in self.refused:
            self.refused.remove(name)
            await context.abort(grpc.StatusCode.DATA_LOSS, "as told")
        while name in self.held:
            await self.changes.wait()
        for chunk in chunks(request.sha256, array(name).data, request.offset):
            yield DownloadArrayResponse(chunk=chunk)


class Receiver:
    """Takes releases.

    Attributes:
        begun: what it was handed.
        taken: what it has taken.
        faults: of releases, each raised once.
        slow: releases that are not done while they are in here.
    """

    def __init__(self) -> None:
        self.begun: list[Name] = []
        self.taken: list[Name] = []
        self.faults: dict[Name, Exception] = {}
        self.slow: set[Name] = set()
        self.changes = Changes()

    async def receive(self, release: Release) -> None:
        name = release.federation, release.version
        self.begun.append(name)
        self.changes.notify()
        if fault := self.faults.pop(name, None):
            raise fault
        while name in self.slow:
            await self.changes.wait()
        self.taken.append(name)
        self.changes.notify()

    def finish(self, name: Name) -> None:
        self.slow.discard(name)
        self.changes.notify()


async def until(who: ScriptedPublisher | Receiver, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await who.changes.wait()


@pytest.fixture
def publisher() -> ScriptedPublisher:
    return ScriptedPublisher()


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
async def task(publisher: ScriptedPublisher, receiver: Receiver, tmp_path: Path) -> AsyncIterator[asyncio.Task[None]]:
    """Follows the publisher."""
    async with served(publisher) as address:
        running = asyncio.create_task(_following(address, tmp_path, receiver.receive))
        yield running
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


@asynccontextmanager
async def served(publisher: ScriptedPublisher) -> AsyncIterator[str]:
    server = aio.server()
    release_pb2_grpc.add_ReleaseServiceServicer_to_server(publisher, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def _following(
    address: str, folder: Path, receive: Callable[[Release], Awaitable[None]], role: Role = Role.AGGREGATOR
) -> None:
    settings = ClientSettings(
        listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", state_dir=folder, aggregator=address, retry_seconds=0.01
    )
    await follow(address, (), ArrayStore(folder / "arrays"), settings, role, receive)


async def test_a_download_that_takes_long_holds_up_no_other(
    publisher: ScriptedPublisher, receiver: Receiver, task: asyncio.Task[None]
) -> None:
    publisher.held.add(("parts", 1))
    publisher.say(("parts", 1), ("screws", 1))
    await until(receiver, lambda: receiver.taken == [("screws", 1)])
    publisher.send(("parts", 1))
    await until(receiver, lambda: receiver.taken == [("screws", 1), ("parts", 1)])
    assert publisher.downloads.total() == 2


async def test_of_releases_that_wait_the_newest_is_next(
    publisher: ScriptedPublisher, receiver: Receiver, task: asyncio.Task[None]
) -> None:
    publisher.held.add(("parts", 1))
    publisher.say(("parts", 1))
    await until(publisher, lambda: publisher.downloads["parts", 1] == 1)
    publisher.say(("parts", 2), ("parts", 3), ("screws", 1))
    await until(receiver, lambda: receiver.taken == [("screws", 1)])  # and so the others have come
    publisher.send(("parts", 1))
    await until(receiver, lambda: receiver.taken == [("screws", 1), ("parts", 1), ("parts", 3)])
    assert ("parts", 2) not in publisher.downloads


async def test_a_release_and_the_one_in_its_shadow_do_not_take_each_others_place(
    publisher: ScriptedPublisher, receiver: Receiver, task: asyncio.Task[None]
) -> None:
    publisher.held.add(("parts", 1))
    publisher.say(("parts", 1), ("parts", SHADOW))
    await until(receiver, lambda: receiver.taken == [("parts", SHADOW)])
    publisher.send(("parts", 1))
    await until(receiver, lambda: receiver.taken == [("parts", SHADOW), ("parts", 1)])


async def test_a_download_that_fails_is_tried_again_and_the_watch_goes_on(
    publisher: ScriptedPublisher, receiver: Receiver, task: asyncio.Task[None]
) -> None:
    publisher.refused.add(("parts", 1))
    publisher.say(("parts", 1), ("screws", 1))
    await until(receiver, lambda: sorted(receiver.taken) == [("parts", 1), ("screws", 1)])
    assert (publisher.downloads["parts", 1], publisher.watches) == (2, 1)


@pytest.mark.parametrize("fault", [RuntimeError("a fault of ours"), data_loss("damaged")], ids=["fault", "refusal"])
async def test_a_release_that_is_not_taken_is_tried_again_and_the_watch_goes_on(
    publisher: ScriptedPublisher, receiver: Receiver, task: asyncio.Task[None], fault: Exception
) -> None:
    receiver.faults["parts", 1] = fault
    publisher.say(("parts", 1), ("screws", 1))
    await until(receiver, lambda: sorted(receiver.taken) == [("parts", 1), ("screws", 1)])
    assert (receiver.begun.count(("parts", 1)), publisher.watches) == (2, 1)


async def test_a_watch_that_breaks_is_begun_anew_once_what_is_being_received_has_been(
    publisher: ScriptedPublisher, receiver: Receiver, task: asyncio.Task[None]
) -> None:
    publisher.held.add(("screws", 1))
    receiver.slow.add(("parts", 1))
    publisher.say(("screws", 1), ("parts", 1))
    await until(receiver, lambda: receiver.begun == [("parts", 1)])
    await until(publisher, lambda: publisher.downloads["screws", 1] == 1)
    with capture_logs() as lines:
        publisher.break_watches()
        async with asyncio.timeout(SECONDS):
            while not any(line["event"] == "watch_interrupted" for line in lines):  # noqa: ASYNC110 - a log has no event
                await asyncio.sleep(0)
    receiver.finish(("parts", 1))
    await until(publisher, lambda: publisher.watches == 2 and publisher.downloads["screws", 1] == 2)
    assert receiver.taken[0] == ("parts", 1)
    publisher.send(("screws", 1))
    await until(receiver, lambda: sorted(receiver.taken) == [("parts", 1), ("parts", 1), ("screws", 1)])


async def test_a_watch_that_says_nothing_is_begun_anew_and_nothing_is_received_twice(
    publisher: ScriptedPublisher, receiver: Receiver, task: asyncio.Task[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "WATCH_SECONDS", 0.02)
    publisher.held.add(("screws", 1))
    publisher.say(("parts", 1), ("screws", 1))
    await until(publisher, lambda: publisher.watches == 5)
    publisher.send(("screws", 1))
    await until(receiver, lambda: ("screws", 1) in receiver.taken)
    assert sorted(receiver.begun) == [("parts", 1), ("screws", 1)]
    assert publisher.downloads.total() == 2


@pytest.mark.parametrize("role", [Role.AGGREGATOR, Role.SITE])
async def test_of_a_publisher_nothing_is_taken_that_it_may_not_send(
    publisher: ScriptedPublisher, receiver: Receiver, tmp_path: Path, role: Role
) -> None:
    publisher.say(("parts", 1), ("generator", 1), ("parts", 2))
    taken = {Role.AGGREGATOR: [("parts", 2)], Role.SITE: [("generator", 1)]}[role]
    with capture_logs() as lines:
        async with served(publisher) as address:
            running = asyncio.create_task(_following(address, tmp_path, receiver.receive, role))
            await until(receiver, lambda: receiver.taken[-1:] == taken)
            async with asyncio.timeout(SECONDS):
                while not (refused := [line for line in lines if line["event"] == "release_refused"]):  # noqa: ASYNC110
                    await asyncio.sleep(0)
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
    assert {name for name, _version in receiver.begun} == {taken[0][0]}
    assert {line["federation"] for line in refused} == {"parts", "generator"} - {taken[0][0]}
    assert "may send RELEASE_KIND_" in refused[0]["reason"]


async def test_an_address_that_cannot_be_one_ends_nothing(tmp_path: Path) -> None:
    tls_dir = Authority(tmp_path / "ca").issue(Role.INFERENCE, "plant")
    settings = ClientSettings(
        listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
        state_dir=tmp_path,
        aggregator="127.0.0.1:1",
        tls_dir=tls_dir,
        rpc_timeout_seconds=0.2,
        retry_seconds=0.01,
    )

    async def receive(_release: Release) -> None:
        raise AssertionError("nobody is there")

    with capture_logs() as lines:
        following = asyncio.ensure_future(
            follow("a..b:7070", (), ArrayStore(tmp_path / "arrays"), settings, Role.SITE, receive)
        )
        async with asyncio.timeout(SECONDS):
            while len(lines) < 2:  # noqa: ASYNC110 - there is no event for a log line
                await asyncio.sleep(0.01)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    assert {line["event"] for line in lines} == {"publisher_unreachable"}


async def test_who_stops_following_leaves_nothing_running(
    publisher: ScriptedPublisher, receiver: Receiver, tmp_path: Path
) -> None:
    publisher.held.add(("parts", 1))
    receiver.slow.add(("screws", 1))
    async with served(publisher) as address:
        before = asyncio.all_tasks()
        running = asyncio.create_task(_following(address, tmp_path, receiver.receive))
        publisher.say(("parts", 1), ("screws", 1))
        await until(receiver, lambda: receiver.begun == [("screws", 1)])
        await until(publisher, lambda: publisher.downloads["parts", 1] == 1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    ours = [task for task in asyncio.all_tasks() - before if "_take_all" in str(task.get_coro())]
    assert ours == []
    assert receiver.taken == []
