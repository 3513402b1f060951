"""A federation with a line, watched by a real Prometheus and a real Alertmanager: broken, and mended."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml

from feddymem.client.tls import channel_to
from feddymem.synthetic import write_products
from feddymem.v1.operator_pb2 import ActivateReleaseRequest
from feddymem.v1.operator_pb2_grpc import OperatorServiceStub
from services.cli.status import get_status
from services.demo.processes import FEDDYMEM, Fleet, RunningService
from services.demo.prometheus import MONITORING, Target, free_port, start_prometheus, write_targets
from tests.chaos.proxy import Proxy
from tests.integration.conftest import serves_image
from tests.monitoring.faster import faster
from tests.monitoring.line import Line
from tests.monitoring.servers import Notices, Prometheus, start_alertmanager

SITES = ("brick-hall", "dim-hall")
TOLD = {"InspectionErrors": "page", "SiteSilent": "ticket", "ReleaseStale": "ticket"}
"""Alerts that are made to happen, and Alertmanager's receiver of each."""
_FEDERATION = "bricks"
_SETTINGS = {
    "sites": list(SITES),
    "quorum": len(SITES),
    "keep_releases": 1000,
    "method": {"bank_items": 40, "memory_items": 60, "rounds": 10_000},
}
_IMAGES, _INPUT_SIZE = 8, 64
_PATIENCE_SECONDS = 300


