"""How a command of `feddymem` fails: one line on standard error, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import grpc
import typer

from feddymem.client.errors import request_id_of
from feddymem.client.tls import TlsError
from services.cli.exit_codes import REFUSED, USAGE


def fail(text: str, code: int) -> NoReturn:
    """Ends the command.

    Args:
        text: what happened, and what to do.
        code: of `services.cli.exit_codes`.
    """
    typer.echo(f"feddymem: {text}", err=True)
    raise typer.Exit(code)


@contextmanager
def asking(server: str) -> Iterator[None]:
    """Ends the command where a server cannot be asked, or refuses, in the block.

    Args:
        server: as the user has named it.
    """
    try:
        yield
    except TlsError as error:
        fail(str(error), USAGE)
    except grpc.RpcError as error:
        request_id = request_id_of(error)
        named = f" (request id {request_id})" if request_id else ""
        fail(f"{server}: {error.code().name}: {error.details()}{named}", REFUSED)
