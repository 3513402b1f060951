"""A client of the inference service."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import grpc

from feddymem.v1.inspection_pb2 import (
    MAP_FORMAT_UNSPECIFIED,
    InspectRequest,
    InspectResponse,
    InspectStreamRequest,
    InspectStreamResponse,
    MapFormat,
)
from feddymem.v1.inspection_pb2_grpc import InspectionServiceStub

_OPTIONS = [("grpc.max_receive_message_length", 256 * 2**20)]


class InspectionClient:
    """Sends images to an inference service.

    Args:
        server: HOST:PORT of the inference service.
        federation: name of the federation; may be empty where the service has only one.
        site: name of the site whose line took the images; may be empty where the service has only one.
        timeout_seconds: longest wait for one result.

    Example:
        with InspectionClient("127.0.0.1:7072", site="exp1") as client:
            print(client.inspect(Path("part.png").read_bytes()).score)
    """

    def __init__(self, server: str, *, federation: str = "", site: str = "", timeout_seconds: float = 30) -> None:
        self._federation, self._site, self._timeout = federation, site, timeout_seconds
        self._channel = grpc.insecure_channel(server, options=_OPTIONS)
        self._stub = InspectionServiceStub(self._channel)

    def __enter__(self) -> InspectionClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def inspect(self, image: bytes, map_format: MapFormat.ValueType = MAP_FORMAT_UNSPECIFIED) -> InspectResponse:
        """Scores one image file's bytes.

        Raises:
            grpc.RpcError: the service refused, or cannot be reached.
        """
        return self._stub.Inspect(self._request(image, map_format), timeout=self._timeout)

    def inspect_files(
        self, paths: Iterable[Path], map_format: MapFormat.ValueType = MAP_FORMAT_UNSPECIFIED
    ) -> Iterator[InspectStreamResponse]:
        """Scores image files over one stream; results in the order of the files, `id` being the path.

        Raises:
            OSError: a file cannot be read.
            grpc.RpcError: the service cannot be reached; an image that it refuses comes as a response with `error`.
        """
        requests = (
            InspectStreamRequest(id=str(path), inspect=self._request(path.read_bytes(), map_format)) for path in paths
        )
        call = self._stub.InspectStream(requests)
        while True:
            watchdog = threading.Timer(self._timeout, call.cancel)
            watchdog.start()
            try:
                response = next(call)
            except StopIteration:
                return
            finally:
                watchdog.cancel()
            yield response

    def _request(self, image: bytes, map_format: MapFormat.ValueType) -> InspectRequest:
        return InspectRequest(federation=self._federation, site=self._site, encoded=image, map_format=map_format)
