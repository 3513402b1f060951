"""A gRPC server that takes bytes and says how many: what any service pays for a request of that size."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import typer
from grpc import aio

METHOD = "/feddymem.benchmark.Echo/Echo"


async def _echo(request: bytes, _context: aio.ServicerContext[bytes, bytes]) -> bytes:
    return len(request).to_bytes(8, "little")


async def _serve(address_file: Path) -> None:
    server = aio.server(options=[("grpc.max_receive_message_length", 2**26)])
    service, _, name = METHOD[1:].partition("/")
    handler: Any = grpc.unary_unary_rpc_method_handler(_echo)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {name: handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    waiting = address_file.with_suffix(".part")
    waiting.write_text(f"127.0.0.1:{port}")
    waiting.rename(address_file)
    await server.wait_for_termination()


def main(address_file: Path) -> None:
    """Serves until it is ended; writes its address to a file."""
    asyncio.run(_serve(address_file))


if __name__ == "__main__":
    typer.run(main)
