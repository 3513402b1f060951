"""A load generator in a process of its own: closed loops of callers, or arrivals at a constant rate.

With a constant rate a request is sent when it is due, whatever became of those before, and its latency counts from
then: a slow server does not slow down those who ask (no coordinated omission). Requests are sent and answers taken as
bytes, so that little of the machine goes into the measuring.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import typer
from grpc import aio

_DEADLINE_SECONDS = 30
_PAUSE_SECONDS = 0.05
"""Of a caller in a closed loop that was refused; our client's is 0.1 s."""
_Rpc = aio.UnaryUnaryMultiCallable[bytes, bytes]
_CHANNEL = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 2**26)]


@dataclass(frozen=True)
class Load:
    """What callers saw.

    Attributes:
        seconds: of the measurement.
        answered: requests that came back with a result, by the end or soon after.
        per_second: answered / seconds.
        outcomes: requests by gRPC status.
        latency_ms: of the answered, percentiles by name.
        refused_ms: of those refused with RESOURCE_EXHAUSTED; empty without any.
        callers_cpu_cores: cores that the generator itself was busy on.
    """

    seconds: float
    answered: int
    per_second: float
    outcomes: dict[str, int]
    latency_ms: dict[str, float]
    refused_ms: dict[str, float]
    callers_cpu_cores: float


def run_load(
    server: str,
    method: str,
    requests: Sequence[bytes],
    folder: Path,
    seconds: float,
    *,
    callers: int = 1,
    rate: float = 0,
) -> Load:
    """Runs the generator in another process.

    Args:
        server: HOST:PORT.
        method: full name of a unary RPC, as gRPC spells it.
        requests: serialised, sent in turn.
        folder: for the requests' files.
        seconds: how long.
        callers: connections; without a rate, each sends its next request when the one before is answered.
        rate: arrivals a second, over all connections.
    """
    files = []
    for number, request in enumerate(requests):
        files.append(folder / f"request{number}")
        files[-1].write_bytes(request)
    command = [sys.executable, "-m", "benchmarks.load", server, method, *map(str, files)]
    flags = ["--seconds", str(seconds), "--callers", str(callers), "--rate", str(rate)]
    done = subprocess.run([*command, *flags], check=True, capture_output=True, timeout=seconds + 120)
    return Load(**json.loads(done.stdout))


class _Record:
    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = {"OK": [], "RESOURCE_EXHAUSTED": []}

    def add(self, status: str, seconds: float) -> None:
        self.outcomes[status] += 1
        self.seconds.setdefault(status, []).append(seconds)


async def _call(rpc: _Rpc, request: bytes, due: float, record: _Record) -> str:
    try:
        await rpc(request, timeout=_DEADLINE_SECONDS)
        status = "OK"
    except aio.AioRpcError as error:
        status = error.code().name
    record.add(status, time.perf_counter() - due)
    return status


async def _closed(rpcs: list[_Rpc], requests: list[bytes], until: float, record: _Record) -> None:
    async def loop(rpc: _Rpc, first: int) -> None:
        for request in itertools.islice(itertools.cycle(requests), first, None):
            if (now := time.perf_counter()) >= until:
                return
            if await _call(rpc, request, now, record) == "RESOURCE_EXHAUSTED":
                await asyncio.sleep(_PAUSE_SECONDS)

    await asyncio.gather(*(loop(rpc, number) for number, rpc in enumerate(rpcs)))


async def _open(rpcs: list[_Rpc], requests: list[bytes], until: float, rate: float, record: _Record) -> None:
    start, sent = time.perf_counter(), set()
    for number in itertools.count():
        due = start + number / rate
        if due >= until:
            break
        if (early := due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        elif number % 8 == 0:
            await asyncio.sleep(0)  # late: catches up, and still takes answers
        call = _call(rpcs[number % len(rpcs)], requests[number % len(requests)], due, record)
        task = asyncio.ensure_future(call)
        sent.add(task)
        task.add_done_callback(sent.discard)
    await asyncio.gather(*sent)


async def _measure(server: str, method: str, requests: list[bytes], seconds: float, callers: int, rate: float) -> Load:
    channels = [aio.insecure_channel(server, options=_CHANNEL) for _ in range(callers)]
    rpcs: list[_Rpc] = [channel.unary_unary(method) for channel in channels]
    record = _Record()
    await asyncio.gather(*(_call(rpc, requests[0], time.perf_counter(), _Record()) for rpc in rpcs))  # connects
    until, cpu = time.perf_counter() + seconds, time.process_time()
    await (_open(rpcs, requests, until, rate, record) if rate else _closed(rpcs, requests, until, record))
    cpu = (time.process_time() - cpu) / seconds
    for channel in channels:
        await channel.close()
    answered = len(record.seconds["OK"])
    return Load(
        seconds=seconds,
        answered=answered,
        per_second=round(answered / seconds, 2),
        outcomes=dict(record.outcomes),
        latency_ms=_percentiles(record.seconds["OK"]),
        refused_ms=_percentiles(record.seconds["RESOURCE_EXHAUSTED"]),
        callers_cpu_cores=round(cpu, 2),
    )


def _percentiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    points = {"p10": 10, "median": 50, "p90": 90, "p99": 99, "max": 100}
    return {name: round(float(np.percentile(seconds, point)) * 1000, 3) for name, point in points.items()}


def main(server: str, method: str, requests: list[Path], seconds: float = 5, callers: int = 1, rate: float = 0) -> None:
    """Prints what callers saw, as JSON."""
    bodies = [path.read_bytes() for path in requests]
    print(json.dumps(asdict(asyncio.run(_measure(server, method, bodies, seconds, callers, rate)))))


if __name__ == "__main__":
    typer.run(main)
