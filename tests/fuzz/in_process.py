"""Every RPC of our services without a network: from bytes, through boundary and servicer, to bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message
from grpc import aio

from feddymem.backbone import load_extractor
from feddymem.calibration import Calibration, SiteCalibration, site_key
from feddymem.generator import MemoryGenerator
from feddymem.memory import MemoryBank
from feddymem.method import Method
from feddymem.sketch import ScoreSketch
from feddymem.v1.array_pb2 import Array
from feddymem.v1.federation_pb2 import BankHeader
from feddymem.v1.operator_pb2 import STANDING_JUDGED
from feddymem.v1.release_pb2 import (
    RELEASE_KIND_GLOBAL_MEMORY,
    RELEASE_KIND_MEMORY_GENERATOR,
    DownloadArrayRequest,
    DownloadArrayResponse,
    Release,
)
from services.aggregator.federation import Federation
from services.aggregator.operator_servicer import OperatorServicer
from services.aggregator.servicer import FederationServicer
from services.aggregator.settings import FederationSettings
from services.aggregator.state import AcceptedBank, Candidate, State
from services.edge_client.feedback import FeedbackStore
from services.edge_client.feedback_servicer import FeedbackServicer
from services.edge_client.settings import EdgeClientSettings
from services.inference.batcher import Batcher
from services.inference.feedback import FeedbackForwarder
from services.inference.inspector import Inspector
from services.inference.open_inference import OpenInferenceServicer
from services.inference.registry import Registry
from services.inference.servicer import InspectionServicer
from services.inference.settings import InferenceSettings
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import WireArray, bank_to_wire, chunks
from services.runtime.errors import as_refusal
from services.runtime.messages import calibration_to_message, feature_space_to_message, generator_to_wire
from services.runtime.publisher import Publisher, download
from services.runtime.rpc import RpcBoundary
from services.runtime.server import Service
from tests.fuzz.seeds import (
    FEDERATION,
    INSTANCE,
    ITEMS,
    OTHER_SITE,
    SITE,
    Call,
    Calls,
    aggregator_calls,
    candidate_arrays,
    feedback_calls,
    inference_calls,
    join_request,
)
from tests.integration.fake_site import make_bank

MAX_PIXELS = 1_000_000
_INPUT_SIZE = 32
_FEEDBACK_BYTES = 20_000
"""So few that there often is no room."""
_ANSWER_SECONDS = 20
"""Whoever has not answered by then hangs."""
_NO_ARRAYS = [Array(name="items", sha256=bytes(32))]
"""Of a candidate that nobody has said anything of."""
_TURNS = 20
"""Of the event loop, after which a watch has said what it has to say."""


class FaultError(Exception):
    """An RPC failed, and not by a refusal; its cause says how."""


class _Served:
    """Takes servicers as a server does, and keeps their handlers by path."""

    def __init__(self, services: Sequence[Service]) -> None:
        self.handlers: dict[str, Any] = {}
        for service in services:
            service.add(self)  # type: ignore[arg-type]

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """What is registered by name is all there is."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Called by generated code."""
        self.handlers |= {f"/{service}/{name}": handler for name, handler in handlers.items()}


class _Context:
    """One RPC as its boundary sees it: no TLS, messages as they are, and how it was refused."""

    def __init__(self, messages: Sequence[bytes]) -> None:
        self._messages = list(messages)
        self.written = 0
        self.refused: grpc.StatusCode | None = None

    async def read(self) -> Any:
        return self._messages.pop(0) if self._messages else aio.EOF

    async def write(self, _response: Message) -> None:
        self.written += 1

    async def abort(self, status: grpc.StatusCode, _text: str) -> None:
        self.refused = status
        raise aio.AbortError

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"transport_security_type": [b"insecure"]}

    def time_remaining(self) -> float:
        return _ANSWER_SECONDS

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def set_trailing_metadata(self, _metadata: object) -> None:
        pass


class _Publisher:
    """Has responses for those who ask for an array."""

    def __init__(self, responses: Sequence[DownloadArrayResponse]) -> None:
        self._responses = responses

    async def DownloadArray(  # noqa: N802
        self, request: DownloadArrayRequest, **_deadline: float
    ) -> AsyncIterator[DownloadArrayResponse]:
        for response in self._responses:
            if response.chunk.sha256 == request.sha256:
                yield response


