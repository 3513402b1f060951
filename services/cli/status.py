"""`feddymem status`."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from feddymem.client.tls import channel_to
from feddymem.v1.federation_pb2 import FederationStatus, GetStatusRequest, GetStatusResponse, Phase, SiteStatus
from feddymem.v1.federation_pb2_grpc import FederationServiceStub
from feddymem.v1.operator_pb2 import STANDING_JUDGED, Standing
from services.cli.calls import TIMEOUT_SECONDS, print_answer
from services.cli.failures import asking
from services.runtime.words import word_of

_ROUNDS_SHOWN = 5


def status(server: str, tls_dir: Path | None, federation: str, as_json: bool) -> None:
    """Prints the state of an aggregator's federations."""
    with asking(server):
        response = get_status(server, federation, tls_dir)
    print_answer(response, as_json, map(_table, response.federations))


def get_status(server: str, federation: str = "", tls_dir: Path | None = None) -> GetStatusResponse:
    """The state of an aggregator's federations.

    Raises:
        grpc.RpcError: the aggregator refused, or cannot be reached.
        TlsError: the TLS files cannot be used.
    """
    with channel_to(server, [], tls_dir) as channel:
        return FederationServiceStub(channel).GetStatus(
            GetStatusRequest(federation=federation), timeout=TIMEOUT_SECONDS
        )


def _table(state: FederationStatus) -> Table:
    held = " (held)" if state.release_held else ""
    waits = f", waits for {state.waits_for}" if state.waits_for else ""
    title = (
        f"{state.federation}: {word_of(Phase.Name(state.phase))}, round {state.round} of {state.method.rounds}, "
        f"release {state.release or 'none'}{held}, quorum {state.quorum}{waits}"
    )
    shadow = f", {state.shadow_release} in the shadow" if state.shadow_release else ""
    lines = [
        f"releases kept: {', '.join(map(str, state.releases)) or 'none'}{shadow}; "
        f"false-alarm rate {state.false_alarm_rate:g}",
        *(f"release {failed.version} has failed a check: {failed.reason}" for failed in state.failed_releases),
    ]
    kept = "\n".join(lines)
    table = Table(
        "site", "present", "images", "held out", "last round", "KiB per round", "standing", title=title, caption=kept
    )
    for site in state.sites:
        sent = [f"{count / 1024:.1f}" for count in site.bytes_per_round[-_ROUNDS_SHOWN:]]
        more = "... " if len(site.bytes_per_round) > _ROUNDS_SHOWN else ""
        table.add_row(
            site.site,
            "yes" if site.present else "no",
            str(site.images),
            str(site.held_out_images or "-"),
            str(site.last_round or "-"),
            more + (", ".join(sent) or "-"),
            _treatment(site),
        )
    return table


def _treatment(site: SiteStatus) -> str:
    """How the site's banks are treated; of a judged one, why the last one was left out."""
    if site.standing == STANDING_JUDGED and site.quarantine:
        return f"quarantine: {site.quarantine}"
    return word_of(Standing.Name(site.standing))
