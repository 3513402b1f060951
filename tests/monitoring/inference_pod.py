"""The /metrics of an inference pod that serves 20 federations and has seen everything: `python -m` prints it.

With arguments it is a `feddymem` that has all but one of these federations' series from the start.

A process of its own, because a registry is for good: no other test's metrics are in it.
"""

from __future__ import annotations

import sys
import tempfile
import urllib.request
from pathlib import Path

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from feddymem.openinference import open_inference_pb2
from feddymem.v1 import inspection_pb2
from services.inference import metrics
from services.runtime import files, rpc
from services.runtime.identity import Role
from services.runtime.metrics import connected_to, serve_metrics, show_device
from services.runtime.tls import EXPIRY

FEDERATIONS = 20
_INSPECTIONS = (
    inspection_pb2.DESCRIPTOR.services_by_name["InspectionService"],
    open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
)
_STANDARD = (
    health_pb2.DESCRIPTOR.services_by_name["Health"],
    descriptor_pool.Default().FindServiceByName(reflection.SERVICE_NAME),
)
_INSPECT = ("Inspect", "InspectStream", "ModelInfer", "ModelStreamInfer")
_ENDS = (
    *("OK", "CANCELLED", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNAVAILABLE"),
    *("FAILED_PRECONDITION", "INTERNAL", "PERMISSION_DENIED", "UNAUTHENTICATED"),
)


def fill(federations: int = FEDERATIONS) -> None:
    """Everything is called, inspections end in every way, and somebody runs wild."""
    for service in (*_INSPECTIONS, *_STANDARD):
        for method in service.methods:
            name = f"/{service.full_name}/{method.name}"
            rpc.RPCS_STARTED.labels(name).inc()
            for code in _ENDS if method.name in _INSPECT else ("OK", "CANCELLED"):
                assert code in grpc.StatusCode.__members__
                rpc.RPCS.labels(name, code).inc()
            if service in _INSPECTIONS:
                rpc.RPC_SECONDS.labels(name).observe(0.01)
            for limit in _limits(method.name):
                rpc.RPCS_OVER_LIMIT.labels(name, limit).inc()
    for number in range(federations):
        name = f"federation-{number}"
        for anomalous in (False, True):
            metrics.of_federation(name).count(1.5, 1.0, anomalous)
        metrics.RELEASE.labels(name).set(1)
        metrics.RELEASE_CREATED.labels(name).set(1.7e9)
        metrics.HIGHEST_RATE.labels(name).set(0.15)
        for agreement in ("same", "shadow_only", "active_only"):
            metrics.of_shadow(name, agreement).inc()
    for number in range(FEDERATIONS * 20):
        line = metrics.of_line(f"federation-{number % FEDERATIONS}", f"site-{number}")
        if line is not None:
            line.drift.set(1)
    metrics.QUEUE_LIMIT.set(8)
    EXPIRY.set(1.8e9)
    files.DAMAGED.inc()
    show_device("cuda")


def _limits(method: str) -> tuple[str, ...]:
    """What somebody who runs wild with a method meets."""
    if "Stream" in method:
        return ("streams",)
    return ("open", "bytes") if method in _INSPECT else ("rate",)


def main() -> None:
    """Prints what a scrape would get."""
    fill()
    with tempfile.TemporaryDirectory() as folder, connected_to(Role.AGGREGATOR), connected_to(Role.SITE):
        server = serve_metrics("127.0.0.1", 0, Path(folder))
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=30) as answer:
            sys.stdout.write(answer.read().decode())
        server.shutdown()
        server.server_close()


def serve() -> None:
    """Is `feddymem`."""
    fill(FEDERATIONS - 1)
    from services.cli.main import main as feddymem

    feddymem()


if __name__ == "__main__":
    serve() if sys.argv[1:] else main()
