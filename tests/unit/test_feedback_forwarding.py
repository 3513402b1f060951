"""Feedback goes to the edge client that it is for; whatever that says or does not say, the caller is told it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import cv2
import grpc
import numpy as np
import pytest
from grpc import aio

from feddymem.v1 import feedback_pb2_grpc
from feddymem.v1.feedback_pb2 import (
    OPINION_BAD_PART,
    OPINION_FALSE_ALARM,
    OPINION_UNSPECIFIED,
    GetFeedbackOwnerRequest,
    GetFeedbackOwnerResponse,
    KeepFeedbackRequest,
    KeepFeedbackResponse,
)
from feddymem.v1.inspection_pb2 import ReportFeedbackRequest
from services.edge_client.feedback import FeedbackStore
from services.edge_client.feedback_servicer import FeedbackServicer
from services.edge_client.settings import EdgeClientSettings
from services.inference import feedback as module
from services.inference.feedback import FORWARDED_AT_ONCE, FeedbackForwarder
from services.inference.settings import InferenceSettings
from services.runtime.errors import Refusal
from services.runtime.feedback import OPINIONS
from tests.samples import total

REPORT = ReportFeedbackRequest(federation="parts", site="a", encoded=b"x", opinion=OPINION_FALSE_ALARM, note="n")
PATIENCE_SECONDS = 10


class EdgeClient(feedback_pb2_grpc.FeedbackServiceServicer):
    """Says whose it is, and then what a test wants it to say."""

    def __init__(self, federation: str, site: str, status: grpc.StatusCode | None = None) -> None:
        self._owner = GetFeedbackOwnerResponse(federation=federation, site=site)
        self._status = status
        self.kept: list[KeepFeedbackRequest] = []
        self.waits = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def GetFeedbackOwner(self, request: GetFeedbackOwnerRequest, context: Any) -> GetFeedbackOwnerResponse:  # noqa: N802
        return self._owner

    async def KeepFeedback(self, request: KeepFeedbackRequest, context: Any) -> KeepFeedbackResponse:  # noqa: N802
        request.DiscardUnknownFields()  # the checksum
        self.kept.append(request)
        self.waits.set()
        await self.go_on.wait()
        if self._status is not None:
            await context.abort(self._status, "as told")
        return KeepFeedbackResponse(image="kept")

    def ListFeedback(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    def DecideFeedback(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError


@asynccontextmanager
async def forwarder(folder: Path, *edges: EdgeClient | None) -> AsyncIterator[FeedbackForwarder]:
    """One for these edge clients; None is one that is away."""
    async with AsyncExitStack() as stack:
        addresses = []
        for edge in edges:
            server = aio.server()
            port = server.add_insecure_port("127.0.0.1:0")
            addresses.append(f"127.0.0.1:{port}")
            if edge is None:
                await server.stop(0)
                continue
            feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(edge, server)
            await server.start()
            stack.push_async_callback(server.stop, 0)
        settings = InferenceSettings(aggregator="127.0.0.1:1", state_dir=folder, edge_clients=tuple(addresses))
        yield FeedbackForwarder(settings)


async def refused(forward: FeedbackForwarder, report: ReportFeedbackRequest = REPORT) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(Refusal) as caught:
        await forward.report(report)
    return caught.value.status, caught.value.text


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIND_SECONDS", 0.5)


def named(federation: str = "", site: str = "") -> ReportFeedbackRequest:
    return ReportFeedbackRequest(federation=federation, site=site, encoded=b"x", opinion=OPINION_FALSE_ALARM)


async def test_it_goes_to_the_one_that_it_is_for_and_to_no_other(tmp_path: Path) -> None:
    edges = [EdgeClient("cups", "a"), EdgeClient("parts", "b"), EdgeClient("parts", "a")]
    async with forwarder(tmp_path, *edges) as forward:
        assert await forward.report(REPORT) == "kept"
        assert await forward.report(named("cups")) == "kept"
        assert await forward.report(named(site="b")) == "kept"
        assert await refused(forward, named("parts")) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "this service knows 2 edge clients; name the federation and the site",
        )
        assert (await refused(forward, named("plates", "a")))[0] is grpc.StatusCode.NOT_FOUND
    expected = KeepFeedbackRequest(federation="parts", site="a", encoded=b"x", opinion=OPINION_FALSE_ALARM, note="n")
    assert [[keep.site for keep in edge.kept] for edge in edges] == [["a"], ["b"], ["a"]]
    assert edges[2].kept == [expected]


async def test_while_one_is_away_only_what_is_for_another_is_kept(tmp_path: Path) -> None:
    async with forwarder(tmp_path, EdgeClient("parts", "a"), None) as forward:
        assert await forward.report(REPORT) == "kept"
        for report in (named("parts", "b"), named("parts")):
            status, text = await refused(forward, report)
            assert status is grpc.StatusCode.UNAVAILABLE
            assert "nothing was kept, try again" in text


async def test_without_edge_clients_there_is_none(tmp_path: Path) -> None:
    async with forwarder(tmp_path) as forward:
        assert (await refused(forward))[0] is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("says", "heard"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INVALID_ARGUMENT),
        (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.NOT_FOUND),
        (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE),
        (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE),
        (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_what_the_edge_client_says_is_passed_on_where_it_is_for_the_caller(
    tmp_path: Path, says: grpc.StatusCode, heard: grpc.StatusCode
) -> None:
    async with forwarder(tmp_path, EdgeClient("parts", "a", says)) as forward:
        status, text = await refused(forward)
    assert status is heard
    assert ("as told" in text) == (heard is not grpc.StatusCode.UNAVAILABLE)


async def test_no_more_images_are_held_at_once_than_was_said(tmp_path: Path) -> None:
    edge = EdgeClient("parts", "a")
    edge.go_on.clear()
    async with forwarder(tmp_path, edge) as forward, asyncio.timeout(PATIENCE_SECONDS):
        running = [asyncio.ensure_future(forward.report(REPORT)) for _ in range(FORWARDED_AT_ONCE)]
        await edge.waits.wait()
        assert (await refused(forward))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        edge.go_on.set()
        assert await asyncio.gather(*running) == ["kept"] * FORWARDED_AT_ONCE
        assert await forward.report(REPORT) == "kept"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"encoded": b""}, "no image"),
        ({"opinion": OPINION_UNSPECIFIED}, "opinion is 0"),
        ({"opinion": 9}, "opinion is 9"),
        ({"note": "x" * 1001}, "1001 characters"),
        ({"note": "\x1b[31m"}, "control characters"),
    ],
)
async def test_what_is_no_feedback_is_refused_at_once(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    edge = EdgeClient("parts", "a")
    said: dict[str, Any] = {
        "federation": "parts",
        "site": "a",
        "encoded": b"x",
        "opinion": OPINION_FALSE_ALARM,
        **changes,
    }
    async with forwarder(tmp_path, edge) as forward:
        status, told = await refused(forward, ReportFeedbackRequest(**said))
        assert (status, text in told) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        assert edge.kept == []
        for note in ("x" * 1000, "two\nlines\tof it", "Schräglicht – 影"):
            assert await forward.report(ReportFeedbackRequest(**{**said, "encoded": b"x", "opinion": 1, "note": note}))


async def test_feedback_is_counted_by_opinion_where_it_is_kept(tmp_path: Path) -> None:
    def reports() -> dict[str, tuple[float, float]]:
        return {
            each: (total("feedback_reports_total", opinion=each), total("edge_feedback_total", opinion=each))
            for each in OPINIONS.values()
        }

    settings = EdgeClientSettings(aggregator="127.0.0.1:1", federation="parts", site="a", data=tmp_path)
    servicer = FeedbackServicer(settings)
    servicer.begin(FeedbackStore(tmp_path / "feedback", 2**20))
    before, wanted = reports(), dict.fromkeys(OPINIONS.values(), 0)
    encoded = cv2.imencode(".png", np.zeros((40, 40, 3), np.uint8))[1].tobytes()
    async with forwarder(tmp_path, servicer) as forward:  # type: ignore[arg-type]
        for opinion in (OPINION_FALSE_ALARM, OPINION_BAD_PART, OPINION_BAD_PART):
            wanted[OPINIONS[opinion]] += 1
            await forward.report(ReportFeedbackRequest(encoded=encoded, opinion=opinion))
            await refused(forward, ReportFeedbackRequest(encoded=b"no image", opinion=opinion))
            await refused(forward, ReportFeedbackRequest(encoded=encoded, opinion=OPINION_UNSPECIFIED))
            assert reports() == {
                name: (passed_on + wanted[name], kept + wanted[name]) for name, (passed_on, kept) in before.items()
            }


async def test_an_edge_client_that_starts_keeps_nothing_yet(tmp_path: Path) -> None:
    settings = EdgeClientSettings(aggregator="127.0.0.1:1", federation="parts", site="a", data=tmp_path)
    servicer = FeedbackServicer(settings)
    async with forwarder(tmp_path, servicer) as forward:  # type: ignore[arg-type]
        assert (await refused(forward))[0] is grpc.StatusCode.UNAVAILABLE
