"""What commands that ask a service share: their options, how long they wait, and how they print the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from rich.table import Table

from feddymem.client.tls import channel_to
from feddymem.v1.operator_pb2_grpc import OperatorServiceStub
from services.cli.consoles import standard_output
from services.cli.failures import asking

TIMEOUT_SECONDS: Final = 10
"""A person waits for the answer."""
AGGREGATOR: Final = "127.0.0.1:7070"
EDGE_CLIENT: Final = "127.0.0.1:7071"
INFERENCE: Final = "127.0.0.1:7072"

Federation = Annotated[str, typer.Argument(help="Name of the federation.")]
Server = Annotated[str, typer.Option(help="HOST:PORT of the aggregator.")]
TlsDir = Annotated[
    Path | None, typer.Option(help="Folder with tls.crt, tls.key and ca.crt; without it, no TLS: for this machine.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of tables.")]
_Answer = TypeVar("_Answer")


def call(server: str, tls_dir: Path | None, ask: Callable[[OperatorServiceStub], _Answer]) -> _Answer:
    """Asks an aggregator, or ends the command with what it says against it."""
    with asking(server), channel_to(server, [], tls_dir) as channel:
        return ask(OperatorServiceStub(channel))


def print_answer(answer: Message, as_json: bool, tables: Iterable[Table]) -> None:
    """Prints an answer for programs, with all its fields, or for people.

    Args:
        answer: of a service.
        as_json: whether it is for programs.
        tables: the answer for people.
    """
    if as_json:
        print(MessageToJson(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
        return
    for table in tables:
        standard_output().print(table)
