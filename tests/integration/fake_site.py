"""An edge client that says exactly what a test wants it to say."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np

from feddymem.calibration import SiteCalibration
from feddymem.feature_space import FeatureSpace
from feddymem.memory import MemoryBank
from feddymem.method import ItemType
from feddymem.sketch import ScoreSketch
from feddymem.v1 import federation_pb2_grpc, release_pb2_grpc
from feddymem.v1.calibration_pb2 import SiteCalibration as SiteCalibrationMessage
from feddymem.v1.federation_pb2 import (
    PHASE_CALIBRATING,
    BankHeader,
    CalibrateRequest,
    JoinRequest,
    Phase,
    UploadBankRequest,
    UploadBankResponse,
    WatchRoundsRequest,
    WatchRoundsResponse,
)
from feddymem.v1.release_pb2 import DownloadArrayRequest, Release, WatchReleasesRequest
from services.runtime.arrays import WireArray, bank_to_wire, chunks
from services.runtime.messages import candidate_items, feature_space_to_message, site_calibration_to_message
from tests.feature_spaces import SPACE

TIMEOUT_SECONDS = 30


def make_bank(seed: int = 0, items: int = 20) -> MemoryBank:
    """A bank that an honest site could make."""
    rng = np.random.default_rng(seed)
    return MemoryBank(
        items=rng.normal(size=(items, SPACE.channels)).astype(np.float32),
        weights=rng.integers(1, 6, (items, 1)).astype(np.float32),
        spreads=rng.uniform(0, 1, items).astype(np.float32),
    )


def calibration_message(scores: Iterable[float]) -> SiteCalibrationMessage:
    """What a site tells of held-out images of these scores, which are also the peaks of their maps."""
    sketch = ScoreSketch.of(scores)
    return site_calibration_to_message(SiteCalibration(sketch, sketch))


class FakeSite:
    """Speaks for one site with one instance name."""

    def __init__(
        self, channel: grpc.Channel, site: str, federation: str = "parts", space: FeatureSpace = SPACE
    ) -> None:
        self.channel = channel
        self.rounds = federation_pb2_grpc.FederationServiceStub(channel)
        self.releases = release_pb2_grpc.ReleaseServiceStub(channel)
        self.federation, self.site, self.space = federation, site, space
        self.instance = uuid.uuid4().hex

    def join(self) -> None:
        """Joins."""
        self.rounds.Join(
            JoinRequest(
                federation=self.federation,
                site=self.site,
                instance=self.instance,
                feature_space=feature_space_to_message(self.space),
                images=10,
            ),
            timeout=TIMEOUT_SECONDS,
            wait_for_ready=True,
        )

    def watch(self) -> Any:
        """Watches the rounds."""
        request = WatchRoundsRequest(federation=self.federation, site=self.site, instance=self.instance)
        return self.rounds.WatchRounds(request, timeout=TIMEOUT_SECONDS)

    def wait_for(self, phase: Phase.ValueType, round_number: int) -> WatchRoundsResponse:
        """Waits until the federation is in a phase of a round."""
        events = self.watch()
        for event in events:
            assert isinstance(event, WatchRoundsResponse)
            if (event.phase, event.round) == (phase, round_number):
                events.cancel()
                return event
        raise AssertionError("the stream of rounds ended")

    def current_release(self) -> Release:
        """The active release."""
        stream = self.releases.WatchReleases(
            WatchReleasesRequest(federations=[self.federation]), timeout=TIMEOUT_SECONDS
        )
        release = next(stream).release
        stream.cancel()
        return release

    def download(self, sha256: bytes, offset: int = 0) -> bytes:
        """An array's bytes from an offset on."""
        request = DownloadArrayRequest(sha256=sha256, offset=offset)
        return b"".join(r.chunk.data for r in self.releases.DownloadArray(request, timeout=TIMEOUT_SECONDS))

    def header(self, arrays: Iterable[WireArray], round_number: int = 1) -> BankHeader:
        """The header of a bank with these arrays."""
        return BankHeader(
            federation=self.federation,
            site=self.site,
            instance=self.instance,
            round=round_number,
            fingerprint=self.space.fingerprint,
            images=10,
            arrays=[array.manifest for array in arrays],
        )

    def upload(
        self, bank: MemoryBank, round_number: int = 1, item_type: ItemType = "float16"
    ) -> list[UploadBankResponse]:
        """Uploads a bank as an honest edge client does."""
        arrays = bank_to_wire(bank, item_type)
        return self.send(self.header(arrays, round_number), arrays)

    def send(self, header: BankHeader, arrays: Iterable[WireArray]) -> list[UploadBankResponse]:
        """Sends a header and all bytes of these arrays."""
        pieces = [chunk for array in arrays for chunk in chunks(array.manifest.sha256, array.data)]
        return self.send_raw([UploadBankRequest(header=header), *(UploadBankRequest(chunk=chunk) for chunk in pieces)])

    def send_raw(self, requests: Iterable[UploadBankRequest]) -> list[UploadBankResponse]:
        """Sends these messages and returns all answers."""

        def stream() -> Iterator[UploadBankRequest]:
            yield from requests

        return list(self.rounds.UploadBank(stream(), timeout=TIMEOUT_SECONDS))

    def calibration(
        self, event: WatchRoundsResponse, scores: Sequence[float] = (), base: Sequence[float] | None = None
    ) -> CalibrateRequest:
        """What an honest edge client says of a candidate.

        Args:
            event: that told it of the candidate.
            scores: of its held-out images.
            base: the same with what the round started from, where there was something; None for the same scores.
        """
        before = scores if base is None else base
        return CalibrateRequest(
            federation=self.federation,
            site=self.site,
            instance=self.instance,
            round=event.round,
            items_sha256=candidate_items(event),
            candidate=calibration_message(scores),
            base=calibration_message(before) if event.HasField("memory") else None,
        )

    def calibrate(
        self, scores: Sequence[float] = (), base: Sequence[float] | None = None, round_number: int = 1
    ) -> CalibrateRequest:
        """Waits for the candidate of a round, and says how it scores held-out images: see `calibration`."""
        said = self.calibration(self.wait_for(PHASE_CALIBRATING, round_number), scores, base)
        self.rounds.Calibrate(said, timeout=TIMEOUT_SECONDS)
        return said

    def with_space(self, **changes: object) -> FakeSite:
        """The same site with another feature space."""
        other = object.__new__(FakeSite)
        other.__dict__.update(self.__dict__, space=dataclasses.replace(self.space, **changes))  # type: ignore[arg-type]
        return other
