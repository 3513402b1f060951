"""Requests in memory: no more bytes than are allowed, whoever sends them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from feddymem.v1.inspection_pb2 import InspectRequest, InspectStreamRequest, InspectStreamResponse
from services.runtime.receiving import Bodies
from services.runtime.rpc import RPCS_OVER_LIMIT
from tests.unit.boundary.serving import INSPECTION, SECONDS, Inspections, outcome, served

INSPECT, STREAM = f"{INSPECTION}/Inspect", f"{INSPECTION}/InspectStream"
LARGE = InspectRequest(encoded=bytes(700_000))
HELD = InspectRequest(federation="held", encoded=LARGE.encoded).SerializeToString()


async def test_a_request_that_does_not_fit_is_refused_with_a_hint_until_another_has_ended(tmp_path: Path) -> None:
    inspections, large = Inspections(), LARGE.SerializeToString()
    before = RPCS_OVER_LIMIT.labels(INSPECT, "bytes")._value.get()
    async with (
        served(tmp_path, inspections=inspections, held_bytes=2**20) as address,
        aio.insecure_channel(address) as channel,
    ):
        held = asyncio.create_task(outcome(channel, INSPECT, HELD))
        await asyncio.wait_for(inspections.holding.get(), SECONDS)
        code, details, _id = await outcome(channel, INSPECT, large)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details == (
            f"{len(HELD)} bytes of requests are in memory, and {len(large)} more do not fit into the {2**20} that are "
            "allowed; try again in a second"
        )
        assert (await outcome(channel, INSPECT, b""))[0] is grpc.StatusCode.OK  # small ones fit
        inspections.let_go.set()
        assert (await held)[0] is grpc.StatusCode.OK
        assert (await outcome(channel, INSPECT, large))[0] is grpc.StatusCode.OK
    assert RPCS_OVER_LIMIT.labels(INSPECT, "bytes")._value.get() == before + 1


async def test_a_request_of_a_stream_that_does_not_fit_waits(tmp_path: Path) -> None:
    inspections, large = Inspections(), InspectStreamRequest(id="large", inspect=LARGE).SerializeToString()
    async with (
        served(tmp_path, inspections=inspections, held_bytes=2**20) as address,
        aio.insecure_channel(address) as channel,
    ):
        rpc: Any = channel.stream_stream(STREAM)
        stream = rpc(timeout=SECONDS)
        for _ in range(3):  # what has its answer is no longer in memory
            await stream.write(large)
            assert InspectStreamResponse.FromString(await stream.read()).id == "large"
        held = asyncio.create_task(outcome(channel, INSPECT, HELD))
        await asyncio.wait_for(inspections.holding.get(), SECONDS)
        await stream.write(large)
        answer = asyncio.create_task(stream.read())
        for _ in range(20):
            assert (await outcome(channel, INSPECT, b""))[0] is grpc.StatusCode.OK
        assert not answer.done()
        inspections.let_go.set()
        assert InspectStreamResponse.FromString(await answer).id == "large"
        await held


def test_who_holds_little_gets_an_equal_share_of_what_others_hold() -> None:
    bodies = Bodies(2**20)
    with bodies.held("a", 2**20):
        assert not bodies.fits("a", 2**17)
        assert bodies.fits("b", 2**19)
        assert not bodies.fits("b", 2**19 + 1)
        with bodies.held("b", 2**19):
            assert not bodies.fits("b", 2**17)
            assert bodies.fits("c", 2**18)
    assert bodies.fits("a", 2**20)


async def test_a_stream_that_ends_leaves_nothing_behind() -> None:
    bodies = Bodies(2**20)
    with bodies.of_stream("a") as stream:
        await stream.take(2**19)
        await stream.take(2**19)
        waiting = asyncio.create_task(stream.take(2**18))
        await asyncio.sleep(0)
        assert not waiting.done()
        stream.answered()
        await asyncio.wait_for(waiting, SECONDS)
        assert not bodies.fits("a", 2**19)
    assert bodies.fits("a", 2**20)
