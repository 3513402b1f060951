"""An inference service that answers as a test tells it to, over real connections."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import grpc

from feddymem.v1.inspection_pb2 import (
    InspectRequest,
    InspectResponse,
    InspectStreamResponse,
    ReportFeedbackRequest,
    ReportFeedbackResponse,
)
from feddymem.v1.inspection_pb2_grpc import InspectionServiceServicer, add_InspectionServiceServicer_to_server

Answer = Callable[[InspectRequest], InspectResponse | grpc.StatusCode]
"""The response, or the status to refuse with."""


@dataclass(eq=False)
class ScriptedService:
    """A running service.

    Attributes:
        address: HOST:PORT.
        requests: what has arrived, every attempt.
        reports: feedback that has arrived; each is answered with `kept`.
    """

    address: str
    requests: list[InspectRequest] = field(default_factory=list)
    reports: list[ReportFeedbackRequest] = field(default_factory=list)


@contextmanager
def scripted_service(answer: Answer, address: str = "127.0.0.1:0") -> Iterator[ScriptedService]:
    """Serves answers at an address, by default a free one, until the block is left."""
    server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.max_receive_message_length", 2**26)])
    service = ScriptedService(f"127.0.0.1:{server.add_insecure_port(address)}")
    add_InspectionServiceServicer_to_server(_Servicer(service, answer), server)
    server.start()
    try:
        yield service
    finally:
        server.stop(None).wait()


class _Servicer(InspectionServiceServicer):
    def __init__(self, service: ScriptedService, answer: Answer) -> None:
        self._service, self._answer, self._lock = service, answer, threading.Lock()

    def Inspect(self, request: InspectRequest, context: grpc.ServicerContext) -> InspectResponse:  # noqa: N802
        with self._lock:
            self._service.requests.append(request)
        answer = self._answer(request)
        if isinstance(answer, grpc.StatusCode):
            context.abort(answer, "as told")
        return answer

    def InspectStream(self, request_iterator: object, context: grpc.ServicerContext) -> Iterator[InspectStreamResponse]:  # noqa: N802
        raise NotImplementedError

    def ReportFeedback(self, request: ReportFeedbackRequest, context: grpc.ServicerContext) -> ReportFeedbackResponse:  # noqa: N802
        with self._lock:
            self._service.reports.append(request)
        answer = self._answer(InspectRequest(encoded=request.encoded))
        if isinstance(answer, grpc.StatusCode):
            context.abort(answer, "as told")
        return ReportFeedbackResponse(image="kept")

    def GetInspectionStatus(self, request: object, context: object) -> NoReturn:  # noqa: N802
        raise NotImplementedError
