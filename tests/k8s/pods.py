"""Whether pods are restricted, bounded, probed, and of this version."""

from __future__ import annotations

import re
from collections.abc import Iterator

import feddymem
from tests.k8s.manifests import Object, amount, containers, pod, title, volumes, workloads

VERSION = feddymem.__version__
PROBES = {"startupProbe": "liveness", "livenessProbe": "liveness", "readinessProbe": None}
"""And the name that each asks about."""
VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
IMAGE = re.compile(r"[^:@]+(:\d+/[^:@]+)?(:(?!latest$)[\w.-]+|(:[\w.-]+)?@sha256:[0-9a-f]{64})")
"""With a tag that stays what it is, or a digest."""

# Fields that these checks know; any other one might undo what they hold.
POD = {
    "affinity",
    "automountServiceAccountToken",
    "containers",
    "enableServiceLinks",
    # Whether these Secrets are there cannot be told: a password of a registry is never among the manifests.
    "imagePullSecrets",
    "nodeSelector",
    "priorityClassName",
    "runtimeClassName",
    "securityContext",
    "serviceAccountName",
    "terminationGracePeriodSeconds",
    "tolerations",
    "topologySpreadConstraints",
    "volumes",
}
POD_SECURITY = {"fsGroup", "fsGroupChangePolicy", "runAsGroup", "runAsNonRoot", "runAsUser", "seccompProfile"}
CONTAINER = {
    "args",
    "env",
    "image",
    "imagePullPolicy",
    "lifecycle",
    "name",
    "ports",
    "resources",
    "securityContext",
    "volumeMounts",
    *PROBES,
}
SECURITY = {"allowPrivilegeEscalation", "capabilities", "readOnlyRootFilesystem"}
PORT = {"containerPort", "name", "protocol"}
VARIABLE = {"name", "value"}


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
    yield from _unknown(spec, POD)
    yield from _unknown(context, POD_SECURITY)


def _unknown(fields: Object, known: set[str]) -> Iterator[str]:
    yield from (f"{key} is unknown to these checks" for key in sorted(fields.keys() - known))


def _volumes(workload: Object) -> Iterator[str]:
    for name, volume in volumes(workload).items():
        for kind in sorted(volume.keys() - VOLUMES - {"name"}):
            yield f"volume {name} is a {kind}"


def _container(box: Object) -> Iterator[str]:
    context = box.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False:
        yield "privileges may be escalated"
    if context.get("readOnlyRootFilesystem") is not True:
        yield "root filesystem is writable"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield "capabilities other than none"
    yield from _unknown(box, CONTAINER)
    yield from _unknown(context, SECURITY)
    for port in box.get("ports", []):
        yield from _unknown(port, PORT)
    # Variables in variables and arguments, which the kubelet would fill in.
    if any("$(" in text for text in [*box.get("args", []), *(each.get("value", "") for each in box.get("env", []))]):
        yield "$( is unknown to these checks"
    for variable in box.get("env", []):
        yield from (f"{variable['name']}: {problem}" for problem in _unknown(variable, VARIABLE))
    yield from _resources(box)
    if not IMAGE.fullmatch(box["image"]):
        yield f"image {box['image']} has neither a fixed tag nor a digest"
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
