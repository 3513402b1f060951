"""Settings of the inference service."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from feddymem.backbone import resolve_device
from feddymem.images import MAX_PIXELS
from feddymem.threads import computing_at_once, workers
from services.runtime.settings import Address, ClientSettings, Name


class InferenceSettings(ClientSettings):
    """Settings of `feddymem inference`."""

    listen: Address = Field(
        default="127.0.0.1:7072", description="address of the gRPC server, HOST:PORT; port 0 picks a free one"
    )
    metrics_listen: Address = Field(
        default="127.0.0.1:9072", description="address of /metrics, HOST:PORT; port 0 picks a free one"
    )
    state_dir: Path = Field(default=Path("state/inference"), description="folder for releases; made if missing")
    edge_clients: tuple[Address, ...] = Field(
        default=(), description="addresses of this site's edge clients, one per federation"
    )
    federations: tuple[Name, ...] = Field(
        default=(), description="federations to serve; empty for all that the aggregator has"
    )
    max_batch: int | None = Field(
        default=None, ge=1, le=1024, description="images computed together, at most; none: 1 on a CPU, 32 on a GPU"
    )
    max_delay_seconds: float = Field(
        default=0.002,
        ge=0,
        le=10,
        description="time that a batch with room waits for images that have arrived and are being decoded",
    )
    queue_size: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="inspections waiting, at most; more are refused; none: one more than are computed at once, or than "
        "there are threads if those are more",
    )
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, description="largest image accepted, in pixels")
    max_request_bytes: int = Field(
        default=64 * 2**20, ge=1024, le=2**31 - 1, description="largest request accepted, in bytes"
    )
    max_open_streams: int = Field(
        default=8,
        ge=1,
        description="streams of requests that one identity or, without TLS, one address may have open; each holds "
        "several",
    )

    @property
    def batch(self) -> int:
        """Images computed together, at most. A GPU needs many to be busy; a CPU gains next to nothing from more."""
        return self.max_batch or {"cpu": 1, "cuda": 32}[resolve_device(self.device)]

    @property
    def at_once(self) -> int:
        """Batches computed at once, at most."""
        return computing_at_once() if resolve_device(self.device) == "cpu" else 1

    @property
    def room(self) -> int:
        """Inspections waiting, at most."""
        return self.queue_size or max(self.batch * self.at_once, workers()) + 1
