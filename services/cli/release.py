"""`feddymem release`: which releases there are, and which one scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToJson
from rich.console import Console
from rich.table import Column, Table

from feddymem.v1.operator_pb2 import (
    ActivateReleaseRequest,
    ListReleasesRequest,
    ListReleasesResponse,
)
from services.cli.exit_codes import REFUSED, USAGE
from services.cli.failures import fail
from services.cli.operator_calls import LOCAL, TIMEOUT_SECONDS, Federation, Server, TlsDir, call

_NEWEST = "newest"
_LARGEST = 2**32 - 1
_SITES_SHOWN = 8

release = typer.Typer(help="List releases, activate one, roll back. With TLS, for role operator.", no_args_is_help=True)

_IfActive = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=_LARGEST,
        help="Only if this release is active now: nothing is changed if a round or somebody was faster.",
    ),
]


@release.command(name="list")
def list_releases(
    federation: Federation,
    server: Server = LOCAL,
    tls_dir: TlsDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Show the releases that can be activated, oldest first: when each was made, from what, and which one is active."""
    answer = _list(federation, server, tls_dir)
    if as_json:
        print(MessageToJson(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
        return
    Console().print(_table(federation, answer))


@release.command()
def activate(
    federation: Federation,
    version: Annotated[str, typer.Argument(help="Version of the release, or `newest` for that of each round.")],
    if_active: _IfActive = None,
    server: Server = LOCAL,
    tls_dir: TlsDir = None,
) -> None:
    """Activate a release, earlier or later; it stays active until the next call."""
    if not (version == _NEWEST or (version.isdecimal() and 1 <= int(version) <= _LARGEST)):
        fail(f"version {version!r} is neither a number from 1 on nor `{_NEWEST}`", USAGE)
    _activate(federation, 0 if version == _NEWEST else int(version), if_active, server, tls_dir)


@release.command()
def rollback(
    federation: Federation, if_active: _IfActive = None, server: Server = LOCAL, tls_dir: TlsDir = None
) -> None:
    """Activate the kept release before the active one; it stays active until the next call."""
    answer = _list(federation, server, tls_dir)
    active = answer.active if if_active is None else if_active
    versions = [each.version for each in answer.releases]
    earlier = [version for version in versions if version < active]
    if not earlier:
        kept = ", ".join(map(str, versions)) or "none"
        fail(
            f"no release of {federation} before {active or 'the first'} is kept (kept: {kept}); nothing was changed",
            REFUSED,
        )
    _activate(federation, earlier[-1], active, server, tls_dir)


def _list(federation: str, server: str, tls_dir: Path | None) -> ListReleasesResponse:
    request = ListReleasesRequest(federation=federation)
    return call(server, tls_dir, lambda stub: stub.ListReleases(request, timeout=TIMEOUT_SECONDS))


def _activate(federation: str, version: int, expected: int | None, server: str, tls_dir: Path | None) -> None:
    request = ActivateReleaseRequest(federation=federation, version=version, expected=expected)
    answer = call(server, tls_dir, lambda stub: stub.ActivateRelease(request, timeout=TIMEOUT_SECONDS))
    stays = " and stays so" if version else ""
    typer.echo(
        f"release {answer.version or 'none'} of {federation} is active{stays}; before: {answer.previous or 'none'}"
    )


def _table(federation: str, answer: ListReleasesResponse) -> Table:
    held = ", and stays so (`activate newest` ends it)" if answer.held else ""
    title = f"{federation}: release {answer.active or 'none'} is active{held}"
    made = Column("made (UTC)", no_wrap=True)
    table = Table("release", "", made, "from", "sites", "images", "items", title=title)
    newest = max((each.version for each in answer.releases), default=0)
    for each in answer.releases:
        marks = {"active": each.version == answer.active, _NEWEST: each.version == newest}
        table.add_row(
            str(each.version),
            ", ".join(mark for mark, holds in marks.items() if holds),
            f"{each.created.ToDatetime():%Y-%m-%d %H:%M}",
            str(each.base or "-"),
            _sites(each.sites),
            str(each.images),
            str(each.items),
        )
    return table


def _sites(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SITES_SHOWN} more" if len(names) > _SITES_SHOWN else ""
    return ", ".join(names[:_SITES_SHOWN]) + more
