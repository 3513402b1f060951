"""A line that runs in the cluster, seen from the test."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.deploy import line
from tests.deploy.arguments import network_arguments, restrictions
from tests.deploy.cluster import Cluster
from tests.deploy.engine import LABEL, Engine

_USER = 20001
_STOP_SECONDS = 40
_ADDRESS = 6
"""Of the line, in the network; below those of pods."""


@dataclass(frozen=True)
class Inspection:
    """What became of one image."""

    image: str
    seconds: float
    score: float = 0
    release: int = 0
    error: str = ""


class Line:
    """A container that sends images to a Service for as long as the context lasts.

    Args:
        engine: runs it.
        cluster: whose Service it calls.
        image: container image, of the services.
        server: gRPC target, as of `InspectionClient`.
        site: whose line it is.
        pictures: folder with images.
        threads: images under way at once.
    """

    def __init__(
        self, engine: Engine, cluster: Cluster, image: str, server: str, site: str, pictures: Path, threads: int = 2
    ) -> None:
        self._engine, self._cluster = engine, cluster
        self._name = f"{LABEL}-line"
        self._output = engine.folder / "line.jsonl"
        self._output.unlink(missing_ok=True)
        address = str(engine.subnet[_ADDRESS])
        program = Path(line.__file__)
        self._arguments = [
            *network_arguments(address, engine.gateway), *restrictions(_USER, _USER), "--read-only",
            "--volume", f"{program}:/line.py:ro", "--volume", f"{pictures}:/pictures:ro", "--env", "HOME=/tmp",
            "--log-driver", "none", "--entrypoint", "python",
            image, "/line.py", server, site, "/pictures", str(threads),
        ]  # fmt: skip

    def __enter__(self) -> Self:
        self._process = self._engine.run(self._name, self._arguments, self._output)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.signal(self._name, "TERM")
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._engine.signal(self._name, "KILL")
        self._engine.remove(self._name)

    def inspections(self) -> list[Inspection]:
        """All that are done so far.

        Raises:
            AssertionError: it has ended, or printed something else.
        """
        text = self._output.read_text()
        lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
        try:
            return [Inspection(**json.loads(each)) for each in lines]
        except ValueError as error:
            raise AssertionError(text) from error

    def wait_for(self, more: int, seconds: float = 60) -> None:
        """Waits until so many more inspections are done, well or not."""
        goal = len(self.inspections()) + more
        self._cluster.wait(lambda: len(self.inspections()) >= goal, seconds, f"{goal} inspections")
