"""A cluster of one node: what `kubectl apply` does to it, and what controllers make of that."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.deploy.engine import Engine, remove_containers
from tests.deploy.manifest import Manifest, Service, Workload, read
from tests.deploy.pod import Pod
from tests.deploy.services import Services, matching
from tests.deploy.volumes import Volumes
from tests.k8s.manifests import Object

PUBLISH_SECONDS = 1
"""Until Services know that a pod is ready, or is no more; in a real cluster it takes about as long."""
_RECONCILE_SECONDS = 0.2
_POLL_SECONDS = 0.1
_END_SECONDS = 30
_CRASHES = 4
"""Restarts of a pod after which there is no more waiting."""


class Cluster:
    """Pods, Services and volumes; a context. What it does, it does in the background: see `wait`.

    Attributes:
        pods: all that there have been, in the order of their making.
    """

    def __init__(self, engine: Engine) -> None:
        self.pods: list[Pod] = []
        self.volumes = Volumes(engine.folder)
        self._engine = engine
        self._manifest = Manifest()
        self._services = Services(engine.gateway, self._behind)
        self._published: list[Pod] = []
        self._addresses = map(str, itertools.islice(engine.subnet.hosts(), 9, 199))
        self._own_addresses = map(str, itertools.islice(engine.subnet.hosts(), 199, None))
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._of: dict[str, str] = {}
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        self._services.__enter__()
        self._thread = threading.Thread(target=self._control, name="controllers", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        for pod in self.pods:
            pod.abandon()
        remove_containers()
        for pod in self.pods:
            pod.join(_END_SECONDS)
        self._services.__exit__(kind, error, trace)

    def apply(self, objects: list[Object]) -> None:
        """Has the cluster become what a build says; workloads that it does not have are left alone.

        Raises:
            UnknownFieldError: a field is not understood.
        """
        wanted = read(objects)
        self.volumes.know(wanted.settings)
        for claim in wanted.claims:
            self.volumes.claim(claim)
        for service in wanted.services.values():
            if service.name not in self._manifest.services:
                self._add(service)
        with self._lock:
            self._manifest.workloads.update(wanted.workloads)

    def scale(self, workload: str, replicas: int) -> None:
        """Sets how many pods a workload has."""
        with self._lock:
            known = self._manifest.workloads
            known[workload] = dataclasses.replace(known[workload], replicas=replicas)

    def pods_of(self, workload: str) -> list[Pod]:
        """The pods of a workload that have not been told to end."""
        return [pod for pod in self._present(workload) if not pod.ending]

    def settled(self) -> bool:
        """Whether all workloads have the pods that they should, and Services know of them and of no others."""
        with self._lock:
            workloads = list(self._manifest.workloads.values())
            present = {workload.name: self._present(workload.name) for workload in workloads}
            return self._published == [pod for pod in self.pods if pod.ready] and all(
                len(present[workload.name]) == workload.replicas
                and all(pod.ready and pod.revision == workload.revision for pod in present[workload.name])
                for workload in workloads
            )

    def published(self, service: str) -> list[str]:
        """The addresses that callers of a Service get from DNS."""
        return self._services.resolve(f"{service}.feddymem.svc.cluster.local") or []

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> float:
        """Waits until something is so; how long that was, in seconds.

        Raises:
            TimeoutError: it did not come to be; names what pods there are.
        """
        started = time.monotonic()
        while not condition():
            if self._error:
                raise self._error
            crashing = any(pod.restarts >= _CRASHES for pod in self.pods if not pod.gone)
            if crashing or time.monotonic() > started + seconds:
                raise TimeoutError(f"{what}: not after {time.monotonic() - started:.0f} s\n{self.state()}")
            time.sleep(_POLL_SECONDS)
        return time.monotonic() - started

    def wrongs(self) -> list[str]:
        """What had to be done by force to any pod, ever."""
        return [wrong for pod in self.pods for wrong in pod.wrongs]

    def state(self) -> str:
        """All pods that there are, and the last lines of their logs."""
        lines = []
        for pod in self.pods:
            if not pod.gone:
                state = "ending" if pod.ending else "ready" if pod.ready else "not ready"
                lines.append(f"{pod.name} {pod.address}: {state}, {pod.restarts} restarts, exits {pod.exits}")
                lines += [f"    {line}" for line in _tail(pod.log)]
        return "\n".join([*lines, *self.wrongs()])

    def _add(self, service: Service) -> None:
        address = ""
        if not service.headless:
            address = next(self._own_addresses)
            self._engine.add_address(address)
        self._services.add(service, address)
        self._manifest.services[service.name] = service

    def _behind(self, service: Service) -> list[tuple[str, dict[str, int]]]:
        pods: list[Pod] = matching(service, self._published)
        return [(pod.address, dict(pod.spec.container.ports)) for pod in pods]

    def _present(self, workload: str) -> list[Pod]:
        return [pod for pod in self.pods if self._of[pod.name] == workload and not pod.gone]

    def _control(self) -> None:
        published = 0.0
        try:
            while not self._stop.wait(_RECONCILE_SECONDS):
                with self._lock:
                    for workload in self._manifest.workloads.values():
                        reconcile = _deployment if workload.kind == "Deployment" else _stateful_set
                        reconcile(workload, self._present(workload.name), self._make)
                if time.monotonic() > published + PUBLISH_SECONDS:
                    published = time.monotonic()
                    self._published = [pod for pod in self.pods if pod.ready]
        except Exception as error:  # noqa: BLE001 - told to whoever waits
            self._error = error

    def _make(self, workload: Workload, ordinal: int | None = None) -> None:
        suffix = secrets.token_hex(3) if ordinal is None else str(ordinal)
        revision = f"{workload.revision}-" if ordinal is None else ""
        name = f"{workload.name}-{revision}{suffix}"
        claims = {template: f"{template}-{name}" for template in workload.claims}
        folders = self.volumes.of_pod(name, workload.pod, claims)
        self._of[name] = workload.name
        pod = Pod(self._engine, name, workload.revision, workload.pod, next(self._addresses), folders)
        self.pods.append(pod)


Make = Callable[..., None]
"""Makes a pod of a workload, with an ordinal for a StatefulSet."""


def _deployment(workload: Workload, present: list[Pod], make: Make) -> None:
    """One step of a rolling update, or of scaling; pods that end do not count."""
    pods = [pod for pod in present if not pod.ending]
    new = [pod for pod in pods if pod.revision == workload.revision]
    old = [pod for pod in pods if pod.revision != workload.revision]
    room = workload.replicas + (workload.surge if old else 0) - len(pods)
    for _ in range(min(room, workload.replicas - len(new))):
        make(workload)
    # Those that are of no use to anybody first, then the youngest.
    for pod in sorted(new, key=lambda pod: (pod.ready, -pod.made))[: max(len(new) - workload.replicas, 0)]:
        pod.delete()
    spare = sum(pod.ready for pod in pods) - (workload.replicas - workload.unavailable)
    for pod in sorted(old, key=lambda pod: pod.ready):
        if not pod.ready:
            pod.delete()
        elif spare > 0:
            spare -= 1
            pod.delete()


def _stateful_set(workload: Workload, present: list[Pod], make: Make) -> None:
    """One step, of one pod at a time, in order; an update goes backwards."""
    by_ordinal = {int(pod.name.rpartition("-")[2]): pod for pod in present}
    for ordinal in range(workload.replicas):
        pod = by_ordinal.get(ordinal)
        if pod is None:
            make(workload, ordinal)
            return
        if not pod.ready:
            return
    for ordinal in sorted(by_ordinal, reverse=True):
        if ordinal >= workload.replicas or by_ordinal[ordinal].revision != workload.revision:
            by_ordinal[ordinal].delete()
            return


def _tail(log: Path, lines: int = 8) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []
