"""What the edge client shows of its images, its rounds and its calls is what has become of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import numpy as np
import pytest
from grpc import aio
from structlog.testing import capture_logs

from feddymem.backbone import FeatureExtractor
from feddymem.feature_cache import CachedPatches
from feddymem.memory import MemoryBank
from feddymem.method import Method
from feddymem.progress import no_progress
from feddymem.v1.array_pb2 import Array
from feddymem.v1.federation_pb2 import (
    PHASE_CALIBRATING,
    PHASE_OPEN,
    BankAccepted,
    BankHeader,
    GlobalMemory,
    UploadBankRequest,
    UploadBankResponse,
    WatchRoundsResponse,
)
from services.edge_client import participant as participant_module
from services.edge_client.computing import Computing
from services.edge_client.images import SiteImages
from services.edge_client.participant import Participant
from services.edge_client.round_work import RoundWork
from services.edge_client.settings import EdgeClientSettings
from services.edge_client.state import EdgeState
from services.edge_client.upload import upload_bank
from services.runtime.arrays import bank_to_wire
from services.runtime.identity import Role
from services.runtime.publisher import Publisher
from services.runtime.server_identity import UnreachableError
from tests.integration.fake_site import make_bank
from tests.samples import growth, total
from tests.unit.test_site_images import site_images, write

PATCHES = 8 * 8
"""Of an image, at the input size of the extractor `small`."""
METHOD = Method(generator=True, bank_items=30, memory_items=60, rounds=3, item_type="float16", hold_out_share=0.25)
SECONDS = 30


def settings(**changes: object) -> EdgeClientSettings:
    fixed = {"aggregator": "127.0.0.1:1", "federation": "parts", "site": "a", "data": ".", **changes}
    return EdgeClientSettings(**fixed)  # type: ignore[arg-type]


def test_images_are_counted_when_they_are_extracted_and_shown_as_long_as_they_are_there(
    tmp_path: Path, small: FeatureExtractor
) -> None:
    paths = write(tmp_path / "data", *range(4))
    paths[3].write_bytes(b"no image")
    images = site_images(tmp_path, small)
    grown = growth("edge_images_extracted_total", "edge_features_total")
    seconds = growth("edge_extraction_seconds_total")

    def shown() -> tuple[float, float]:
        return total("edge_images", outcome="read"), total("edge_images", outcome="skipped")

    images.look()
    assert grown() == [3, 3 * PATCHES]
    assert shown() == (3, 1)
    [took] = seconds()
    assert 0 < took < SECONDS
    images.look()
    assert grown() == [3, 3 * PATCHES]
    assert seconds() == [took], "nothing was extracted"
    paths[0].unlink()
    write(tmp_path / "data", 10)
    images.look()
    assert grown() == [4, 4 * PATCHES]
    assert shown() == (3, 1)
    assert seconds() > [took]


class Site:
    """A site of eight images, and what it makes of rounds."""

    def __init__(self, folder: Path, extractor: FeatureExtractor) -> None:
        write(folder / "data", *range(8))
        self.images = site_images(folder, extractor)
        state = EdgeState(folder / "state")
        state.claim("federation parts, site a")
        publisher = Publisher(state.arrays, frozenset({Role.INFERENCE}), lambda _who, _federation: True)
        self.work = RoundWork(settings(), self.images, "cpu", state, publisher, Computing(settings(), no_progress))

    def present(self) -> CachedPatches:
        return self.images.look()

    async def bank(self, number: int, memory: MemoryBank | None = None, method: Method = METHOD) -> tuple[int, Any]:
        """Items and loss of a round's bank."""
        event = WatchRoundsResponse(phase=PHASE_OPEN, round=number)
        with capture_logs() as logs:
            header = await self.work.make_bank(event, method, self.present(), memory)
        [loss] = [entry["loss"] for entry in logs if entry["event"] == "bank_made"]
        [items] = [array.shape[0] for array in header.arrays if array.name == "items"]
        return items, loss


@pytest.fixture
def site(tmp_path: Path, small: FeatureExtractor) -> Site:
    return Site(tmp_path, small)


def memory_of(site: Site) -> MemoryBank:
    rng = np.random.default_rng(0)
    items = rng.normal(size=(20, site.images.feature_space.channels)).astype(np.float32)
    return MemoryBank(items, np.ones((20, 1), np.float32), np.ones(20, np.float32))


async def test_a_round_s_bank_is_shown_with_what_it_was_made_of(site: Site) -> None:
    updates = growth("edge_local_update_duration_seconds_count")
    _, held = site.present().split(METHOD.hold_out_share, METHOD.seed)
    assert held is not None
    for number, method, held_out, count in (
        (1, METHOD, held.images, 30),
        (2, METHOD.model_copy(update={"hold_out_share": 0.0, "bank_items": 7}), 0, 7),
    ):
        items, _ = await site.bank(number, method=method)
        assert items == total("edge_bank_items") == count
        assert total("edge_held_out_images") == held_out
        assert total("edge_memory_reduce_ratio") == pytest.approx(count / ((8 - held_out) * PATCHES))
        assert updates() == [number]


async def test_the_loss_is_that_of_the_last_round_that_trained(site: Site) -> None:
    _, untrained = await site.bank(1)
    assert untrained is None
    memory, losses = memory_of(site), []
    for number in (2, 3):
        _, loss = await site.bank(number, memory)
        assert total("edge_generator_loss") == loss > 0
        losses.append(loss)
    assert losses[0] != losses[1]
    await site.bank(4)  # without a global memory, nothing is trained
    assert total("edge_generator_loss") == losses[1]


async def test_a_calibration_is_timed(site: Site) -> None:
    memory = memory_of(site)
    await site.bank(1)
    timed = growth("edge_calibration_duration_seconds_count", "edge_calibration_duration_seconds_sum")
    candidate = GlobalMemory(version=1, arrays=[Array(name="items", sha256=b"x" * 32)])
    event = WatchRoundsResponse(phase=PHASE_CALIBRATING, round=1, candidate=candidate)
    said = await site.work.make_calibration(event, METHOD, site.present(), memory, None)
    assert sum(said.candidate.scores.counts) == total("edge_held_out_images") > 0
    count, seconds = timed()
    assert count == 1
    assert 0 < seconds < SECONDS


class Call:
    """An upload to an aggregator that has some of it already."""

    def __init__(self, resume: UploadBankResponse) -> None:
        self.answers = [resume, UploadBankResponse(accepted=BankAccepted(received_bytes=1))]
        self.sent: list[UploadBankRequest] = []

    def UploadBank(self, timeout: float) -> Call:  # noqa: N802
        return self

    async def write(self, request: UploadBankRequest) -> None:
        self.sent.append(request)

    async def done_writing(self) -> None:
        pass

    async def read(self) -> UploadBankResponse:
        return self.answers.pop(0)


@pytest.mark.parametrize("held", [0, 100])
async def test_bytes_are_counted_that_are_sent_and_not_those_that_are_there(tmp_path: Path, held: int) -> None:
    state, resume, arrays = EdgeState(tmp_path), UploadBankResponse(), bank_to_wire(make_bank(1), "float16")
    resume.resume.SetInParent()
    for array in arrays:
        state.arrays.put(array.manifest.sha256, array.data)
        offset = min(held, len(array.data))
        resume.resume.offsets.add(sha256=array.manifest.sha256, offset=offset)
    header = BankHeader(federation="parts", site="a", round=1, arrays=[array.manifest for array in arrays])
    sent, call = growth("edge_sent_bytes_total"), Call(resume)
    await upload_bank(header, state.arrays, cast("Any", call), SECONDS)
    [count] = sent()
    assert count == sum(request.ByteSize() for request in call.sent)
    data = sum(len(request.chunk.data) for request in call.sent)
    assert data == sum(max(0, len(array.data) - held) for array in arrays)
    assert data < count < data + 1000


@pytest.fixture
def participant(tmp_path: Path) -> Participant:
    state = EdgeState(tmp_path)
    state.claim("federation parts, site a")
    fixed = settings(retry_seconds=0.001)
    computing = Computing(fixed, no_progress)
    return Participant(fixed, cast("SiteImages", None), state, cast("RoundWork", None), computing)


@pytest.mark.parametrize(
    ("answer", "interrupted", "accepted"),
    [
        (None, 0, 7),
        (grpc.StatusCode.UNAVAILABLE, 1, 3),
        (grpc.StatusCode.DATA_LOSS, 1, 3),
        (grpc.StatusCode.FAILED_PRECONDITION, 0, 3),
        (grpc.StatusCode.ALREADY_EXISTS, 0, 3),
    ],
)
async def test_the_round_is_that_of_the_last_bank_that_was_accepted_and_only_broken_uploads_are_tried_again(
    participant: Participant,
    monkeypatch: pytest.MonkeyPatch,
    answer: grpc.StatusCode | None,
    interrupted: int,
    accepted: int,
) -> None:
    answers: list[grpc.StatusCode | None] = [None, answer]

    async def answered(*_arguments: object) -> int:
        code = answers.pop(0)
        if code is not None:
            raise aio.AioRpcError(code, aio.Metadata(), aio.Metadata(), details="no")
        return 10

    monkeypatch.setattr(participant_module, "upload_bank", answered)
    aggregator, broken = cast("Any", SimpleNamespace(rounds=None)), growth("edge_upload_retries_total")
    await participant._upload(BankHeader(round=3), aggregator)
    assert total("edge_round") == 3
    with pytest.raises(aio.AioRpcError) if interrupted else nullcontext():
        await participant._upload(BankHeader(round=7), aggregator)
    assert broken() == [interrupted]
    assert total("edge_round") == accepted


async def test_each_time_that_the_aggregator_is_tried_again_is_counted(
    participant: Participant, monkeypatch: pytest.MonkeyPatch
) -> None:
    retries = growth("edge_retries_total")
    grown: list[list[float]] = []

    @asynccontextmanager
    async def line(*_arguments: object) -> AsyncIterator[aio.Channel]:
        grown.append(retries())
        if len(grown) == 4:
            raise asyncio.CancelledError  # as where the service stops
        raise UnreachableError("nobody listens")
        yield  # type: ignore[unreachable]

    monkeypatch.setattr(participant_module, "connected", line)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(participant.run(), SECONDS)
    assert grown == [[0], [1], [2], [3]]
