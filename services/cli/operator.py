"""`feddymem operator`: which release is active, which sites take part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from feddymem.client.tls import channel_to
from feddymem.v1.operator_pb2 import (
    STANDING_ADMITTED,
    STANDING_BANNED,
    STANDING_JUDGED,
    ActivateReleaseRequest,
    RemoveSiteRequest,
    SetStandingRequest,
    Standing,
)
from feddymem.v1.operator_pb2_grpc import OperatorServiceStub
from services.cli.exit_codes import USAGE
from services.cli.failures import asking, fail

_TIMEOUT_SECONDS = 10
"""A person waits for the answer."""

operator = typer.Typer(
    help="Decide for a federation: its active release, its sites. With TLS, for role operator.", no_args_is_help=True
)

_Federation = Annotated[str, typer.Argument(help="Name of the federation.")]
_Site = Annotated[str, typer.Argument(help="Name of the site.")]
_Server = Annotated[str, typer.Option(help="HOST:PORT of the aggregator.")]
_TlsDir = Annotated[
    Path | None, typer.Option(help="Folder with tls.crt, tls.key and ca.crt; without it, no TLS: for this machine.")
]
_LOCAL = "127.0.0.1:7070"
_Answer = TypeVar("_Answer")


@operator.command()
def activate(
    federation: _Federation,
    version: Annotated[str, typer.Argument(help="Version of the release, or `newest` for that of each round.")],
    server: _Server = _LOCAL,
    tls_dir: _TlsDir = None,
) -> None:
    """Activate a release, or roll back to an earlier one; it stays active until the next call."""
    if not (version == "newest" or (version.isdecimal() and 1 <= int(version) < 2**32)):
        fail(f"version {version!r} is neither a number from 1 on nor `newest`", USAGE)
    request = ActivateReleaseRequest(federation=federation, version=0 if version == "newest" else int(version))
    active = _call(server, tls_dir, lambda stub: stub.ActivateRelease(request, timeout=_TIMEOUT_SECONDS).version)
    typer.echo(f"release {active or 'none'} of {federation} is active")


@operator.command()
def admit(federation: _Federation, site: _Site, server: _Server = _LOCAL, tls_dir: _TlsDir = None) -> None:
    """Count a site's banks whatever the other sites' are like, that of the open round included."""
    _set_standing(federation, site, STANDING_ADMITTED, server, tls_dir)
    typer.echo(f"banks of {site} count in {federation}")


@operator.command()
def judge(federation: _Federation, site: _Site, server: _Server = _LOCAL, tls_dir: _TlsDir = None) -> None:
    """Compare a site's banks with those of the others again, as from the start: takes `admit` and `ban` back."""
    _set_standing(federation, site, STANDING_JUDGED, server, tls_dir)
    typer.echo(f"banks of {site} are judged in {federation}")


@operator.command()
def ban(federation: _Federation, site: _Site, server: _Server = _LOCAL, tls_dir: _TlsDir = None) -> None:
    """Let a site take part no more, and leave it out of the next round's global memory."""
    _set_standing(federation, site, STANDING_BANNED, server, tls_dir)
    typer.echo(f"{site} is banned from {federation}")


@operator.command()
def remove(federation: _Federation, site: _Site, server: _Server = _LOCAL, tls_dir: _TlsDir = None) -> None:
    """Forget a site that has left, so that no round waits for it; it may join again."""
    request = RemoveSiteRequest(federation=federation, site=site)
    _call(server, tls_dir, lambda stub: stub.RemoveSite(request, timeout=_TIMEOUT_SECONDS))
    typer.echo(f"{site} is removed from {federation}")


def _set_standing(federation: str, site: str, standing: Standing.ValueType, server: str, tls_dir: Path | None) -> None:
    request = SetStandingRequest(federation=federation, site=site, standing=standing)
    _call(server, tls_dir, lambda stub: stub.SetStanding(request, timeout=_TIMEOUT_SECONDS))


def _call(server: str, tls_dir: Path | None, ask: Callable[[OperatorServiceStub], _Answer]) -> _Answer:
    with asking(server), channel_to(server, [], tls_dir) as channel:
        return ask(OperatorServiceStub(channel))
