"""Sends malformed messages and images to every RPC of real services: all must answer properly, live on and not grow.

python -m tests.fuzz.malformed --inputs 10000
"""

from __future__ import annotations

import itertools
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grpc
import psutil
import typer
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionResponse
from rich.console import Console
from rich.table import Table

from feddymem.openinference.open_inference_pb2 import ModelStreamInferResponse
from feddymem.v1.inspection_pb2 import InspectStreamResponse
from services.demo.processes import Fleet
from services.runtime.channels import MAX_MESSAGE_BYTES
from tests.fuzz.mutations import mangled_call
from tests.fuzz.victims import HONEST_SITE, Victims

MOST_GROWTH_BYTES = 50 * 2**20
_WARM_UP = 0.1
"""Part of the inputs after which a process has all that it needs in memory."""
_ANSWER_SECONDS = 20
"""Whoever has not answered by then hangs."""
_PATIENCE_SECONDS = 0.2
"""For calls that need not end by themselves: watches, and streams whose sender keeps them open."""
_HELD_OPEN = 0.1
"""Part of the calls whose sender does not half-close."""
_SHOWN = 20

_PROPER = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.DATA_LOSS,
}
_BY_CALLER = {grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}
_TELLTALE = re.compile(r"Traceback|File \"|\.py\b|site-packages|0x[0-9a-f]{6,}|<[\w.]+ object")
_NUMBERS = {int(status.value[0]): status for status in grpc.StatusCode}


@dataclass(frozen=True)
class Answer:
    """What a call came to.

    Attributes:
        status: at its end.
        text: of the status.
        responses: on the wire, before that.
        seconds: that it took.
    """

    status: grpc.StatusCode
    text: str
    responses: list[bytes]
    seconds: float


@dataclass
class Tally:
    """What the calls of one RPC came to."""

    statuses: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0


