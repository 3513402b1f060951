"""What the commands of operators share: their options, and calls to the aggregator's OperatorService."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer

from feddymem.client.tls import channel_to
from feddymem.v1.operator_pb2_grpc import OperatorServiceStub
from services.cli.failures import asking

TIMEOUT_SECONDS: Final = 10
"""A person waits for the answer."""
LOCAL: Final = "127.0.0.1:7070"

Federation = Annotated[str, typer.Argument(help="Name of the federation.")]
Server = Annotated[str, typer.Option(help="HOST:PORT of the aggregator.")]
TlsDir = Annotated[
    Path | None, typer.Option(help="Folder with tls.crt, tls.key and ca.crt; without it, no TLS: for this machine.")
]
_Answer = TypeVar("_Answer")


def call(server: str, tls_dir: Path | None, ask: Callable[[OperatorServiceStub], _Answer]) -> _Answer:
    """Asks an aggregator, or ends the command with what it says against it."""
    with asking(server), channel_to(server, [], tls_dir) as channel:
        return ask(OperatorServiceStub(channel))
