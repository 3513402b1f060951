"""Service processes that start in no time and come back at the same address.

Each is forked from one server process that has imported everything already, so that a start takes 20 ms, not 4 s, and
hundreds of deaths fit into a test. It is a process of its own in every other respect, and runs what `feddymem` runs.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

from services.demo.processes import Fleet
from tests.chaos.kill_at import KillPoint
from tests.chaos.network import enter

_PR_SET_PDEATHSIG = 1
_FIRST_PORT = 7000
"""Below the ports that the system hands out, so that no caller that waits for a service can hold its port."""
_SMALL_CHUNK_BYTES = 2048
"""Even small arrays travel in several chunks, then."""

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["openvino", "services.aggregator.main", "services.edge_client.main", "services.inference.main", __name__]
)


@dataclass(frozen=True)
class Place:
    """Where a service runs, if not beside this process.

    Attributes:
        host: address that it listens on.
        namespace: path of its network namespace; empty for that of this process.
        keepalive_seconds: pause between its pings, and wait for their answers; None for those that all services have.
    """

    host: str
    namespace: str
    keepalive_seconds: float | None = None


class ForkedFleet(Fleet):
    """A `Fleet` of forked processes, each at an address of its own for as long as the fleet lives."""

    def __init__(self, folder: Path, places: Mapping[str, Place] | None = None) -> None:
        super().__init__(folder)
        self._ports: dict[str, int] = {}
        self._places = places or {}

    def address(self, name: str) -> str:
        """HOST:PORT of a service, before and after its starts."""
        port = self._ports.setdefault(name, _FIRST_PORT + 2 * len(self._ports))
        return f"{self._places[name].host if name in self._places else own_host()}:{port}"

    def launch(self, name: str, command: str, *flags: str, kill: KillPoint | None = None) -> None:
        """Starts `feddymem COMMAND FLAGS`, to die at a moment where one is given."""
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "address.json").unlink(missing_ok=True)
        self._logs[name] = folder / "log.jsonl"
        host, _, port = self.address(name).rpartition(":")
        arguments = [
            *(command, *flags, "--listen", f"{host}:{port}", "--metrics-listen", f"{host}:{int(port) + 1}"),
            *("--log-format", "json", "--threads", "1"),
            *(("--danger-listen-without-tls",) if name in self._places and "--tls-dir" not in flags else ()),
            *("--state-dir", str(folder / "state"), "--address-file", str(folder / "address.json")),
        ]
        process = _forks.Process(
            target=_run, args=(arguments, str(self._logs[name]), kill, self._places.get(name)), daemon=True
        )
        process.start()
        self._processes[name] = cast("subprocess.Popen[bytes]", _Forked(process))

    def ended(self) -> dict[str, int]:
        """Exit codes of the services that have ended, by name; negative: the signal that ended it."""
        codes = {name: process.poll() for name, process in self._processes.items()}
        return {name: code for name, code in codes.items() if code is not None}

    def running(self, name: str) -> bool:
        """Whether a service is there."""
        return name in self._processes and self._processes[name].poll() is None

    def process_id(self, name: str) -> int:
        """Of a service that runs."""
        return self._processes[name].pid

    def state(self, name: str) -> Path:
        """A service's state folder."""
        return self._folder / name / "state"

    def log(self, name: str) -> str:
        """What a service has logged, all its lives together."""
        return self._logs[name].read_text(errors="replace")


def own_host() -> str:
    """A loopback address that no other process uses: 127.0.0.0/8 has more of them than there are process ids."""
    number = os.getpid()
    return f"127.{number >> 16}.{number >> 8 & 255}.{number & 255}"


class _Forked:
    """What `Fleet` needs of a Popen."""

    def __init__(self, process: BaseProcess) -> None:
        assert process.pid is not None
        self._process, self.pid = process, process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("feddymem", timeout or 0)
        return self._process.exitcode


def _run(arguments: list[str], log: str, kill: KillPoint | None, place: Place | None) -> None:
    """In the new process: is `feddymem ARGUMENTS`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.environ["GOMP_SPINCOUNT"] = "10000"  # as `feddymem` has it
    for name in [name for name in os.environ if name.startswith("FEDDYMEM_")]:
        del os.environ[name]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    from services.cli.main import main as feddymem
    from services.runtime import arrays

    if place is not None:
        if place.namespace:
            enter(place.namespace)
        if place.keepalive_seconds is not None:
            _ping_every(place.keepalive_seconds)
    arrays.CHUNK_BYTES = _SMALL_CHUNK_BYTES
    if kill is not None:
        kill.arm()
    sys.argv = ["feddymem", *arguments]
    feddymem()


def _ping_every(seconds: float) -> None:
    """Shortens the keepalive, which no setting does."""
    from services.runtime import channels

    times = {
        "grpc.keepalive_time_ms": seconds,
        "grpc.keepalive_timeout_ms": seconds,
        "grpc.http2.min_ping_interval_without_data_ms": seconds / 2,
        "grpc.max_reconnect_backoff_ms": seconds,
    }
    for options in (channels.SERVER_OPTIONS, channels.CHANNEL_OPTIONS):
        options[:] = [(name, int(1000 * times[name]) if name in times else value) for name, value in options]
