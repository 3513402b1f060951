"""What the harness understands of a manifest, and that it says so of what it does not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.arguments import pod_arguments
from tests.deploy.fields import WITHOUT_EFFECT, UnknownFieldError
from tests.deploy.manifest import Manifest, Probe, Volume, read
from tests.deploy.overlay import Overlay
from tests.k8s.manifests import K8S, Object, build, named

DEV = K8S / "overlays" / "dev"
INFERENCE = "inference-site-a"
FOLDERS = {name: Path("/volumes", name) for name in ("settings", "tmp", "cache", "state")}


@pytest.fixture
def objects() -> list[Object]:
    return build(DEV)


@pytest.fixture
def deployment(objects: list[Object]) -> Object:
    return named(objects, "Deployment")[INFERENCE]


@pytest.fixture
def manifest(objects: list[Object]) -> Manifest:
    return read(objects)


def test_all_of_dev_is_understood(manifest: Manifest) -> None:
    assert {(each.kind, name) for name, each in manifest.workloads.items()} == {
        ("Deployment", "inference-site-a"),
        ("Deployment", "inference-site-b"),
        ("StatefulSet", "aggregator"),
        ("StatefulSet", "edge-client-site-a"),
        ("StatefulSet", "edge-client-site-b"),
    }
    assert {name for name, service in manifest.services.items() if service.headless} == {
        "inference-site-a",
        "inference-site-b",
    }
    assert manifest.claims == {"edge-client-images-site-a", "edge-client-images-site-b"}


def test_what_a_kubelet_needs_is_read(manifest: Manifest) -> None:
    workload = manifest.workloads[INFERENCE]
    pod, container = workload.pod, workload.pod.container
    assert (workload.surge, workload.unavailable) == (1, 0)
    assert (pod.user, pod.group, pod.fs_group, pod.grace_seconds) == (10001, 10001, 10001, 40)
    assert container.linger == 5
    assert container.startup == Probe(7082, "liveness", 0, 2, 5, 90, 1)
    assert container.readiness == Probe(7082, "", 0, 5, 5, 3, 1)
    assert pod.volumes["state"] == Volume("emptyDir", limit=4 * 2**30)
    assert manifest.workloads["aggregator"].claims == ("state",)


def test_a_pod_becomes_arguments_of_podman(manifest: Manifest) -> None:
    arguments = pod_arguments("pod-1", manifest.workloads[INFERENCE].pod, FOLDERS)
    settings, image, command = arguments[:-4], arguments[-4], arguments[-3:]
    assert image == "feddymem:0.1.0"
    assert command == ["inference", "--config", "/etc/feddymem/inference.yaml"]
    pairs = set(pairwise(settings))
    assert pairs >= {
        ("--hostname", "pod-1"),
        ("--user", "10001:10001"),
        ("--group-add", "10001"),
        ("--cap-drop", "all"),
        ("--security-opt", "no-new-privileges"),
        ("--memory", str(2 * 2**30)),
        ("--memory-swap", str(2 * 2**30)),
        ("--cpus", "1"),
        ("--env", "FEDDYMEM_DANGER_LISTEN_WITHOUT_TLS=true"),
        ("--volume", "/volumes/settings:/etc/feddymem:ro"),
        ("--volume", "/volumes/state:/var/lib/feddymem:rw"),
    }
    assert {"--read-only", "--read-only-tmpfs=false"} <= set(settings)


def test_a_command_takes_the_place_of_the_entrypoint(objects: list[Object], deployment: Object) -> None:
    deployment["spec"]["template"]["spec"]["containers"][0] |= {"command": ["sh", "-c"], "args": ["true"]}
    arguments = pod_arguments("pod-1", read(objects).workloads[INFERENCE].pod, FOLDERS)
    assert arguments[arguments.index("--entrypoint") + 1] == "sh"
    assert arguments[-2:] == ["-c", "true"]


def container(deployment: Object) -> Any:
    return deployment["spec"]["template"]["spec"]["containers"][0]


def spec(deployment: Object) -> Any:
    return deployment["spec"]["template"]["spec"]


STRANGE: dict[str, Callable[[Object], object]] = {
    ".spec.minReadySeconds": lambda it: it["spec"].update(minReadySeconds=5),
    ".spec.strategy.type: Recreate": lambda it: it["spec"]["strategy"].update(type="Recreate"),
    ".rollingUpdate.maxSurge: 25%": lambda it: it["spec"]["strategy"]["rollingUpdate"].update(maxSurge="25%"),
    ".template.spec.hostNetwork": lambda it: spec(it).update(hostNetwork=True),
    ".template.spec.initContainers": lambda it: spec(it).update(initContainers=[]),
    ".template.spec.automountServiceAccountToken: None": lambda it: spec(it).pop("automountServiceAccountToken"),
    ".securityContext.runAsUser is 0": lambda it: spec(it)["securityContext"].update(runAsUser=0),
    ".seccompProfile.type: Unconfined": lambda it: spec(it)["securityContext"]["seccompProfile"].update(
        type="Unconfined"
    ),
    ".spec.containers: 2": lambda it: spec(it)["containers"].append(container(it)),
    ".volumes[tmp].emptyDir.medium": lambda it: spec(it)["volumes"][1]["emptyDir"].update(medium="Memory"),
    ".volumes[node] has a source": lambda it: spec(it)["volumes"].append({"name": "node", "hostPath": {"path": "/"}}),
    ".volumes[settings].configMap.items": lambda it: spec(it)["volumes"][0]["configMap"].update(items=[]),
    ".volumeMounts[tmp].subPath": lambda it: container(it)["volumeMounts"][2].update(subPath="part"),
    ".capabilities.add": lambda it: container(it)["securityContext"]["capabilities"].update(add=["NET_ADMIN"]),
    ".securityContext.allowPrivilegeEscalation: True": lambda it: container(it)["securityContext"].update(
        allowPrivilegeEscalation=True
    ),
    ".env[X].value is missing": lambda it: container(it)["env"].append({"name": "X", "valueFrom": {}}),
    ".env[X].value: $(HOME)": lambda it: container(it)["env"].append({"name": "X", "value": "$(HOME)/x"}),
    ".args: $(HOME)": lambda it: container(it)["args"].append("$(HOME)/x"),
    ".args: $$x": lambda it: container(it)["args"].append("$$x"),
    ".template.metadata.annotations": lambda it: it["spec"]["template"]["metadata"].update(annotations={"a": "b"}),
    ".template.metadata.namespace": lambda it: it["spec"]["template"]["metadata"].update(namespace="feddymem"),
    ".template mounts gone": lambda it: container(it)["volumeMounts"].append({"name": "gone", "mountPath": "/gone"}),
    ".imagePullPolicy": lambda it: container(it).update(imagePullPolicy="Never"),
    ".envFrom": lambda it: container(it).update(envFrom=[]),
    ".limits.nvidia.com/gpu": lambda it: container(it)["resources"]["limits"].update({"nvidia.com/gpu": "1"}),
    ".limits.memory: much": lambda it: container(it)["resources"]["limits"].update(memory="much"),
    ".livenessProbe.grpc.port is missing": lambda it: container(it).update(livenessProbe={"grpc": {}}),
    ".readinessProbe.httpGet": lambda it: container(it).update(
        readinessProbe={"grpc": {"port": 7082}, "httpGet": {"port": 1}}
    ),
    ".readinessProbe.grpc.port": lambda it: container(it).update(readinessProbe={"httpGet": {"port": 1}}),
    ".preStop.exec": lambda it: container(it)["lifecycle"]["preStop"].update(exec={"command": ["true"]}),
    ".preStop.sleep.seconds is missing": lambda it: container(it)["lifecycle"].update(preStop={"sleep": {}}),
    ".ports[grpc].hostPort": lambda it: container(it)["ports"][0].update(hostPort=7072),
    ".ports[grpc].protocol: UDP": lambda it: container(it)["ports"][0].update(protocol="UDP"),
    ".workingDir": lambda it: container(it).update(workingDir="/"),
}


@pytest.mark.parametrize("named_", STRANGE)
def test_what_is_not_understood_is_refused_by_name(objects: list[Object], deployment: Object, named_: str) -> None:
    STRANGE[named_](deployment)
    with pytest.raises(UnknownFieldError) as refused:
        read(objects)
    assert str(refused.value).startswith("Deployment/inference-site-a.spec")
    assert named_ in str(refused.value)


def test_kinds_and_services_that_are_not_understood_are_refused(objects: list[Object]) -> None:
    with pytest.raises(UnknownFieldError, match="Ingress/x"):
        read([*objects, {"kind": "Ingress", "metadata": {"name": "x"}}])
    named(objects, "Service")["aggregator"]["spec"]["type"] = "NodePort"
    with pytest.raises(UnknownFieldError, match=r"Service/aggregator\.spec\.type: NodePort"):
        read(objects)


def test_objects_of_another_version_or_namespace_are_refused(objects: list[Object], deployment: Object) -> None:
    deployment["metadata"]["namespace"] = "default"
    with pytest.raises(UnknownFieldError, match=r"Deployment/inference-site-a\.metadata\.namespace: default"):
        read(objects)
    deployment["apiVersion"] = "apps/v1beta1"
    with pytest.raises(UnknownFieldError, match=r"Deployment/inference-site-a\.apiVersion: apps/v1beta1"):
        read(objects)


@pytest.mark.parametrize("entry", WITHOUT_EFFECT)
def test_all_that_is_passed_over_is_in_dev(objects: list[Object], entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(WITHOUT_EFFECT, entry)
    with pytest.raises(UnknownFieldError):
        read(objects)


def test_an_overlay_can_be_given_another_image_settings_and_replicas(tmp_path: Path) -> None:
    overlay = Overlay(tmp_path / "k8s")
    before = read(overlay.build("localhost/feddymem:0.1.0"))
    overlay.set_rounds(7)
    overlay.replicas[INFERENCE] = 2
    after = read(overlay.build("localhost/feddymem:next"))
    assert after.workloads[INFERENCE].replicas == 2
    assert {each.pod.container.image for each in after.workloads.values()} == {"localhost/feddymem:next"}
    assert before.workloads["aggregator"].revision != after.workloads["aggregator"].revision
    settings = after.workloads["aggregator"].pod.volumes["settings"].source
    assert "rounds: 7" in after.settings[settings]["aggregator.yaml"]
