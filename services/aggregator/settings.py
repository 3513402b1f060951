"""Settings of the aggregator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from feddymem.method import Method
from services.runtime.settings import Address, Name, ServiceSettings

FederationName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
"""As `Name`, without capitals, because environment variables do not tell them apart."""

MAX_SITES = 1000
"""Sites of a federation, at most: with what more of them tell, a release might not fit into `MAX_ANSWER_BYTES`."""


class FederationSettings(BaseModel):
    """One federation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quorum: int = Field(default=2, ge=1, description="banks that a round needs before it may close")
    sites: tuple[Name, ...] = Field(default=(), description="sites that may take part; empty for any")
    max_sites: int = Field(default=MAX_SITES, ge=1, le=MAX_SITES, description="sites that may join, at most")
    round_deadline_seconds: float = Field(
        default=3600,
        gt=0,
        description="time after which a round closes as soon as it has its quorum, whoever is missing",
    )
    grace_seconds: float = Field(
        default=300,
        ge=0,
        description="time that a round goes on waiting for the bank of a site that was there and has gone",
    )
    calibration_deadline_seconds: float = Field(
        default=600,
        gt=0,
        description="time after which a round's candidate is released, whichever sites have not scored their held-out "
        "images with it",
    )
    false_alarm_rate: float = Field(
        default=0.05,
        gt=0,
        le=0.5,
        description="share of normal images that may be called anomalous; holds for releases from then on",
    )
    worse_margin: float = Field(
        default=0.1,
        ge=0,
        description="share by which the median score of a site's held-out images may rise from a release to the next; "
        "one beyond it is not activated by itself",
    )
    keep_releases: int = Field(
        default=10, ge=1, le=1000, description="newest releases to keep for activation; the others are removed"
    )
    method: Method = Field(default=Method(), description="how all sites run the method")


class AggregatorSettings(ServiceSettings):
    """Settings of `feddymem aggregator`."""

    listen: Address = Field(
        default="127.0.0.1:7070", description="address of the gRPC server, HOST:PORT; port 0 picks a free one"
    )
    metrics_listen: Address = Field(
        default="127.0.0.1:9070", description="address of /metrics, HOST:PORT; port 0 picks a free one"
    )
    state_dir: Path = Field(default=Path("state/aggregator"), description="folder for all state; made if missing")
    federations: dict[FederationName, FederationSettings] = Field(min_length=1, description="the federations, by name")
