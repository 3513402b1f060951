"""What controllers and kubelet decide, with pods that are none."""

from __future__ import annotations

import dataclasses
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from tests.deploy.cluster import _deployment, _stateful_set
from tests.deploy.manifest import Probe, Workload, read
from tests.deploy.overlay import DEV
from tests.deploy.probes import Prober
from tests.deploy.volumes import Volumes, size
from tests.k8s.manifests import K8S, build


class FakePod:
    """As much of a pod as controllers look at."""

    def __init__(self, name: str, revision: str, made: int = 0, ready: bool = True) -> None:
        self.name, self.revision, self.made, self.ready = name, revision, made, ready
        self.ending = False

    def delete(self) -> None:
        self.ending, self.ready = True, False


class Step:
    """Pods before and after what a controller does at once."""

    def __init__(self, *pods: FakePod) -> None:
        self.pods = list(pods)

    def take(self, controller: Any, workload: Workload) -> tuple[list[str], list[str]]:
        """Names of the pods that it makes, and of those that it deletes."""
        before = [pod for pod in self.pods if pod.ending]
        made: list[str] = []

        def make(workload: Workload, ordinal: int | None = None) -> None:
            made.append("new" if ordinal is None else f"{workload.name}-{ordinal}")

        controller(workload, self.pods, make)
        return made, [pod.name for pod in self.pods if pod.ending and pod not in before]


@pytest.fixture(scope="module")
def workloads() -> dict[str, Workload]:
    return read(build(K8S / DEV)).workloads


@pytest.fixture
def inference(workloads: dict[str, Workload]) -> Workload:
    return dataclasses.replace(workloads["inference-site-a"], replicas=2, revision="new")


@pytest.fixture
def aggregator(workloads: dict[str, Workload]) -> Workload:
    return dataclasses.replace(workloads["aggregator"], replicas=2, revision="new")


def test_a_deployment_makes_the_pods_that_are_missing(inference: Workload) -> None:
    assert Step().take(_deployment, inference) == (["new", "new"], [])
    assert Step(FakePod("a", "new"), FakePod("b", "new")).take(_deployment, inference) == ([], [])


def test_a_deployment_scales_down_by_whom_nobody_needs(inference: Workload) -> None:
    old, young, unready = FakePod("a", "new", 1), FakePod("b", "new", 2), FakePod("c", "new", 0, ready=False)
    made, deleted = Step(old, young, unready).take(_deployment, dataclasses.replace(inference, replicas=1))
    assert (made, set(deleted)) == ([], {"b", "c"})


def test_a_rolling_update_adds_before_it_takes(inference: Workload) -> None:
    first, second = FakePod("a", "old"), FakePod("b", "old")
    assert Step(first, second).take(_deployment, inference) == (["new"], [])
    starting = FakePod("c", "new", ready=False)
    assert Step(first, second, starting).take(_deployment, inference) == ([], [])
    starting.ready = True
    assert Step(first, second, starting).take(_deployment, inference) == ([], ["a"])
    # A pod that ends does not hold up the next one.
    assert Step(first, second, starting).take(_deployment, inference) == (["new"], [])


def test_a_rolling_update_may_do_without_some(inference: Workload) -> None:
    careless = dataclasses.replace(inference, surge=0, unavailable=1)
    assert Step(FakePod("a", "old"), FakePod("b", "old")).take(_deployment, careless) == ([], ["a"])


def test_a_stateful_set_goes_on_when_the_one_before_is_ready(aggregator: Workload) -> None:
    first = FakePod("aggregator-0", "new", ready=False)
    assert Step().take(_stateful_set, aggregator) == (["aggregator-0"], [])
    assert Step(first).take(_stateful_set, aggregator) == ([], [])
    first.ready = True
    assert Step(first).take(_stateful_set, aggregator) == (["aggregator-1"], [])


def test_a_stateful_set_is_updated_backwards_and_never_has_two_of_a_name(aggregator: Workload) -> None:
    first, second = FakePod("aggregator-0", "old"), FakePod("aggregator-1", "old")
    assert Step(first, second).take(_stateful_set, aggregator) == ([], ["aggregator-1"])
    assert Step(first, second).take(_stateful_set, aggregator) == ([], [])
    assert Step(first).take(_stateful_set, aggregator) == (["aggregator-1"], [])


def test_a_probe_decides_by_its_thresholds() -> None:
    servicer = health.HealthServicer()
    server = grpc.server(ThreadPoolExecutor(1))
    add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        prober = Prober(Probe(port, "", 0, 1, 5, failures=2, successes=1), "127.0.0.1")
        seen = []
        for status in ("NOT_SERVING", "SERVING", "NOT_SERVING", "NOT_SERVING", "SERVING"):
            servicer.set("", HealthCheckResponse.ServingStatus.Value(status))
            prober.make()
            seen.append(prober.passed)
        assert seen == [None, True, True, False, True]
    finally:
        server.stop(None).wait()


def test_nobody_at_the_port_is_a_failure() -> None:
    prober = Prober(Probe(1, "", 0, 1, 1, failures=1, successes=1), "127.0.0.1")
    prober.make()
    assert prober.passed is False


def test_volumes_are_the_groups_and_new_for_each_pod(tmp_path: Path, workloads: dict[str, Workload]) -> None:
    spec = workloads["inference-site-a"].pod
    volumes = Volumes(tmp_path)
    volumes.know({spec.volumes["settings"].source: {"inference.yaml": "device: auto"}})
    folders = volumes.of_pod("pod", spec, {"more": "more-pod-0"})
    assert (folders["settings"] / "inference.yaml").read_text() == "device: auto"
    for name in ("state", "more"):
        assert stat.S_IMODE(folders[name].stat().st_mode) & 0o2070 == 0o2070
        assert folders[name].stat().st_gid == spec.fs_group
    assert not (folders["settings"].stat().st_mode | (folders["settings"] / "inference.yaml").stat().st_mode) & 0o020
    (folders["state"] / "release").write_bytes(bytes(5000))
    assert size(folders["state"]) >= 5000
    again = volumes.of_pod("pod", spec, {"more": "more-pod-0"})
    assert list(again["state"].iterdir()) == []
    assert again["more"] == folders["more"]
