"""`feddymem release`: which releases there are, what is known of them, and which one scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Column, Table

from feddymem.v1.operator_pb2 import (
    ActivateReleaseRequest,
    GetReleaseRequest,
    GetReleaseResponse,
    ListReleasesRequest,
    ListReleasesResponse,
    ShadowReleaseRequest,
)
from services.cli.calls import AGGREGATOR, TIMEOUT_SECONDS, AsJson, Federation, Server, TlsDir, call, print_answer
from services.cli.exit_codes import REFUSED, USAGE
from services.cli.failures import fail

_NEWEST, _NONE = "newest", "none"
_LARGEST = 2**32 - 1
_SITES_SHOWN = 8

release = typer.Typer(
    help="List releases, look at one, activate one, roll back. With TLS, for role operator.", no_args_is_help=True
)

_Version = Annotated[int, typer.Argument(min=1, max=_LARGEST, help="Version of the release.")]
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
    server: Server = AGGREGATOR,
    tls_dir: TlsDir = None,
    as_json: AsJson = False,
) -> None:
    """Show the releases that can be activated, oldest first: when each was made, from what, and which one is active."""
    answer = _list(federation, server, tls_dir)
    print_answer(answer, as_json, [_table(federation, answer)])


@release.command()
def show(
    federation: Federation,
    version: _Version,
    server: Server = AGGREGATOR,
    tls_dir: TlsDir = None,
    as_json: AsJson = False,
) -> None:
    """Show one release: its checks, and how it scores the normal images that each site has held out."""
    request = GetReleaseRequest(federation=federation, version=version)
    answer = call(server, tls_dir, lambda stub: stub.GetRelease(request, timeout=TIMEOUT_SECONDS))
    print_answer(answer, as_json, [_checks(federation, answer), _alarms(answer)])


@release.command()
def shadow(
    federation: Federation,
    version: Annotated[str, typer.Argument(help="Version of the release, or `none` to end it.")],
    server: Server = AGGREGATOR,
    tls_dir: TlsDir = None,
) -> None:
    """Have a release score alongside the active one: only counted is what it would say, see docs/metrics.md."""
    number = 0 if version == _NONE else _number(version, _NONE)
    request = ShadowReleaseRequest(federation=federation, version=number)
    answer = call(server, tls_dir, lambda stub: stub.ShadowRelease(request, timeout=TIMEOUT_SECONDS))
    scores = f"release {number}" if number else "no release"
    typer.echo(f"{scores} of {federation} scores in the shadow; before: {answer.previous or 'none'}")


@release.command()
def activate(
    federation: Federation,
    version: Annotated[
        str, typer.Argument(help="Version of the release, or `newest` for that of each round that passes its checks.")
    ],
    if_active: _IfActive = None,
    server: Server = AGGREGATOR,
    tls_dir: TlsDir = None,
) -> None:
    """Activate a release, earlier or later; it stays active until the next call."""
    _activate(federation, 0 if version == _NEWEST else _number(version, _NEWEST), if_active, server, tls_dir)


@release.command()
def rollback(
    federation: Federation, if_active: _IfActive = None, server: Server = AGGREGATOR, tls_dir: TlsDir = None
) -> None:
    """Activate the last kept release before the active one that has passed its checks; it stays active until the next
    call."""
    answer = _list(federation, server, tls_dir)
    active = answer.active if if_active is None else if_active
    versions = [each.version for each in answer.releases]
    earlier = [each.version for each in answer.releases if each.version < active and not each.failed]
    if not earlier:
        kept = ", ".join(map(str, versions)) or "none"
        fail(
            f"no release of {federation} before {active or 'the first'} is kept and has passed its checks "
            f"(kept: {kept}); `release activate` takes one that has not; nothing was changed",
            REFUSED,
        )
    _activate(federation, earlier[-1], active, server, tls_dir)


def _number(version: str, word: str) -> int:
    if not (version.isdecimal() and 1 <= int(version) <= _LARGEST):
        fail(f"version {version!r} is neither a number from 1 on nor `{word}`", USAGE)
    return int(version)


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
    if answer.failed:
        typer.echo(f"feddymem: it has failed a check: {answer.failed}", err=True)


def _table(federation: str, answer: ListReleasesResponse) -> Table:
    held = ", and stays so (`activate newest` ends it)" if answer.held else ""
    title = f"{federation}: release {answer.active or 'none'} is active{held}"
    made = Column("made (UTC)", no_wrap=True)
    table = Table("release", "", made, "from", "sites", "images", "held out", "items", title=title)
    newest = max((each.version for each in answer.releases), default=0)
    for each in answer.releases:
        marks = {
            "active": each.version == answer.active,
            _NEWEST: each.version == newest,
            "failed": bool(each.failed),
        }
        table.add_row(
            str(each.version),
            ", ".join(mark for mark, holds in marks.items() if holds),
            f"{each.created.ToDatetime():%Y-%m-%d %H:%M}",
            str(each.base or "-"),
            _sites(each.sites),
            str(each.images),
            str(each.held_out_images),
            str(each.items),
        )
    return table


def _checks(federation: str, answer: GetReleaseResponse) -> Table:
    each = answer.release
    made = f"made {each.created.ToDatetime():%Y-%m-%d %H:%M} (UTC) from release {each.base or 'none'}"
    table = Table("check", "", "finding", title=f"{federation}: release {each.version}, {made}")
    for check in answer.checks:
        table.add_row(check.name, "passed" if check.passed else "failed", check.finding)
    return table


def _alarms(answer: GetReleaseResponse) -> Table:
    """How a site's held-out images are scored; the median is that of what the sketch tells."""
    from services.runtime.messages import site_calibration_from_message  # loads torch, see main.py

    title = f"normal images held out, at a false-alarm rate of {answer.false_alarm_rate:g}"
    table = Table("site", "held out", "median score", "threshold", "alarms", "guaranteed rate", title=title)
    for site in answer.sites:
        scores = site_calibration_from_message(site.calibration).scores
        table.add_row(
            site.site,
            str(len(scores)),
            f"{np.median(scores.scores):.4g}" if len(scores) else "-",
            f"{site.threshold:.4g}" if site.threshold else "-",
            str(site.alarms),
            f"{site.guaranteed_rate:.3g}" if site.threshold else "-",
        )
    return table


def _sites(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SITES_SHOWN} more" if len(names) > _SITES_SHOWN else ""
    return ", ".join(names[:_SITES_SHOWN]) + more