class Stack:
    """All of it, on loopback; a context that ends it.

    Attributes:
        prometheus: that scrapes everything.
        alertmanager: HOST:PORT.
        started: when, in seconds since the epoch.
        fault: for as long as this file is there, the first replica cannot score.
    """

    def __init__(self, folder: Path, prometheus: str, alertmanager: str) -> None:
        self._folder, self._programs = folder, (prometheus, alertmanager)
        self.fault = folder / "fault"
        self._edges: dict[str, RunningService] = {}
        self._replicas: list[RunningService] = []
        self._opened, self._cable = ExitStack(), ExitStack()

    def __enter__(self) -> Self:
        with self._opened:
            self._opened.enter_context(self._cable)
            self._fleet = self._opened.enter_context(Fleet(self._folder / "services"))
            self._notices = self._opened.enter_context(Notices())
            self._start_watchers()
            self._start_services()
            images = sorted((self._folder / "products" / SITES[0] / "test").glob("*/*.png"))
            self._opened.enter_context(Line([replica.grpc for replica in self._replicas], images))
            self._opened = self._opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def _start_watchers(self) -> None:
        """The shipped Prometheus and Alertmanager, only faster; they find their targets and each other by files."""
        for name in ("prometheus.yaml", "rules.yaml"):
            (self._folder / name).write_text(faster((MONITORING / name).read_text()))
        prometheus, alertmanager = self._programs
        self.alertmanager = start_alertmanager(self._fleet, alertmanager, self._folder, self._notices.address)
        (self._folder / "alertmanagers.yaml").write_text(yaml.safe_dump([{"targets": [self.alertmanager]}]))
        self.prometheus = Prometheus(start_prometheus(self._fleet, prometheus, self._folder))
        self.started = time.time()

    def _start_services(self) -> None:
        """A federation, and two replicas of a line; the second reaches the aggregator by a proxy."""
        config = self._folder / "aggregator.yaml"
        config.write_text(yaml.safe_dump({"federations": {_FEDERATION: _SETTINGS}}))
        self._aggregator = self._fleet.start("aggregator", "aggregator", "--config", str(config))
        self._write_targets()
        write_products(self._folder / "products")
        for site in SITES:
            self._launch_edge(site)
        for site in SITES:
            self._edges[site] = self._fleet.wait_listening(f"edge-{site}")
        self._proxy_port = free_port()
        self._connect()
        fault = ("-m", "tests.monitoring.fault", "feddymem.scoring:Scorer.inspect_features", str(self.fault))
        self._launch_replica("inference-1", self._aggregator.grpc, (sys.executable, *fault))
        self._launch_replica("inference-2", self._proxy.address, FEDDYMEM)
        self._replicas = [self._fleet.wait_listening(name) for name in ("inference-1", "inference-2")]
        self._write_targets()
        self.wait(lambda: self._release() >= 3, "three releases")
        self.wait(self.all_up, "every target to be up")

    def _launch_edge(self, site: str) -> None:
        folder = self._folder / "images" / site
        if not folder.exists():
            folder.mkdir(parents=True)
            for image in sorted((self._folder / "products" / site / "train" / "good").iterdir())[:_IMAGES]:
                shutil.copy(image, folder)
        flags = ["--federation", _FEDERATION, "--site", site, "--aggregator", self._aggregator.grpc]
        where = ["--data", str(folder), "--input-size", str(_INPUT_SIZE), "--threads", "1"]
        self._fleet.launch(f"edge-{site}", "edge", *flags, *where, "--retry-seconds", "0.2")

    def _launch_replica(self, name: str, aggregator: str, program: tuple[str, ...]) -> None:
        edges = [flag for edge in self._edges.values() for flag in ("--edge-clients", edge.grpc)]
        # One call a second: those of the line that do not inspect are refused, so that a panel has something to show.
        flags = ["--aggregator", aggregator, *edges, "--retry-seconds", "0.2", "--max-rpcs-per-second", "1"]
        self._fleet.launch_with(program, name, "inference", *flags)

    def _write_targets(self) -> None:
        edges = [Target(edge.metrics, "edge-client", site) for site, edge in self._edges.items()]
        replicas = [Target(replica.metrics, "inference", SITES[0]) for replica in self._replicas]
        write_targets(self._folder, [Target(self._aggregator.metrics, "aggregator"), *edges, *replicas])

    def _connect(self) -> None:
        """Lets the second replica reach the aggregator."""
        self._proxy = self._cable.enter_context(Proxy(self._aggregator.grpc, self._proxy_port))

    def _release(self) -> int:
        return int(get_status(self._aggregator.grpc, _FEDERATION).federations[0].release)

    def _activate(self, version: int) -> None:
        """As `feddymem release activate`; it stays active while rounds go on."""
        with channel_to(self._aggregator.grpc, [], None) as channel:
            request = ActivateReleaseRequest(federation=_FEDERATION, version=version)
            OperatorServiceStub(channel).ActivateRelease(request, timeout=30)

    def _serves(self, replica: RunningService, version: int) -> bool:
        image = next((self._folder / "images" / SITES[0]).iterdir())
        return serves_image(replica, SITES[0], image, version)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Waits until a condition holds, for as long as every process is alive.

        Raises:
            ServiceFailedError: one ended, or the time is up.
        """
        self._fleet.wait_until(condition, _PATIENCE_SECONDS, what)

    def all_up(self) -> bool:
        """Whether Prometheus scrapes all processes that run."""
        services = (self._aggregator, *self._edges.values(), *self._replicas)
        up = {target["labels"]["instance"] for target in self.prometheus.targets() if target["health"] == "up"}
        return up == {service.metrics for service in services}

    def break_all(self) -> None:
        """One edge client is killed; one replica misses a release, the other one fails."""
        self._fleet.kill(f"edge-{SITES[1]}")
        newest = self._release()
        self._activate(newest - 1)
        for replica in self._replicas:
            self.wait(lambda replica=replica: self._serves(replica, newest - 1), "both replicas to go back")  # type: ignore[misc]
        self._cable.close()
        self._activate(newest)
        self.wait(lambda: self._serves(self._replicas[0], newest), "a replica to have the release")
        self.fault.touch()

    def mend_all(self) -> None:
        """All of it is taken back."""
        self.fault.unlink()
        self._connect()
        site = SITES[1]
        self._launch_edge(site)
        self._edges[site] = self._fleet.wait_listening(f"edge-{site}")
        self._write_targets()

    def told(self, status: str) -> bool:
        """Whether receivers have been told of all alerts in `TOLD` that they are `firing`, or `resolved`."""
        return all(self._notices.told(receiver, alert, status) for alert, receiver in TOLD.items())
