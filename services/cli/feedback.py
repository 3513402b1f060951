"""`feddymem feedback`: report what was wrong with a verdict; decide what enters the site's bank."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from feddymem.client.tls import channel_to
from feddymem.v1.feedback_pb2 import (
    DECISION_ACCEPTED,
    DECISION_REJECTED,
    DecideFeedbackRequest,
    Decision,
    Feedback,
    ListFeedbackRequest,
    ListFeedbackResponse,
    Opinion,
)
from feddymem.v1.feedback_pb2_grpc import FeedbackServiceStub
from services.cli.calls import EDGE_CLIENT, INFERENCE, TIMEOUT_SECONDS, AsJson, TlsDir, print_answer
from services.cli.exit_codes import REFUSED, USAGE
from services.cli.failures import asking, fail
from services.runtime.words import word_of

_OPTIONS = [("grpc.max_receive_message_length", 16 * 2**20)]
"""As many notes as are kept may be more than the 4 MiB that gRPC takes by default."""
_NAME_SHOWN = 12
"""Characters of an image's SHA-256: more than the 6 that are needed, and that no two begin with by chance."""

feedback = typer.Typer(
    help="Report false alarms and bad parts; decide which false alarms a site learns. With TLS, the latter is for the "
    "certificate of the site.",
    no_args_is_help=True,
)

_EdgeClient = Annotated[str, typer.Option(help="HOST:PORT of the site's edge client.")]
_Images = Annotated[
    list[str],
    typer.Argument(metavar="IMAGE...", help="SHA-256 of each image, or the first 6 or more of its characters."),
]


@feedback.command()
def report(
    image: Annotated[Path, typer.Argument(help="The image file, as it was inspected.")],
    false_alarm: Annotated[bool, typer.Option("--false-alarm", help="It was called anomalous and is normal.")] = False,
    bad_part: Annotated[bool, typer.Option("--bad-part", help="The part is bad.")] = False,
    note: Annotated[str, typer.Option(help="Anything to add; at most 1,000 characters.")] = "",
    server: Annotated[str, typer.Option(help="HOST:PORT of the inference service.")] = INFERENCE,
    tls_dir: TlsDir = None,
    federation: Annotated[str, typer.Option(help="Federation; needed where the service has several.")] = "",
    site: Annotated[str, typer.Option(help="Site; needed where the service has several.")] = "",
) -> None:
    """Say what was wrong with a verdict; the image stays at the site."""
    from feddymem import client

    if false_alarm == bad_part:
        fail("say either --false-alarm or --bad-part", USAGE)
    if not image.is_file():
        fail(f"there is no file {image}", USAGE)
    opinion = client.Opinion.FALSE_ALARM if false_alarm else client.Opinion.BAD_PART
    try:
        with client.InspectionClient(server, federation=federation, site=site, tls_dir=tls_dir) as reporter:
            name = reporter.report_feedback(image, opinion, note=note)
    except client.TlsError as error:
        fail(str(error), USAGE)
    except client.InspectionError as error:
        fail(f"{server}: {error.status.name}: {error}", REFUSED)
    typer.echo(f"image {name} is kept as {opinion.value.replace('_', ' ')}")


@feedback.command(name="list")
def list_feedback(
    undecided: Annotated[bool, typer.Option("--undecided", help="Only false alarms to be decided about.")] = False,
    server: _EdgeClient = EDGE_CLIENT,
    tls_dir: TlsDir = None,
    as_json: AsJson = False,
) -> None:
    """Show what is kept at the site, the newest first."""
    request = ListFeedbackRequest(undecided=undecided)
    with asking(server), channel_to(server, _OPTIONS, tls_dir) as channel:
        answer = FeedbackServiceStub(channel).ListFeedback(request, timeout=TIMEOUT_SECONDS)
    print_answer(answer, as_json, [_table(answer)])


@feedback.command()
def accept(images: _Images, server: _EdgeClient = EDGE_CLIENT, tls_dir: TlsDir = None) -> None:
    """Have false alarms enter the site's next bank, and each one after that."""
    _decide(images, DECISION_ACCEPTED, "enters the next bank", server, tls_dir)


@feedback.command()
def reject(images: _Images, server: _EdgeClient = EDGE_CLIENT, tls_dir: TlsDir = None) -> None:
    """Keep images out of the bank, as from the next round; they make room first."""
    _decide(images, DECISION_REJECTED, "enters no bank", server, tls_dir)


def _decide(images: list[str], decision: Decision.ValueType, what: str, server: str, tls_dir: Path | None) -> None:
    with asking(server), channel_to(server, [], tls_dir) as channel:
        for image in images:
            request = DecideFeedbackRequest(image=image, decision=decision)
            answer = FeedbackServiceStub(channel).DecideFeedback(request, timeout=TIMEOUT_SECONDS)
            typer.echo(f"image {answer.image} {what}")


def _table(answer: ListFeedbackResponse) -> Table:
    came = Column("said (UTC)", no_wrap=True)
    table = Table(Column("image", no_wrap=True), came, "said to be", "decided", "KiB", "note")
    for each in answer.feedback:
        table.add_row(
            each.image[:_NAME_SHOWN],
            f"{each.received.ToDatetime():%Y-%m-%d %H:%M}",
            _opinion(each),
            _decision(each),
            f"{each.size_bytes / 1024:.0f}",
            each.note,
        )
    return table


def _opinion(feedback: Feedback) -> str:
    return word_of(Opinion.Name(feedback.opinion)).replace("_", " ")


def _decision(feedback: Feedback) -> str:
    return word_of(Decision.Name(feedback.decision)) if feedback.decision else "-"
