"""What traces cost a service, off and on: `python -m benchmarks.tracing`."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from typing import Annotated, Any

import grpc
import typer
from grpc import aio

from services.runtime import tracing
from services.runtime.rpc import RpcBoundary
from services.runtime.trace_export import exported_traces
from tests.collector import collecting

METHOD = "/feddymem.benchmark.Echo/Echo"
_CALLS = 4000
_RUNS = 7
_STAGES = ("queue", "decode", "compute", "encode")
_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


async def _echo(request: bytes, _context: aio.ServicerContext[bytes, bytes]) -> bytes:
    """What an inspection has to tell of itself, and nothing else."""
    with tracing.span("inspection", federation="parts", site="plant-a", release=1) as inspection:
        now = time.monotonic()
        for stage in _STAGES:
            tracing.add_part(inspection, stage, now, now)
    return request


async def _call() -> float:
    """Microseconds of an RPC, caller and server together, one after the other."""
    boundary = RpcBoundary({}, {METHOD: lambda _name, _seconds: None}, {}, 1e9, 100, 100)
    server = aio.server(interceptors=[boundary])
    service, _, name = METHOD[1:].partition("/")
    handler: Any = grpc.unary_unary_rpc_method_handler(_echo)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {name: handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_unary(METHOD)
        for _ in range(_CALLS // 4):
            await call(b"warm")
        started = time.perf_counter()
        for _ in range(_CALLS):
            await call(b"request")
        seconds = time.perf_counter() - started
    await server.stop(0)
    return seconds / _CALLS * 1e6


def _in_a_process(endpoint: str | None) -> float:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    environment |= {_ENDPOINT: endpoint} if endpoint else {}
    command = [sys.executable, "-m", "benchmarks.tracing", "--once"]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main(once: Annotated[bool, typer.Option(help="Measure in this process.")] = False) -> None:
    """Prints microseconds of an RPC with the spans of an inspection: off, and on with a collector beside it."""
    if once:
        with exported_traces("benchmark"):
            sys.stdout.write(f"{asyncio.run(_call())}\n")
        return
    with collecting() as collector:
        runs = [(_in_a_process(None), _in_a_process(collector.endpoint)) for _ in range(_RUNS)]
    off, on = zip(*runs, strict=True)
    for name, values in (("off", off), ("on", on)):
        each = ", ".join(f"{value:.0f}" for value in sorted(values))
        sys.stdout.write(f"traces {name}: {statistics.median(values):.0f} us an RPC ({each})\n")


if __name__ == "__main__":
    typer.run(main)
