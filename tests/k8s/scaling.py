"""Whether there are as many pods as there may be; whether budgets, autoscalers and monitors find what they are for."""

from __future__ import annotations

from collections.abc import Iterator

import prometheus_client

import services.inference.metrics  # noqa: F401 - registers its metrics
from tests.k8s.manifests import (
    COMPONENT,
    Object,
    amount,
    containers,
    named,
    of_kind,
    pod_labels,
    ports,
    selected,
    title,
    workloads,
)

ALONE = {"aggregator", "edge-client"}
"""Each the only writer of its state."""


def replica_problems(objects: list[Object]) -> Iterator[str]:
    """More than one pod, or none, where exactly one may write."""
    for workload in workloads(objects):
        if pod_labels(workload).get(COMPONENT) in ALONE and workload["spec"].get("replicas", 1) != 1:
            yield f"{title(workload)}: has {workload['spec']['replicas']} pods, and one alone writes its state"


def _fewest(objects: list[Object], workload: Object) -> int:
    """How many pods a workload may come down to by itself."""
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        reference = scaler["spec"]["scaleTargetRef"]
        if (reference["kind"], reference["name"]) == (workload["kind"], workload["metadata"]["name"]):
            return int(scaler["spec"].get("minReplicas", 1))
    return int(workload["spec"].get("replicas", 1))


def budget_problems(objects: list[Object]) -> Iterator[str]:
    """Disruption budgets that protect nothing, or keep nodes from being drained."""
    protected = []
    for budget in of_kind(objects, "PodDisruptionBudget"):
        found = selected(objects, budget["spec"].get("selector", {}))
        protected += found
        if len(found) != 1:
            yield f"{title(budget)}: is for the pods of {len(found)} workloads"
        gone = amount(budget["spec"].get("maxUnavailable"))
        if not gone:
            yield f"{title(budget)}: no pod may ever be evicted, or not a number of them"
        elif any(1 < _fewest(objects, workload) <= gone for workload in found):
            yield f"{title(budget)}: all pods may be evicted at once"
    for workload in of_kind(objects, "Deployment"):
        if workload not in protected:
            yield f"{title(workload)}: has no disruption budget"


def autoscaler_problems(objects: list[Object]) -> Iterator[str]:
    """Autoscalers whose target or metrics are not there."""
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        reference = scaler["spec"]["scaleTargetRef"]
        target = named(objects, reference["kind"]).get(reference["name"])
        if target is None or target["apiVersion"] != reference.get("apiVersion"):
            yield f"{title(scaler)}: {reference['kind']}/{reference['name']} does not exist"
            continue
        if pod_labels(target).get(COMPONENT) in ALONE:
            yield f"{title(scaler)}: {title(target)} has one pod, and it alone writes its state"
        if "replicas" in target["spec"]:
            yield f"{title(scaler)}: {title(target)} has a number of replicas of its own"
        if scaler["spec"].get("minReplicas", 1) > scaler["spec"]["maxReplicas"]:
            yield f"{title(scaler)}: minReplicas is above maxReplicas"
        for metric in scaler["spec"].get("metrics", []):
            yield from (f"{title(scaler)}: {problem}" for problem in _metric(metric, target))


def _metric(metric: Object, target: Object) -> Iterator[str]:
    if metric["type"] == "Resource":
        name = metric["resource"]["name"]
        requests = [box.get("resources", {}).get("requests", {}) for box in containers(target)]
        if not all(amount(request.get(name)) for request in requests):
            yield f"{title(target)} requests no {name}"
    elif metric["type"] == "Pods":
        name = metric["pods"]["metric"]["name"]
        if name not in prometheus_client.REGISTRY._names_to_collectors:
            yield f"there is no metric {name}"
        if not amount(metric["pods"]["target"].get("averageValue")):
            yield f"{name} has no target"
    else:
        yield f"metrics of type {metric['type']} are unknown here"


def monitor_problems(objects: list[Object]) -> Iterator[str]:
    """Monitors without pods or ports, and pods without a monitor where there is one."""
    monitors = of_kind(objects, "PodMonitor")
    for monitor in monitors:
        found = selected(objects, monitor["spec"]["selector"])
        for workload in found:
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                if endpoint["port"] not in ports(workload):
                    yield f"{title(monitor)}: {title(workload)} has no port named {endpoint['port']}"
        yield from (
            f"{title(monitor)}: {title(workload)} is not monitored"
            for workload in workloads(objects)
            if workload not in found
        )
