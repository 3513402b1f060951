"""What every service shows of itself at /metrics; docs/metrics.md explains each, and those beside what they count."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from wsgiref.simple_server import WSGIServer

import prometheus_client
import torch
from prometheus_client import Counter, Gauge

import feddymem
from services.runtime.identity import Role

# Of Python's garbage collector nobody asks, and each series of a pod costs.
prometheus_client.REGISTRY.unregister(prometheus_client.GC_COLLECTOR)

BUILD = Gauge("feddymem_build_info", "Always 1; says which version of the program this is.", ["version"])
READY = Gauge("feddymem_ready", "1 while the service can do its work, 0 otherwise.")
STATE_SIZE = Gauge("feddymem_state_size_bytes", "Size of the disk that the state folder is on.")
STATE_FREE = Gauge("feddymem_state_free_bytes", "Room that is left on that disk.")
DEVICE = Gauge("feddymem_device_info", "Always 1; says what the service computes on, cpu or cuda.", ["device"])
GPU_MEMORY = Gauge(
    "feddymem_gpu_memory_bytes",
    "GPU memory of the process: allocated to tensors, or reserved for them.",
    ["state"],
)
PUBLISHERS = Gauge(
    "feddymem_publishers_connected", "Publishers of releases, by role, that this service is connected to.", ["role"]
)
PUBLISHED_BYTES = Counter(
    "feddymem_published_bytes_total", "Bytes of releases' arrays sent to who watches them.", ["federation"]
)


def serve_metrics(host: str, port: int, state_dir: Path) -> WSGIServer:
    """Serves /metrics in a thread of its own.

    Without a series more for each counter and histogram that says when it was made, which nobody asks for.

    Raises:
        OSError: the address cannot be bound.
    """
    prometheus_client.disable_created_metrics()
    BUILD.labels(feddymem.__version__).set(1)
    STATE_SIZE.set_function(_of_disk(lambda: shutil.disk_usage(state_dir).total))
    STATE_FREE.set_function(_of_disk(lambda: shutil.disk_usage(state_dir).free))
    server, _thread = prometheus_client.start_http_server(port, host)
    return server


def show_device(device: str) -> None:
    """Shows what the service computes on and, of a GPU, its memory."""
    DEVICE.labels(device).set(1)
    if device == "cuda":
        GPU_MEMORY.labels("allocated").set_function(torch.cuda.memory_allocated)
        GPU_MEMORY.labels("reserved").set_function(torch.cuda.memory_reserved)


@contextmanager
def connected_to(role: Role) -> Iterator[None]:
    """Shows a connection to a publisher inside the block."""
    PUBLISHERS.labels(role.value).inc()
    try:
        yield
    finally:
        PUBLISHERS.labels(role.value).dec()


def _of_disk(measure: Callable[[], int]) -> Callable[[], float]:
    def measured() -> float:
        try:
            return measure()
        except OSError:  # one number less, and not no metrics at all
            return math.nan

    return measured
