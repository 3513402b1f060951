"""`grpc:` probes, made from this machine as a kubelet makes them."""

from __future__ import annotations

import time

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from tests.deploy.manifest import Probe


class Prober:
    """One probe of one container.

    Attributes:
        due: when it is to be made next, by `time.monotonic`.
        passed: whether it has succeeded often enough; None before the first decision.
    """

    def __init__(self, probe: Probe, address: str) -> None:
        self._probe = probe
        self._target = f"{address}:{probe.port}"
        self._in_a_row = 0
        self._last: bool | None = None
        self.due = time.monotonic() + probe.initial_delay
        self.passed: bool | None = None

    def make(self) -> None:
        """Makes the probe."""
        self.due = time.monotonic() + self._probe.period
        succeeded = self._succeeds()
        self._in_a_row = self._in_a_row + 1 if succeeded is self._last else 1
        self._last = succeeded
        if self._in_a_row >= (self._probe.successes if succeeded else self._probe.failures):
            self.passed = succeeded

    def _succeeds(self) -> bool:
        with grpc.insecure_channel(self._target, [("grpc.enable_http_proxy", 0)]) as channel:
            try:
                answer = HealthStub(channel).Check(
                    HealthCheckRequest(service=self._probe.service), timeout=self._probe.timeout
                )
            except grpc.RpcError:
                return False
        return bool(answer.status == HealthCheckResponse.SERVING)
