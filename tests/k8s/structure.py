"""Whether objects fit together: names, selectors, references, volumes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.k8s.manifests import (
    COMPONENT,
    WORKLOADS,
    Object,
    amount,
    containers,
    named,
    of_kind,
    pod,
    pod_labels,
    ports,
    selected,
    served,
    title,
    volumes,
    workloads,
)

NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
KINDS = {
    *WORKLOADS,
    "Certificate",
    "ConfigMap",
    "HorizontalPodAutoscaler",
    "Issuer",
    "Namespace",
    "NetworkPolicy",
    "PersistentVolumeClaim",
    "PodDisruptionBudget",
    "PodMonitor",
    "PrometheusRule",
    "Service",
    "ServiceAccount",
}
"""What these checks are about; anything else might undo what they hold."""


def kind_problems(objects: list[Object]) -> Iterator[str]:
    """Objects that no check looks at."""
    yield from (f"{title(item)}: is of a kind unknown to these checks" for item in objects if item["kind"] not in KINDS)


def name_problems(objects: list[Object]) -> Iterator[str]:
    """Names and labels that Kubernetes would refuse, and objects of other namespaces."""
    titles = [title(item) for item in objects]
    yield from (f"{each}: is there twice" for each in sorted({t for t in titles if titles.count(t) > 1}))
    for item in objects:
        # The hash that a controller appends to the name has to fit into a label of 63 characters.
        longest = 52 if item["kind"] in WORKLOADS else 63
        name = item["metadata"]["name"]
        if not NAME.fullmatch(name) or len(name) > longest:
            yield f"{title(item)}: bad name"
        for key, value in item["metadata"].get("labels", {}).items():
            if not LABEL.fullmatch(value) or len(value) > 63:
                yield f"{title(item)}: bad label {key}: {value}"
    yield from _namespaces(objects)


def _namespaces(objects: list[Object]) -> Iterator[str]:
    own = of_kind(objects, "Namespace")
    if len(own) != 1:
        yield f"{len(own)} namespaces instead of one"
        return
    if own[0]["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
        yield f"{title(own[0])}: does not hold its pods to the restricted standard"
    for item in objects:
        if item["kind"] != "Namespace" and item["metadata"].get("namespace") != own[0]["metadata"]["name"]:
            yield f"{title(item)}: is not in the namespace {own[0]['metadata']['name']}"


def selector_problems(objects: list[Object]) -> Iterator[str]:
    """Selectors and ports that miss their pods."""
    for workload in workloads(objects):
        if selected(objects, workload["spec"]["selector"]) != [workload]:
            yield f"{title(workload)}: selector matches other pods than its own"
        for constraint in pod(workload).get("topologySpreadConstraints", []):
            if selected(objects, constraint.get("labelSelector", {})) != [workload]:
                yield f"{title(workload)}: spreads other pods than its own over {constraint['topologyKey']}"
    for service in of_kind(objects, "Service"):
        behind = served(objects, service)
        if len(behind) != 1:
            yield f"{title(service)}: selects the pods of {len(behind)} workloads"
            continue
        for port in service["spec"]["ports"]:
            if port.get("targetPort") not in ports(behind[0]):
                yield f"{title(service)}: target port {port.get('targetPort')} is no named port of {title(behind[0])}"


def service_problems(objects: list[Object]) -> Iterator[str]:
    """Services that send calls to pods that cannot take them, or to always the same."""
    headless = []
    for service in of_kind(objects, "Service"):
        if service["spec"].get("publishNotReadyAddresses"):
            yield f"{title(service)}: is for pods that are not ready, too"
        if service["spec"].get("clusterIP") == "None":
            headless += served(objects, service)
    for workload in workloads(objects):
        if pod_labels(workload).get(COMPONENT) == "inference" and workload not in headless:
            yield f"{title(workload)}: has no headless Service, and so a line calls always the same pod"


def reference_problems(objects: list[Object]) -> Iterator[str]:
    """Things that pods need and that are not there."""
    titles = {title(item) for item in objects}
    made = {f"Secret/{item['spec']['secretName']}" for item in of_kind(objects, "Certificate")}
    for workload in workloads(objects):
        wanted = [f"Service/{workload['spec']['serviceName']}"] if "serviceName" in workload["spec"] else []
        wanted += _wanted(workload)
        yield from (f"{title(workload)}: {each} does not exist" for each in wanted if each not in titles | made)
        claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        mounted = {mount["name"] for box in containers(workload) for mount in box.get("volumeMounts", [])}
        for name in sorted(mounted ^ (volumes(workload).keys() | claims)):
            yield f"{title(workload)}: volume {name} is mounted but not there, or there but not mounted"


def _wanted(workload: Object) -> Iterator[str]:
    for volume in volumes(workload).values():
        if "configMap" in volume:
            yield f"ConfigMap/{volume['configMap']['name']}"
        if "secret" in volume:
            yield f"Secret/{volume['secret']['secretName']}"
        if "persistentVolumeClaim" in volume:
            yield f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}"


def account_problems(objects: list[Object]) -> Iterator[str]:
    """ServiceAccounts that are not there, have tokens, or are not of one workload alone."""
    accounts = named(objects, "ServiceAccount")
    used = [pod(workload).get("serviceAccountName", "default") for workload in workloads(objects)]
    for name in sorted(set(used)):
        if name not in accounts:
            yield f"ServiceAccount/{name} does not exist"
        if used.count(name) > 1:
            yield f"ServiceAccount/{name} is that of {used.count(name)} workloads"
    for name, account in accounts.items():
        if account.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount/{name}: mounts a token"
        if name not in used:
            yield f"ServiceAccount/{name}: nobody uses it"


def quantity_problems(objects: list[Object]) -> Iterator[str]:
    """Sizes that mean nothing, and volumes that may take more than their pod."""
    claims = [(title(item), item) for item in of_kind(objects, "PersistentVolumeClaim")]
    claims += [
        (f"{title(workload)}: claim {claim['metadata']['name']}", claim)
        for workload in workloads(objects)
        for claim in workload["spec"].get("volumeClaimTemplates", [])
    ]
    for name, claim in claims:
        if not amount(claim["spec"]["resources"]["requests"].get("storage")):
            yield f"{name}: requests no storage"
    for workload in workloads(objects):
        sizes = [each["emptyDir"].get("sizeLimit") for each in volumes(workload).values() if "emptyDir" in each]
        most = sum(
            amount(box.get("resources", {}).get("limits", {}).get("ephemeral-storage")) or 0
            for box in containers(workload)
        )
        if not all(map(amount, sizes)):
            yield f"{title(workload)}: an emptyDir has no size"
        elif sum(amount(size) or 0 for size in sizes) > most:
            yield f"{title(workload)}: its emptyDirs may become larger than its limit of ephemeral-storage"
