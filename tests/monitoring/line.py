"""A production line: images, again and again, at several replicas."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from feddymem.client import InspectionClient, InspectionError

_PAUSE_SECONDS = 0.15
_NEVER, _ALWAYS = 1e9, 0.0
"""Thresholds that make an image normal, and anomalous."""


class Line(threading.Thread):
    """Sends images until the end of the block, whatever comes back; each time it asks each replica how it is, too."""

    def __init__(self, servers: Sequence[str], images: Sequence[Path]) -> None:
        super().__init__(name="line")
        self._servers, self._images = servers, images
        self._over = threading.Event()

    def __enter__(self) -> Line:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        """Sends."""
        turns = zip(itertools.cycle(self._images), itertools.cycle((_NEVER, _NEVER, _ALWAYS)), strict=False)
        with ExitStack() as opened:
            clients = [opened.enter_context(InspectionClient(server, attempts=1)) for server in self._servers]
            channels = [opened.enter_context(grpc.insecure_channel(server)) for server in self._servers]
            for image, threshold in turns:
                for client, channel in zip(clients, channels, strict=True):
                    with suppress(InspectionError):
                        client.inspect(image, threshold=threshold, map_kind="png")
                    with suppress(grpc.RpcError):
                        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
                if self._over.wait(_PAUSE_SECONDS):
                    return
