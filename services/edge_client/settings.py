"""Settings of the edge client."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from feddymem.backbone import EMBEDDED_BACKBONE
from feddymem.images import MAX_PIXELS
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
        default=224, ge=32, le=4096, multiple_of=16, description="side of the network input, in pixels"
    )
    batch_size: int = Field(default=8, ge=1, le=4096, description="images per pass of the backbone")
    max_pixels: int = Field(
        default=MAX_PIXELS, ge=1, description="largest image read, in pixels; larger ones are skipped"
    )
    once: bool = Field(
        default=False, description="exit when the federation is done, instead of publishing the generator on"
    )
