"""Settings of the edge client."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from feddymem.images import MAX_PIXELS
from feddymem.network import EMBEDDED_BACKBONE
from services.runtime.settings import Address, ClientSettings, Name


class EdgeClientSettings(ClientSettings):
    """Settings of `feddymem edge`."""

    listen: Address = Field(
        default="127.0.0.1:7071", description="address of the gRPC server, HOST:PORT; port 0 picks a free one"
    )
    metrics_listen: Address = Field(
        default="127.0.0.1:9071", description="address of /metrics, HOST:PORT; port 0 picks a free one"
    )
    state_dir: Path = Field(default=Path("state/edge"), description="folder for all state; made if missing")
    federation: Name = Field(description="federation to take part in")
    site: Name = Field(description="name of this site")
    data: Path = Field(description="folder with this site's normal images, searched at any depth")
    backbone: str = Field(default=EMBEDDED_BACKBONE, description="timm model name")
    input_size: int = Field(
        default=224, ge=28, le=8192, description="side of the square that images are stretched to, in pixels"
    )
    tile_size: int | None = Field(
        default=None, ge=28, description="side of the tiles that the network sees, in pixels; none: the whole image"
    )
    tile_overlap: int = Field(default=64, ge=0, description="how far tiles overlap at least, in pixels")
    batch_size: int | None = Field(
        default=None, ge=1, le=4096, description="images per pass of the backbone; none: 4 on a CPU, 32 on a GPU"
    )
    max_pixels: int = Field(
        default=MAX_PIXELS, ge=1, description="largest image read, in pixels; larger ones are skipped"
    )
    max_request_bytes: int = Field(
        default=64 * 2**20,
        ge=1024,
        le=2**31 - 1,
        description="largest request accepted, in bytes: feedback with its image, as the inference service takes it",
    )
    max_feedback_bytes: int = Field(
        default=2**30,
        ge=0,
        description="images kept with what was said of them, in bytes: some hundreds that a person may look at, and a "
        "tenth of the state folder's volume in k8s/; more are refused until some are rejected",
    )
    scan_seconds: float = Field(
        default=60,
        gt=0,
        le=86_400,
        description="how often to look for new images while there is nothing else to do, so that the next round need "
        "not wait for their features",
    )
    once: bool = Field(
        default=False,
        description="exit when the federation is done, instead of publishing the generator and waiting for more rounds",
    )
