"""Whether pods are restricted, bounded, probed, and of this version."""

from __future__ import annotations

from collections.abc import Iterator

import feddymem
from tests.k8s.manifests import Object, amount, containers, pod, title, volumes, workloads

VERSION = feddymem.__version__
GPU = "nvidia.com/gpu"
PROBES = {"startupProbe": "liveness", "livenessProbe": "liveness", "readinessProbe": None}
"""And the name that each asks about."""
POD_CONTEXT = {"runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy", "seccompProfile"}
CONTAINER_CONTEXT = {"allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities"}
"""All that is said there; what a container says of itself would stand above what its pod says."""
PORT = {"name", "containerPort", "protocol"}
VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}


def pod_problems(objects: list[Object]) -> Iterator[str]:
    """What the restricted standard, a full node, or a rolling update would stumble over."""
    for workload in workloads(objects):
        found = [*_pod(pod(workload)), *_volumes(workload)]
        found += [problem for box in containers(workload) for problem in _container(box)]
        if workload["metadata"].get("labels", {}).get("app.kubernetes.io/version") != VERSION:
            found.append(f"is not labelled as version {VERSION}")
        yield from (f"{title(workload)}: {problem}" for problem in found)


def _pod(spec: Object) -> Iterator[str]:
    for key in ("enableServiceLinks", "automountServiceAccountToken"):
        if spec.get(key) is not False:
            yield f"{key} is not false"
    context = spec.get("securityContext", {})
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        yield "may run as root"
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "seccompProfile is not RuntimeDefault"
    for key in sorted(context.keys() - POD_CONTEXT):
        yield f"{key} of a pod is unknown to the checks"
    for key in sorted({"hostNetwork", "hostPID", "hostIPC"} & spec.keys()):
        yield f"{key} is set"


def _volumes(workload: Object) -> Iterator[str]:
    for name, volume in volumes(workload).items():
        for kind in sorted(volume.keys() - VOLUMES - {"name"}):
            yield f"volume {name} is a {kind}"


def _container(box: Object) -> Iterator[str]:
    context = box.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield "privileges may be escalated"
    if context.get("readOnlyRootFilesystem") is not True:
        yield "root filesystem is writable"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield "capabilities other than none"
    for key in sorted(context.keys() - CONTAINER_CONTEXT):
        yield f"{key} of a container is unknown to the checks"
    for key in sorted({key for port in box.get("ports", []) for key in port} - PORT):
        yield f"{key} of a port is unknown to the checks"
    if "envFrom" in box or any("valueFrom" in variable for variable in box.get("env", [])):
        yield "envFrom and valueFrom are unknown to the checks"
    yield from _resources(box)
    yield from _image(box)
    health = [port["containerPort"] for port in box.get("ports", []) if port["name"] == "health"]
    for probe, service in PROBES.items():
        call = box.get(probe, {}).get("grpc", {})
        if [call.get("port")] != health or call.get("service") != service:
            yield f"{probe} does not ask the health port for service {service}"


def _resources(box: Object) -> Iterator[str]:
    resources = box.get("resources", {})
    for key in ("cpu", "memory", "ephemeral-storage"):
        request, limit = (amount(resources.get(kind, {}).get(key)) for kind in ("requests", "limits"))
        if request is None or limit is None or request > limit:
            yield f"{key} needs a request and a limit not below it"


def _image(box: Object) -> Iterator[str]:
    gpus = box.get("resources", {}).get("limits", {}).get(GPU, 0)
    expected = "feddymem-cuda" if gpus else "feddymem"
    name, _, digest = box["image"].partition("@")
    name, _, tag = name.rpartition("/")[2].partition(":")
    if name != expected:
        yield f"image is {box['image']}, not a {expected}"
    if not digest and tag in ("", "latest"):
        yield f"image {box['image']} has no fixed tag"
