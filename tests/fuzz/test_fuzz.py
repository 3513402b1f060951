"""Malformed messages and images, a few of them on each change; `make fuzz` sends many."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from services.aggregator.federation import Federation
from tests.fuzz.in_process import FaultError, InProcess
from tests.fuzz.malformed import Answer, fuzz, improper
from tests.fuzz.seeds import Call
from tests.fuzz.victims import HONEST_SITE

STATUS = "/feddymem.v1.FederationService/GetStatus"
RUNS = {"images": 4000, "rpcs": 3000, "releases": 2000}


def test_malformed_calls_are_answered_properly_and_change_nothing(tmp_path: Path) -> None:
    found = fuzz(400, 0, tmp_path)
    assert not found.broken
    assert {server for server, _path in found.tallies} == {"aggregator", "edge", "inference"}
    assert sum(tally.statuses.total() for tally in found.tallies.values()) == 400


@pytest.mark.parametrize(
    ("status", "text", "sent", "why"),
    [
        (grpc.StatusCode.INTERNAL, "internal error", b"", "INTERNAL: internal error"),
        (grpc.StatusCode.UNKNOWN, "", b"", "UNKNOWN: "),
        (grpc.StatusCode.UNAVAILABLE, "", b"", "UNAVAILABLE: "),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", b"", "DEADLINE_EXCEEDED: "),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "", b"", "RESOURCE_EXHAUSTED: "),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "", bytes(5 * 2**20), None),
        (grpc.StatusCode.NOT_FOUND, "no site 'x'", b"x", None),
        (grpc.StatusCode.NOT_FOUND, f"sites are {HONEST_SITE}", b"x", "NOT_FOUND names another site"),
        (grpc.StatusCode.NOT_FOUND, f"no site {HONEST_SITE}s", f"{HONEST_SITE}s".encode(), None),
        (grpc.StatusCode.INVALID_ARGUMENT, 'File "/srv/rpc.py", line 3', b"", "INVALID_ARGUMENT tells 'File \"'"),
    ],
)
def test_what_is_improper_is_found(status: grpc.StatusCode, text: str, sent: bytes, why: str | None) -> None:
    found = list(improper(STATUS, [sent], Answer(status, text, [], 0.1), left=False))
    assert len(found) == (why is not None)
    assert why is None or found[0].startswith(why)


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    opened = InProcess(tmp_path_factory.mktemp("in-process"))
    yield opened
    opened.close()


_NOTHING_THERE = {"/feddymem.v1.OperatorService/GetRelease", "/feddymem.v1.InspectionService/ReportFeedback"}
"""What asks for a release or an edge client, of which there are none."""


def test_what_is_honest_is_answered(in_process: InProcess) -> None:
    refused = {}
    for path in in_process.paths:
        ends = [in_process.call(path, _on_the_wire(call)) for call in in_process.calls[path]]
        if grpc.StatusCode.OK not in ends:
            refused[path] = ends
    assert refused.keys() == _NOTHING_THERE
    assert all(grpc.StatusCode.NOT_FOUND in ends for ends in refused.values())


def test_a_fault_is_no_answer(in_process: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_federation: Federation, _site: str | None) -> None:
        raise KeyError("site")

    monkeypatch.setattr(Federation, "status", broken)
    with pytest.raises(FaultError) as caught:
        in_process.call(STATUS, [b""])
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("target", RUNS)
def test_guided_by_coverage_nothing_is_found(target: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="Atheris has no wheel for this platform")
    # Not started by this process itself: Linux counts its largest memory, of all tests before, as the child's, and
    # libFuzzer stops at 2 GiB. `timeout` is small, and forks.
    command = ["timeout", "240", sys.executable, "-m", "tests.fuzz.targets", target]
    flags = [f"-runs={RUNS[target]}", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    run = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    assert f"stat::number_of_executed_units: {RUNS[target]}" in run.stderr


def _on_the_wire(call: Call) -> list[bytes]:
    return [message.SerializeToString() for message in call]
