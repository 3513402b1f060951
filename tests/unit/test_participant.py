"""What an edge client hears of the rounds, from an aggregator that says exactly what a test wants it to say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import grpc
import pytest
from grpc import aio
from structlog.testing import capture_logs

from feddymem.method import Method
from feddymem.progress import no_progress
from feddymem.v1.array_pb2 import Array
from feddymem.v1.federation_pb2 import (
    PHASE_CALIBRATING,
    PHASE_OPEN,
    PHASE_WAITING,
    CalibrateRequest,
    CalibrateResponse,
    GlobalMemory,
    WatchRoundsRequest,
    WatchRoundsResponse,
)
from services.edge_client.computing import Computing
from services.edge_client.images import SiteImages
from services.edge_client.participant import Participant, _Aggregator
from services.edge_client.round_work import RoundWork
from services.edge_client.settings import EdgeClientSettings
from services.edge_client.state import EdgeState
from services.runtime import watching
from services.runtime.changes import Changes

PATIENCE_SECONDS = 30


Event = WatchRoundsResponse | None
"""What is heard of the rounds; None for silence."""


class Rounds:
    """Says what state the rounds are in, at once and when it has changed, as an aggregator does."""

    def __init__(self) -> None:
        self._state: WatchRoundsResponse | None = None
        self._ended = False
        self._changes = Changes()
        self.left = asyncio.Event()

    def say(self, state: WatchRoundsResponse) -> None:
        self._state = state
        self._changes.notify()

    def end(self) -> None:
        """Ends all watches, now and later."""
        self._ended = True
        self._changes.notify()

    async def watch(self, _request: WatchRoundsRequest, _context: object) -> AsyncIterator[WatchRoundsResponse]:
        said = None
        try:
            while True:
                if self._state is not None and said is not self._state:
                    said = self._state
                    yield said
                elif self._ended:
                    return
                else:
                    await self._changes.wait()
        finally:
            self.left.set()


class Silence:
    """What a watch says nothing for passes when a test says so, and not before."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._listening, self._timeout = asyncio.Event(), asyncio.timeout(None)
        self.seconds = 0.0
        patch.setattr(watching, "asyncio", SimpleNamespace(timeout=self._begins))

    def _begins(self, seconds: float) -> asyncio.Timeout:
        self.seconds, self._timeout = seconds, asyncio.timeout(None)
        self._listening.set()
        return self._timeout

    async def heard(self, events: AsyncIterator[Event], said_again: int = 0) -> Event:
        """What is heard when nothing is said for long enough, once so much has been said that is no news."""
        self._listening.clear()
        heard = asyncio.ensure_future(anext(events))
        for left in range(said_again, -1, -1):
            listening = asyncio.ensure_future(self._listening.wait())
            await asyncio.wait({heard, listening}, timeout=PATIENCE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            listening.cancel()
            self._listening.clear()
            if not left and not heard.done():
                self._timeout.reschedule(asyncio.get_running_loop().time())
        return await asyncio.wait_for(heard, PATIENCE_SECONDS)


@asynccontextmanager
async def connected(rounds: Rounds) -> AsyncIterator[_Aggregator]:
    server = aio.server()
    watch = grpc.unary_stream_rpc_method_handler(
        rounds.watch,
        request_deserializer=WatchRoundsRequest.FromString,
        response_serializer=WatchRoundsResponse.SerializeToString,
    )
    service = grpc.method_handlers_generic_handler("feddymem.v1.FederationService", {"WatchRounds": watch})
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield _Aggregator(channel)
    finally:
        await server.stop(None)


@pytest.fixture
def participant(tmp_path: Path) -> Participant:
    fixed = {"aggregator": "127.0.0.1:1", "federation": "parts", "site": "a", "data": "."}
    settings = EdgeClientSettings(**fixed)  # type: ignore[arg-type]
    state = EdgeState(tmp_path)
    state.claim("federation parts, site a")
    images, work = cast("SiteImages", SimpleNamespace()), cast("RoundWork", SimpleNamespace())  # not used here
    return Participant(settings, images, state, work, Computing(settings, no_progress))


def opened(number: int, waits_for: str = "") -> WatchRoundsResponse:
    return WatchRoundsResponse(phase=PHASE_OPEN, round=number, waits_for=waits_for)


async def test_while_nothing_is_said_there_is_time_to_look_and_nothing_said_is_lost(
    participant: Participant, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds, silence = Rounds(), Silence(monkeypatch)
    async with connected(rounds) as aggregator, aclosing(participant._events(aggregator)) as events:
        assert [await silence.heard(events), await silence.heard(events)] == [None, None]
        assert silence.seconds == participant._settings.scan_seconds
        rounds.say(opened(1))
        assert await following(events) == opened(1)
        assert [await silence.heard(events), await silence.heard(events, said_again=1)] == [None, None]
        for state in (opened(1, "2 more banks"), opened(1, "1 more banks"), opened(2)):
            rounds.say(state)
            assert await following(events) == state


async def test_the_end_of_the_stream_is_the_end(participant: Participant) -> None:
    rounds = Rounds()
    rounds.say(opened(1))
    rounds.end()
    async with connected(rounds) as aggregator, aclosing(participant._events(aggregator)) as events:
        assert [event async for event in events if event is not None] == [opened(1)]


async def test_a_broken_line_is_an_error(participant: Participant) -> None:
    async with aio.insecure_channel("127.0.0.1:1") as channel:
        with pytest.raises(aio.AioRpcError) as broken:
            async for _event in participant._events(_Aggregator(channel)):
                pass
    assert broken.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_who_stops_listening_leaves_the_aggregator(participant: Participant) -> None:
    rounds = Rounds()
    rounds.say(opened(1))
    async with connected(rounds) as aggregator:
        async with aclosing(participant._events(aggregator)) as events:
            assert await following(events) == opened(1)
        await asyncio.wait_for(rounds.left.wait(), PATIENCE_SECONDS)


def test_the_log_says_what_a_round_waits_for_once(participant: Participant) -> None:
    said = [
        WatchRoundsResponse(phase=PHASE_WAITING, round=1, waits_for="1 more to join"),
        opened(1, "2 more banks"),
        opened(1, "2 more banks"),
        opened(1, "1 more banks"),
        opened(1),
        opened(2, "1 more banks"),
    ]
    with capture_logs() as logs:
        for event in said:
            participant._tell_waiting(event)
    assert [(entry["event"], entry["round"], entry["waits_for"]) for entry in logs] == [
        ("waiting", 1, "1 more to join"),
        ("waiting", 1, "2 more banks"),
        ("waiting", 1, "1 more banks"),
        ("waiting", 2, "1 more banks"),
    ]


async def following(events: AsyncIterator[Event]) -> WatchRoundsResponse:
    """The next state of the rounds that is said."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        async for event in events:
            if event is not None:
                return event
    raise AssertionError("the stream of rounds ended")


def candidate(items: bytes, number: int = 1) -> WatchRoundsResponse:
    memory = GlobalMemory(version=number, arrays=[Array(name="items", sha256=items)])
    return WatchRoundsResponse(phase=PHASE_CALIBRATING, round=number, candidate=memory)


async def test_another_candidate_of_a_round_is_news(participant: Participant) -> None:
    rounds = Rounds()
    async with connected(rounds) as aggregator, aclosing(participant._events(aggregator)) as events:
        for state in (candidate(b"1"), candidate(b"2")):
            rounds.say(state)
            assert await following(events) == state


class Calibrated:
    """An aggregator that takes calibrations, or answers with a status."""

    def __init__(self) -> None:
        self.said: list[CalibrateRequest] = []
        self.answer: grpc.StatusCode | None = None
        self.rounds = self

    async def Calibrate(self, request: CalibrateRequest, timeout: float) -> CalibrateResponse:  # noqa: N802, ASYNC109
        assert timeout > 0
        self.said.append(request)
        if self.answer is not None:
            raise aio.AioRpcError(self.answer, aio.Metadata(), aio.Metadata(), details="no")
        return CalibrateResponse()


@pytest.fixture
def made(participant: Participant, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Items of the candidates that were scored."""
    scored: list[bytes] = []

    async def make(event: WatchRoundsResponse, _method: Method, _aggregator: object) -> CalibrateRequest:
        items = event.candidate.arrays[0].sha256
        scored.append(items)
        return CalibrateRequest(round=event.round, items_sha256=items)

    monkeypatch.setattr(participant, "_make_calibration", make)
    return scored


async def calibrate(participant: Participant, aggregator: Calibrated, event: WatchRoundsResponse) -> None:
    await participant._calibrate(event, Method(), cast("_Aggregator", aggregator))


async def test_a_candidate_is_calibrated_once_and_another_one_again(
    participant: Participant, made: list[bytes]
) -> None:
    aggregator = Calibrated()
    for event in (candidate(b"1"), candidate(b"1"), candidate(b"2"), candidate(b"2", 2)):
        await calibrate(participant, aggregator, event)
    assert made == [b"1", b"2", b"2"]
    assert [(said.round, said.items_sha256) for said in aggregator.said] == [(1, b"1"), (1, b"2"), (2, b"2")]


async def test_after_a_broken_line_the_same_is_said_again_and_nothing_is_scored_anew(
    participant: Participant, made: list[bytes]
) -> None:
    aggregator = Calibrated()
    aggregator.answer = grpc.StatusCode.UNAVAILABLE
    with pytest.raises(aio.AioRpcError):
        await calibrate(participant, aggregator, candidate(b"1"))
    aggregator.answer = None
    await calibrate(participant, aggregator, candidate(b"1"))
    assert (made, len(aggregator.said)) == ([b"1"], 2)


@pytest.mark.parametrize("answer", [grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.FAILED_PRECONDITION])
async def test_a_calibration_that_is_not_taken_does_not_hold_the_site_up(
    participant: Participant, made: list[bytes], answer: grpc.StatusCode
) -> None:
    """As where another one is accepted, made before a restart of images that have changed since."""
    aggregator = Calibrated()
    aggregator.answer = answer
    with capture_logs() as logs:
        for _ in range(2):
            await calibrate(participant, aggregator, candidate(b"1"))
    assert len(aggregator.said) == len(made) == 1
    assert [entry["event"] for entry in logs] == ["calibration_not_taken"]