@dataclass
class Findings:
    """What came of it.

    Attributes:
        tallies: by server and path of the method.
        resident_bytes: of each server, after the warm-up and at the end.
        broken: what should not have been, in words.
    """

    tallies: dict[tuple[str, str], Tally] = field(default_factory=lambda: defaultdict(Tally))
    resident_bytes: dict[str, tuple[int, int]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


def fuzz(inputs: int, seed: int, folder: Path) -> Findings:
    """Sends malformed calls to each RPC of each service in turn, and compares what the honest have before and after.

    Raises:
        ServiceFailedError: a process died.
    """
    found, rng = Findings(), random.Random(seed)  # noqa: S311 - no secret
    with Fleet(folder / "services") as fleet:
        victims = Victims(fleet, folder / "data")
        for name, calls in victims.calls.items():
            found.broken += [f"{name}: no calls of {path}" for path in victims.methods(name) ^ calls.keys()]
        before = victims.work()
        rpcs = itertools.cycle([(name, path) for name, calls in victims.calls.items() for path in calls])
        after_warm_up: dict[str, int] = {}
        channels = {name: grpc.insecure_channel(server.grpc) for name, server in victims.servers.items()}
        for number, (name, path) in enumerate(itertools.islice(rpcs, inputs)):
            if number == int(inputs * _WARM_UP):
                after_warm_up = _resident_bytes(victims)
            _fuzz_once(victims, channels[name], name, path, rng, found)
            fleet.check_alive()
        for channel in channels.values():
            channel.close()
        now = _resident_bytes(victims)
        found.resident_bytes = {name: (after_warm_up[name], now[name]) for name in now}
        after = victims.work()
        found.broken += [
            f"not as before: {what}" for what in vars(before) if getattr(before, what) != getattr(after, what)
        ]
        found.broken += victims.faults()
    found.broken += [
        f"{name} has grown by {(end - start) / 2**20:.0f} MiB"
        for name, (start, end) in found.resident_bytes.items()
        if end - start > MOST_GROWTH_BYTES
    ]
    return found


def _fuzz_once(
    victims: Victims, channel: grpc.Channel, name: str, path: str, rng: random.Random, found: Findings
) -> None:
    if path.startswith(("/feddymem.v1.FederationService", "/feddymem.v1.OperatorService")):
        victims.set_right()
    sent = mangled_call(rng.choice(victims.calls[name][path]), rng)
    watch = "/Watch" in path
    held_open = rng.random() < _HELD_OPEN
    answer = _call(channel, path, sent, watch, held_open)
    tally = found.tallies[name, path]
    tally.statuses[answer.status.name] += 1
    tally.slowest_seconds = max(tally.slowest_seconds, answer.seconds)
    for why in improper(path, sent, answer, watch or held_open):
        data = [each[:200].hex() for each in sent]
        found.broken.append(f"{name} {path}: {why} after {answer.seconds:.1f} s; sent {data} {[*map(len, sent)]}")
    if path.endswith("/UploadBank") and answer.status is grpc.StatusCode.OK:
        victims.set_right(forget=True)


def _call(channel: grpc.Channel, path: str, messages: Sequence[bytes], watch: bool, held_open: bool) -> Answer:
    """One call: of any kind, as on the wire all are streams.

    Args:
        channel: to the server.
        path: of the method.
        messages: to send.
        watch: whether to leave after the first response.
        held_open: whether to leave it open after the last message.
    """
    ended = threading.Event()

    def requests() -> Iterator[bytes]:
        yield from messages
        if held_open:
            ended.wait()

    seconds = _PATIENCE_SECONDS if watch or held_open else _ANSWER_SECONDS
    started = time.monotonic()
    stream: Any = channel.stream_stream(path)
    call = stream(requests(), timeout=seconds)
    responses = []
    try:
        for response in call:
            responses.append(response)
            if watch:
                call.cancel()
    except grpc.RpcError:
        pass  # its status is looked at by whoever called
    finally:
        ended.set()
    return Answer(call.code(), call.details() or "", responses, time.monotonic() - started)


def improper(path: str, sent: Sequence[bytes], answer: Answer, left: bool) -> Iterator[str]:
    """What is wrong with an answer, in words."""
    proper = {*_PROPER, *(_BY_CALLER if left else ())}
    if max(map(len, sent), default=0) > MAX_MESSAGE_BYTES:
        proper.add(grpc.StatusCode.RESOURCE_EXHAUSTED)
    if path.endswith("/UploadBank") and re.match("the stream ended before|another upload", answer.text):
        proper.add(grpc.StatusCode.UNAVAILABLE)  # so that an honest site tries again
    for status, text in ((answer.status, answer.text), *_refusals(path, answer.responses)):
        if status not in proper:
            yield f"{status.name}: {text}"
        if found := _TELLTALE.search(text):
            yield f"{status.name} tells {found[0]!r}: {text}"
        if HONEST_SITE in text and not any(HONEST_SITE.encode() in data for data in sent):
            yield f"{status.name} names another site: {text}"


def _refusals(path: str, responses: Sequence[bytes]) -> Iterator[tuple[grpc.StatusCode, str]]:
    """Refusals that came as responses of a stream."""
    for data in responses:
        if path.endswith("/InspectStream"):
            response = InspectStreamResponse.FromString(data)
            if response.HasField("error"):
                yield _NUMBERS[response.error.code], response.error.message
        elif path.endswith("/ModelStreamInfer"):
            name, _, text = ModelStreamInferResponse.FromString(data).error_message.partition(": ")
            if name:
                yield grpc.StatusCode[name], text
        elif path.endswith("/ServerReflectionInfo"):
            reflected = ServerReflectionResponse.FromString(data)
            if reflected.HasField("error_response"):
                yield _NUMBERS[reflected.error_response.error_code], reflected.error_response.error_message


def _resident_bytes(victims: Victims) -> dict[str, int]:
    return {name: psutil.Process(server.process.pid).memory_info().rss for name, server in victims.servers.items()}


def main(
    inputs: Annotated[int, typer.Option(help="Malformed calls, all in all.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
) -> None:
    """Sends malformed calls and prints what came of them; exit code 1 where something is broken."""
    with tempfile.TemporaryDirectory(prefix="feddymem-fuzz-") as folder:
        found = fuzz(inputs, seed, Path(folder))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_answers(found))
    console.print(_memory(found))
    for line in found.broken[:_SHOWN]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{inputs} inputs, {len(found.broken)} things broken")
    raise typer.Exit(bool(found.broken))


def _answers(found: Findings) -> Table:
    table = Table("server", "RPC", "inputs", "statuses", "slowest")
    for (name, path), tally in found.tallies.items():
        statuses = ", ".join(f"{status} {count}" for status, count in tally.statuses.most_common())
        slowest = f"{tally.slowest_seconds:.2f} s"
        table.add_row(name, path.removeprefix("/feddymem.v1."), str(tally.statuses.total()), statuses, slowest)
    return table


def _memory(found: Findings) -> Table:
    table = Table("server", "MiB after the warm-up", "at the end", "growth")
    for name, (start, end) in found.resident_bytes.items():
        table.add_row(name, *(f"{value / 2**20:.1f}" for value in (start, end, end - start)))
    return table


if __name__ == "__main__":
    typer.run(main)
