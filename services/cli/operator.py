"""`feddymem operator`: which sites take part, and how their banks are treated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from feddymem.v1.operator_pb2 import (
    STANDING_ADMITTED,
    STANDING_BANNED,
    STANDING_JUDGED,
    RemoveSiteRequest,
    SetStandingRequest,
    Standing,
)
from services.cli.calls import AGGREGATOR, TIMEOUT_SECONDS, Federation, Server, TlsDir, call

operator = typer.Typer(
    help="Decide which sites take part in a federation. With TLS, for role operator.", no_args_is_help=True
)

_Site = Annotated[str, typer.Argument(help="Name of the site.")]


@operator.command()
def admit(federation: Federation, site: _Site, server: Server = AGGREGATOR, tls_dir: TlsDir = None) -> None:
    """Count a site's banks whatever the other sites' are like, that of the open round included."""
    _set_standing(federation, site, STANDING_ADMITTED, server, tls_dir)
    typer.echo(f"banks of {site} count in {federation}")


@operator.command()
def judge(federation: Federation, site: _Site, server: Server = AGGREGATOR, tls_dir: TlsDir = None) -> None:
    """Compare a site's banks with those of the others again, as from the start: takes `admit` and `ban` back."""
    _set_standing(federation, site, STANDING_JUDGED, server, tls_dir)
    typer.echo(f"banks of {site} are judged in {federation}")


@operator.command()
def ban(federation: Federation, site: _Site, server: Server = AGGREGATOR, tls_dir: TlsDir = None) -> None:
    """Let a site take part no more, and leave it out of the next round's global memory."""
    _set_standing(federation, site, STANDING_BANNED, server, tls_dir)
    typer.echo(f"{site} is banned from {federation}")


@operator.command()
def remove(federation: Federation, site: _Site, server: Server = AGGREGATOR, tls_dir: TlsDir = None) -> None:
    """Forget a site that has left, so that no round waits for it; it may join again."""
    request = RemoveSiteRequest(federation=federation, site=site)
    call(server, tls_dir, lambda stub: stub.RemoveSite(request, timeout=TIMEOUT_SECONDS))
    typer.echo(f"{site} is removed from {federation}")


def _set_standing(federation: str, site: str, standing: Standing.ValueType, server: str, tls_dir: Path | None) -> None:
    request = SetStandingRequest(federation=federation, site=site, standing=standing)
    call(server, tls_dir, lambda stub: stub.SetStanding(request, timeout=TIMEOUT_SECONDS))