class InProcess:
    """An aggregator with a federation that waits for banks, and an inference service with a release.

    Attributes:
        calls: honest ones, by path.
        releases: that the inference service may be sent, each with what its publisher has of its arrays.
    """

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self.calls: Calls = {}
        services = [*self._aggregator(folder / "aggregator"), *self._loop.run_until_complete(self._inference(folder))]
        self._handlers = _Served(services).handlers
        assert self._handlers.keys() <= self.calls.keys(), self._handlers.keys() - self.calls.keys()
        access = {path: frozenset[Any]() for path in self._handlers}
        self._boundary = RpcBoundary(access, {}, {}, rpcs_per_second=1e9, open_rpcs=10**9, open_streams=10**9)

    @property
    def paths(self) -> list[str]:
        """Of all RPCs."""
        return list(self._handlers)

    def parse(self, path: str, messages: Sequence[bytes]) -> list[Message] | None:
        """A call's messages; None if one of them is none."""
        try:
            return [self._handlers[path].request_deserializer(data) for data in messages]
        except DecodeError:
            return None

    def call(self, path: str, messages: Sequence[bytes]) -> grpc.StatusCode:
        """How a call ends; OK, too, for a watch that goes on.

        Raises:
            FaultError: in another way than with an answer or a refusal.
        """
        return self._loop.run_until_complete(self._call(path, messages))

    def receive(self, messages: Sequence[bytes]) -> None:
        """The inference service is sent a release, and asks for its arrays.

        Args:
            messages: a `Release`, then each `DownloadArrayResponse` that the publisher has.

        Raises:
            FaultError: it is neither taken nor refused.
        """
        try:
            release = Release.FromString(messages[0] if messages else b"")
            responses = [DownloadArrayResponse.FromString(data) for data in messages[1:]]
        except DecodeError:
            return
        self._loop.run_until_complete(self._receive(release, _Publisher(responses)))

    async def _receive(self, release: Release, publisher: _Publisher) -> None:
        try:
            await download(publisher, release.arrays, self._registry.arrays, self._inference_settings)  # type: ignore[arg-type]
            await self._registry.receive(release)
        except Exception as error:
            if as_refusal(error) is None:
                raise FaultError(f"release: {error!r}") from error

    def close(self) -> None:
        """Ends the threads."""
        self._batcher.stop()

    async def _call(self, path: str, messages: Sequence[bytes]) -> grpc.StatusCode:
        self._set_right(path)
        handler = self._handlers[path]

        async def found(_details: object) -> Any:
            return handler

        wrapped: Any = await self._boundary.intercept_service(found, SimpleNamespace(method=path))
        context = _Context(messages)
        running = asyncio.ensure_future((wrapped.stream_stream or wrapped.stream_unary)(None, context))
        if "/Watch" in path:
            for _ in range(_TURNS):
                await asyncio.sleep(0)
            running.cancel()
        try:
            response = await asyncio.wait_for(running, _ANSWER_SECONDS)
        except asyncio.CancelledError:
            return grpc.StatusCode.OK
        except aio.AbortError as error:
            if context.refused in {None, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}:
                raise FaultError(f"{path}: {context.refused}") from error.__context__
            assert context.refused is not None
            return context.refused
        except Exception as error:
            raise FaultError(f"{path}: {error!r}") from error
        if response is not None:
            handler.response_serializer(response)
        return grpc.StatusCode.OK

    def _aggregator(self, folder: Path) -> list[Service]:
        arrays = bank_to_wire(make_bank(seed=1), "float16")
        store, state = ArrayStore(folder / "releases"), State(folder)
        publisher = Publisher(store, frozenset(), lambda _who, _federation: False)
        publisher.publish(_release(arrays, store, "parts"))
        settings = FederationSettings(quorum=2, method=Method(bank_items=2 * ITEMS, item_type="uint8"))
        self._state = state
        self._federation = Federation(FEDERATION, settings, state, folder / "banks", store, publisher)
        federations = {FEDERATION: self._federation}
        self._candidate = Candidate(_release(candidate_arrays(), store, FEDERATION), b"", 0)
        self.calls |= aggregator_calls([array.manifest.sha256 for array in arrays])
        self._set_right("/Join")
        return [FederationServicer(federations).service, OperatorServicer(federations).service, publisher.service]

    async def _inference(self, folder: Path) -> list[Service]:
        settings = InferenceSettings(
            aggregator="127.0.0.1:1",
            state_dir=folder / "inference",
            federations=("parts",),
            device="cpu",
            max_pixels=MAX_PIXELS,
            queue_size=64,
        )
        space = load_extractor(input_size=_INPUT_SIZE, device="cpu").feature_space
        items = np.random.default_rng(0).normal(size=(ITEMS, space.channels)).astype(np.float32)
        memory = MemoryBank(items, np.ones((ITEMS, 1), np.float32), np.ones(ITEMS, np.float32))
        registry = Registry(settings)
        self._registry, self._inference_settings = registry, settings
        arrays = bank_to_wire(memory, "float16")
        release = _release(arrays, registry.arrays, "parts")
        release.feature_space.CopyFrom(feature_space_to_message(space))
        held_out = SiteCalibration(*[ScoreSketch.of(range(5, 45))] * 2)
        calibration = Calibration.of({site_key("parts", SITE): held_out}, 0.05)
        release.calibration.CopyFrom(calibration_to_message(calibration))
        await registry.receive(release)
        network = generator_to_wire(MemoryGenerator(space.channels, space.grid))
        generator = _release(network, registry.arrays, "parts")
        generator.feature_space.CopyFrom(release.feature_space)
        generator.kind, generator.site = RELEASE_KIND_MEMORY_GENERATOR, SITE
        shadow = Release.FromString(release.SerializeToString())
        shadow.shadow = True
        self.releases = [_published(each, arrays) for each in (release, shadow)] + [_published(generator, network)]
        self._batcher = Batcher(1, 1, settings.max_delay_seconds, settings.room, settings.max_pixels)
        self._batcher.start()
        inspector = Inspector(registry, self._batcher)
        self.calls |= inference_calls() | feedback_calls()
        return [
            self._edge_client(folder / "edge"),
            InspectionServicer(inspector, registry, FeedbackForwarder(settings)).service,
            OpenInferenceServicer(inspector, registry).service,
        ]

    def _edge_client(self, folder: Path) -> Service:
        """Feedback alone; releases are published by the aggregator in the same way."""
        settings = EdgeClientSettings(
            aggregator="127.0.0.1:1", federation="parts", site="dim-hall", data=folder, max_pixels=MAX_PIXELS
        )
        servicer = FeedbackServicer(settings)
        servicer.begin(FeedbackStore(folder, _FEEDBACK_BYTES))
        return servicer.service

    def _set_right(self, path: str) -> None:
        """Undoes what an earlier call did: both sites are there, and have sent nothing."""
        changing = ("/Join", "/UploadBank", "/WatchRounds", "/SetStanding", "/RemoveSite", "/Calibrate")
        if not path.endswith(changing):
            return
        calibrating = path.endswith("/Calibrate")
        self._federation.releases.candidate = self._candidate if calibrating else None
        shown = {site.site: site for site in self._federation.status().sites}
        for name in shown.keys() | {SITE, OTHER_SITE}:
            honest = name in {SITE, OTHER_SITE}
            if name in shown and (shown[name].last_round or not honest):
                self._federation.remove(name)
                shown.pop(name)
        standings = self._state.standings(FEDERATION)
        for name in (SITE, OTHER_SITE):
            if standings.get(name, STANDING_JUDGED) != STANDING_JUDGED:
                self._federation.set_standing(name, STANDING_JUDGED)
            joined = self._state.sites(FEDERATION).get(name)
            request = join_request(name)
            if joined is None or (joined.instance, joined.images) != (request.instance, request.images):
                self._federation.join(request)
        if calibrating:
            header = BankHeader(federation=FEDERATION, site=SITE, instance=INSTANCE, round=1, images=10)
            self._state.put_bank(AcceptedBank(header, 0))
            self._state.put_candidate(Candidate(Release(federation=FEDERATION, version=1, arrays=_NO_ARRAYS), b"", 0))


def _release(arrays: Sequence[WireArray], store: ArrayStore, federation: str) -> Release:
    for array in arrays:
        store.put(array.manifest.sha256, array.data)
    manifests = [array.manifest for array in arrays]
    return Release(federation=federation, version=1, kind=RELEASE_KIND_GLOBAL_MEMORY, arrays=manifests)


def _published(release: Release, arrays: Sequence[WireArray]) -> Call:
    pieces = (chunk for array in arrays for chunk in chunks(array.manifest.sha256, array.data))
    return [release, *(DownloadArrayResponse(chunk=chunk) for chunk in pieces)]
