"""`feddymem status`."""

from __future__ import annotations

from pathlib import Path

from google.protobuf.json_format import MessageToJson
from rich.table import Table

from feddymem.client.tls import channel_to
from feddymem.v1.federation_pb2 import FederationStatus, GetStatusRequest, GetStatusResponse, Phase, SiteStatus
from feddymem.v1.federation_pb2_grpc import FederationServiceStub
from feddymem.v1.operator_pb2 import STANDING_JUDGED, Standing
from services.cli.consoles import standard_output
from services.cli.failures import asking

_TIMEOUT_SECONDS = 10
"""A person waits for the answer."""
_ROUNDS_SHOWN = 5


def status(server: str, tls_dir: Path | None, federation: str, as_json: bool) -> None:
    """Prints the state of an aggregator's federations."""
    with asking(server):
        response = get_status(server, federation, tls_dir)
    if as_json:
        print(MessageToJson(response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
        return
    console = standard_output()
    for state in response.federations:
        console.print(_table(state))


def get_status(server: str, federation: str = "", tls_dir: Path | None = None) -> GetStatusResponse:
    """The state of an aggregator's federations.

    Raises:
        grpc.RpcError: the aggregator refused, or cannot be reached.
        TlsError: the TLS files cannot be used.
    """
    with channel_to(server, [], tls_dir) as channel:
        return FederationServiceStub(channel).GetStatus(
            GetStatusRequest(federation=federation), timeout=_TIMEOUT_SECONDS
        )


def _table(state: FederationStatus) -> Table:
    held = " (held)" if state.release_held else ""
    waits = f", waits for {state.waits_for}" if state.waits_for else ""
    title = (
        f"{state.federation}: {phase_name(state.phase)}, round {state.round} of {state.method.rounds}, "
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
    return standing_name(site.standing)


def standing_name(standing: Standing.ValueType) -> str:
    """A standing in lower case: judged, admitted or banned."""
    return Standing.Name(standing).removeprefix("STANDING_").lower()


def phase_name(phase: Phase.ValueType) -> str:
    """A phase in lower case: waiting, open, aggregating, calibrating or done."""
    return Phase.Name(phase).removeprefix("PHASE_").lower()
