"""One pod, in the care of what does here what a kubelet does: it starts, probes, restarts and ends the container."""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.deploy.arguments import network_arguments, pod_arguments
from tests.deploy.engine import LABEL, Engine, EngineError, call
from tests.deploy.manifest import PodSpec
from tests.deploy.probes import Prober
from tests.deploy.volumes import size

_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 10, 300
"""Pause before the second restart, and the longest; the first one is at once."""
_log = logging.getLogger(__name__)

_MEASURE_SECONDS = 10
"""Between two looks at what a pod has written."""


class Pod:
    """A pod; starts at once.

    Attributes:
        name: of the pod, and of its container.
        revision: of its workload's template, as it was when the pod was made.
        address: of the pod, the same for all its containers.
        ready: whether its Services may send it anything.
        ending: whether it has been told to end.
        restarts: how often its container has been started again.
        exits: exit codes of its containers that have ended, in order.
        wrongs: what a kubelet would have had to do by force.
        made: when, by `time.monotonic`.
        started: when its last container was started, by `time.monotonic`.
        became_ready: when it was ready the first time; None until then.
        log: file with what its containers have written.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        revision: str,
        spec: PodSpec,
        address: str,
        folders: Mapping[str, Path],
    ) -> None:
        self.name, self.revision, self.spec, self.address = name, revision, spec, address
        self.ready = self.ending = False
        self.restarts = 0
        self.exits: list[int] = []
        self.wrongs: list[str] = []
        self.made = self.started = time.monotonic()
        self.became_ready: float | None = None
        self.log = engine.folder / f"{name}.log"
        self._engine = engine
        self._folders = folders
        self._container = f"{LABEL}-{name}"
        self._told_to_end = threading.Event()
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()

    @property
    def labels(self) -> Mapping[str, str]:
        """What selectors see."""
        return self.spec.labels

    @property
    def gone(self) -> bool:
        """Whether nothing of it is left."""
        return not self._thread.is_alive()

    def delete(self) -> None:
        """Ends the pod as its deletion does: out of its Services at once, preStop, SIGTERM, in the end SIGKILL."""
        if not self.ending:
            self.ending, self.ready = True, False
            threading.Thread(target=self._end, name=f"{self.name} ends", daemon=True).start()

    def abandon(self) -> None:
        """Has nobody look after the pod any more: when its container ends, it stays so."""
        self.ending, self.ready = True, False
        self._told_to_end.set()

    def join(self, seconds: float) -> None:
        """Waits until nothing of it is left."""
        self._thread.join(seconds)

    def kill(self) -> None:
        """Kills the container's process, as the kernel does when memory is short."""
        self._engine.signal(self._container, "KILL")

    def inside(self, *command: str) -> str:
        """What a command prints in the pod."""
        return self._engine.inside(self._container, *command)

    def cut_off(self) -> None:
        """Lets nothing through to it or from it any more, until `reconnect`; its node still reaches it."""
        self._firewall("--append")

    def reconnect(self) -> None:
        """Takes `cut_off` back."""
        self._firewall("--delete")

    def _firewall(self, action: str) -> None:
        enter = ("nsenter", "--target", str(self._engine.pid(self._container)), "--net", "iptables", "--wait", action)
        node = self._engine.gateway
        call(*enter, "INPUT", "!", "--source", node, "!", "--in-interface", "lo", "--jump", "DROP")
        call(*enter, "OUTPUT", "!", "--destination", node, "!", "--out-interface", "lo", "--jump", "DROP")

    def _live(self) -> None:
        while not self.ending:
            try:
                self._run_container()
            except EngineError as error:
                self.wrongs.append(f"{self.name}: {error}")
            if not self.ending:
                self.restarts += 1
                pause = 0 if self.restarts == 1 else _BACKOFF_SECONDS * 2 ** (self.restarts - 2)
                self._told_to_end.wait(min(pause, _LONGEST_BACKOFF_SECONDS))

    def _run_container(self) -> None:
        network = network_arguments(self.address, self._engine.gateway)
        arguments = [*network, *pod_arguments(self.name, self.spec, self._folders)]
        self.started = time.monotonic()
        _log.info("%s: container starts at %s", self.name, self.address)
        process = self._engine.run(self._container, arguments, self.log)
        try:
            self._watch(process)
        finally:
            self.ready = False
            self.exits.append(process.wait())
            _log.info("%s: container ended with %d", self.name, self.exits[-1])
            self._engine.remove(self._container)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Probes until the container has ended, and ends it where that is what its probes are for."""
        startup, readiness, liveness = self._probers()
        measured = time.monotonic()
        while True:
            probers = [startup] if startup else [prober for prober in (readiness, liveness) if prober]
            prober = min(probers, key=lambda prober: prober.due, default=None)
            due = prober.due if prober else measured + _MEASURE_SECONDS
            if _ends(process, due - time.monotonic()):
                return
            if prober:
                prober.make()
                if prober.passed is False and prober is not readiness and not self.ending:
                    self._stop(f"its {'startup' if prober is startup else 'liveness'} probe failed", process)
                    return
            if startup and startup.passed:
                startup = None
            self._set_ready(not startup and (readiness is None or bool(readiness.passed)))
            if time.monotonic() > measured + _MEASURE_SECONDS:
                measured = time.monotonic()
                self._look_at_disk()

    def _probers(self) -> list[Prober | None]:
        container = self.spec.container
        probes = (container.startup, container.readiness, container.liveness)
        return [Prober(probe, self.address) if probe else None for probe in probes]

    def _set_ready(self, ready: bool) -> None:
        if ready != self.ready:
            _log.info("%s: %s", self.name, "ready" if ready else "not ready")
        self.ready = ready and not self.ending
        if self.ready and self.became_ready is None:
            self.became_ready = time.monotonic()

    def _look_at_disk(self) -> None:
        total = 0
        for name, volume in self.spec.volumes.items():
            if volume.kind == "emptyDir":
                used = size(self._folders[name])
                total += used
                if volume.limit is not None and used > volume.limit:
                    self._evict(f"volume {name} holds {used:,} bytes, more than its limit")
        limit = self.spec.container.storage
        if limit is not None and total > limit:
            self._evict(f"{total:,} bytes are on disk, more than the limit of ephemeral-storage")

    def _evict(self, why: str) -> None:
        self.wrongs.append(f"{self.name} evicted: {why}")
        self.delete()

    def _stop(self, why: str, process: subprocess.Popen[bytes]) -> None:
        """Has the container end, to be started again."""
        self.wrongs.append(f"{self.name} restarted: {why}")
        self._signal_and_wait(self.spec.grace_seconds, process.wait)

    def _end(self) -> None:
        started = time.monotonic()
        self._thread.join(self.spec.container.linger)
        self._told_to_end.set()
        self._signal_and_wait(started + self.spec.grace_seconds - time.monotonic(), self._joined)

    def _joined(self, timeout: float) -> None:
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise subprocess.TimeoutExpired(self.name, timeout)

    def _signal_and_wait(self, seconds: float, wait: Callable[[float], object]) -> None:
        self._engine.signal(self._container, "TERM")
        try:
            wait(seconds)
        except subprocess.TimeoutExpired:
            self.wrongs.append(f"{self.name} killed: it had not ended {seconds:.0f} s after SIGTERM")
            self._engine.signal(self._container, "KILL")


def _ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process ends within a time."""
    try:
        process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return False
    return True
