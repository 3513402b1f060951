"""Starting services as processes of their own, and leaving none behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

FEDDYMEM = (sys.executable, "-m", "services.cli")
_STOP_SECONDS = 30
"""Time for a service to drain after SIGTERM before it is killed."""
_POLL_SECONDS = 0.1


class ServiceFailedError(RuntimeError):
    """A service ended, or did not come up in time; the text has the end of its log."""


@dataclass(frozen=True, eq=False)
class RunningService:
    """One service process.

    Attributes:
        name: for messages.
        process: the process.
        grpc: HOST:PORT of its gRPC server.
        metrics: HOST:PORT of its /metrics.
        log: file with its log lines.
    """

    name: str
    process: subprocess.Popen[bytes]
    grpc: str
    metrics: str
    log: Path


class Fleet:
    """Service processes on loopback, on ports that the system picks; a context that ends them all when it is left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._logs: dict[str, Path] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def launch(self, name: str, command: str, *flags: str) -> None:
        """Starts `feddymem COMMAND FLAGS`; `wait_listening` waits until it listens."""
        self.launch_with(FEDDYMEM, name, command, *flags)

    def launch_with(self, program: Sequence[str], name: str, command: str, *flags: str) -> None:
        """As `launch`, with a program that takes `feddymem`'s place."""
        folder = self._folder / name
        (folder / "address.json").unlink(missing_ok=True)
        self.launch_program(
            name,
            *(*program, command, *flags),
            *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--log-format", "json"),
            *("--state-dir", str(folder / "state"), "--address-file", str(folder / "address.json")),
        )

    def launch_program(self, name: str, *command: str) -> None:
        """Starts any program as one of the fleet."""
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        self._logs[name] = folder / "log.jsonl"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDDYMEM_")}
        with self._logs[name].open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*_ended_with_this_process(), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )

    def wait_listening(self, name: str, seconds: float = 120) -> RunningService:
        """Waits until a service listens.

        Raises:
            ServiceFailedError: it ended, or the time is up.
        """
        file = self._folder / name / "address.json"
        self.wait_until(file.exists, seconds, f"{name} to listen")
        address = json.loads(file.read_text())
        return RunningService(name, self._processes[name], address["grpc"], address["metrics"], self._logs[name])

    def start(self, name: str, command: str, *flags: str) -> RunningService:
        """Starts a service and waits until it listens."""
        self.launch(name, command, *flags)
        return self.wait_listening(name)

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Waits until a condition holds, for as long as every service is alive.

        Raises:
            ServiceFailedError: a service ended, or the time is up.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            self.check_alive()
            if time.monotonic() > deadline:
                raise ServiceFailedError(f"waited {seconds:.0f} seconds for {what}")
            time.sleep(_POLL_SECONDS)

    def check_alive(self) -> None:
        """Checks that no service has ended.

        Raises:
            ServiceFailedError: names the first that has, with the end of its log.
        """
        for name, process in self._processes.items():
            if process.poll() is not None:
                tail = self._logs[name].read_text(errors="replace")[-2000:]
                raise ServiceFailedError(f"{name} ended with exit code {process.returncode}:\n{tail}")

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Sends one service a signal and waits until it has ended; its exit code."""
        process = self._processes.pop(name)
        process.send_signal(number)
        return process.wait(_STOP_SECONDS)

    def stop(self) -> None:
        """Ends all services: SIGTERM, and SIGKILL for what does not listen to it. Safe to call twice."""
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for process in self._processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()


def _ended_with_this_process() -> list[str]:
    """Prefix that has the kernel end the child when this process dies, even by SIGKILL; util-linux, so Linux only."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []
