"""`feddymem status --inference`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from feddymem.client.tls import channel_to
from feddymem.v1.inspection_pb2 import GetInspectionStatusRequest, GetInspectionStatusResponse, ScoringStatus
from feddymem.v1.inspection_pb2_grpc import InspectionServiceStub
from services.cli.calls import TIMEOUT_SECONDS, print_answer
from services.cli.failures import asking


def inference_status(server: str, tls_dir: Path | None, federation: str, as_json: bool) -> None:
    """Prints what an inference service scores with, and how its scores compare with what they were calibrated to."""
    with asking(server):
        response = get_inspection_status(server, federation, tls_dir)
    federations = itertools.groupby(response.scoring, key=lambda state: state.federation)
    print_answer(response, as_json, (_table(name, list(states)) for name, states in federations))


def get_inspection_status(
    server: str, federation: str = "", tls_dir: Path | None = None
) -> GetInspectionStatusResponse:
    """What an inference service scores with.

    Raises:
        grpc.RpcError: the service refused, or cannot be reached.
        TlsError: the TLS files cannot be used.
    """
    with channel_to(server, [], tls_dir) as channel:
        return InspectionServiceStub(channel).GetInspectionStatus(
            GetInspectionStatusRequest(federation=federation), timeout=TIMEOUT_SECONDS
        )


def _table(federation: str, states: Sequence[ScoringStatus]) -> Table:
    releases = ", ".join(str(release) for release in sorted({state.release for state in states}))
    table = Table(
        *("site", "threshold", "false alarms", "images", "recent alarms", "drift", "shadow"),
        title=f"{federation}: release {releases}",
    )
    for state in states:
        table.add_row(
            state.site or "-",
            f"{state.threshold:.4f}" if state.HasField("threshold") else "-",
            _guaranteed(state),
            str(state.images),
            f"{state.recent_alarms} of {state.recent_images}" if state.recent_images else "-",
            f"for {state.images_since_drift} images" if state.drift else "no" if state.recent_images else "-",
            _shadow(state),
        )
    return table


def _guaranteed(state: ScoringStatus) -> str:
    if not state.HasField("guarantee"):
        return "-"
    known = state.guarantee
    whose = "its own" if known.own_site else "all sites'"
    return f"{known.false_alarm_rate:.1%} on average, by {known.images} of {whose} images"


def _shadow(state: ScoringStatus) -> str:
    if not state.shadow:
        return "-"
    return (
        f"release {state.shadow}: of {state.shadow_images} images {state.shadow_only_alarms} alarms more, "
        f"{state.shadow_missing_alarms} fewer"
    )
