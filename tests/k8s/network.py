"""Whether NetworkPolicies allow exactly what the picture shows, in and out, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tests.k8s.configuration import Loaded, called, collector_port, is_remote
from tests.k8s.manifests import COMPONENT, Object, matches, of_kind, pod_labels, ports, served, title, workloads

PICTURE = {
    ("edge-client", "aggregator"),
    ("inference", "aggregator"),
    ("inference", "edge-client"),
    ("line", "inference"),
    ("operator", "aggregator"),
}
"""Who calls whom, always at the port named grpc."""

ANYWHERE = "addresses"
DNS = "namespaces with kubernetes.io/metadata.name=kube-system"
LINES = "namespaces with feddymem.io/lines=true"
MONITORING = "namespaces with feddymem.io/monitoring=true"
TRACING = "namespaces with feddymem.io/tracing=true"


@dataclass(frozen=True)
class _Pod:
    title: str
    labels: dict[str, str]
    ports: dict[str, int]

    @property
    def component(self) -> str:
        return self.labels.get(COMPONENT, "")


class _Opening(NamedTuple):
    """What one end of a connection is allowed."""

    subject: str
    direction: Literal["in from", "out to"]
    peer: str
    port: str


CALLERS = [_Pod(name, {COMPONENT: name}, {}) for name in ("line", "operator")]
"""Pods that others make in the namespace."""


def network_problems(objects: list[Object], loaded: Loaded) -> Iterator[str]:
    """What policies forbid and should not, allow and should not, and policies that are about nothing."""
    policies = of_kind(objects, "NetworkPolicy")
    if not any(_denies(policy["spec"]) for policy in policies):
        yield "no NetworkPolicy denies by default"
    pods = [*_pods(objects), *CALLERS]
    for policy in policies:
        yield from (f"{title(policy)}: {problem}" for problem in _misses(policy["spec"], pods))
    allowed = {opening for policy in policies for opening in _openings(policy["spec"], pods)}
    wanted = {*_inside(pods), *_outside(objects, loaded)}
    for each in sorted(wanted - allowed):
        yield f"{each.subject}: no NetworkPolicy lets it {each.direction} {each.peer} at {each.port}"
    for each in sorted(allowed - wanted):
        yield f"{each.subject}: a NetworkPolicy lets it {each.direction} {each.peer} at {each.port}, for nothing"


def _pods(objects: list[Object]) -> list[_Pod]:
    return [_Pod(title(each), pod_labels(each), ports(each)) for each in workloads(objects)]


def _denies(spec: Object) -> bool:
    return spec == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def _inside(pods: list[_Pod]) -> Iterator[_Opening]:
    for caller in pods:
        for server in pods:
            if (caller.component, server.component) in PICTURE:
                port = f"TCP {server.ports.get('grpc')}"
                yield _Opening(caller.title, "out to", server.title, port)
                yield _Opening(server.title, "in from", caller.title, port)


def _outside(objects: list[Object], loaded: Loaded) -> Iterator[_Opening]:
    pods = _pods(objects)
    monitored = bool(of_kind(objects, "PodMonitor"))
    for each in [*pods, *CALLERS]:
        yield from (_Opening(each.title, "out to", DNS, f"{protocol} 53") for protocol in ("TCP", "UDP"))
    for each in pods:
        if each.component == "inference":
            yield _Opening(each.title, "in from", LINES, f"TCP {each.ports.get('grpc')}")
        if monitored:
            yield _Opening(each.title, "in from", MONITORING, f"TCP {each.ports.get('metrics')}")
        for address in called(loaded[each.title]) if each.title in loaded else []:
            if is_remote(address):
                yield _Opening(each.title, "out to", ANYWHERE, f"TCP {address.rpartition(':')[2]}")
    for workload in workloads(objects):
        port = collector_port(workload)
        if port is not None:
            yield _Opening(title(workload), "out to", TRACING, f"TCP {port}")
    for service in of_kind(objects, "Service"):
        if service["spec"].get("type", "ClusterIP") != "ClusterIP":
            for workload in served(objects, service):
                for port in service["spec"]["ports"]:
                    number = ports(workload).get(port["targetPort"])
                    yield _Opening(title(workload), "in from", ANYWHERE, f"TCP {number}")


def _rules(spec: Object) -> Iterator[tuple[Literal["in from", "out to"], list[Object], list[Object]]]:
    """Direction, peers and ports of each rule that has an effect."""
    if "Ingress" in spec["policyTypes"]:
        yield from (("in from", rule.get("from", []), rule.get("ports", [])) for rule in spec.get("ingress", []))
    if "Egress" in spec["policyTypes"]:
        yield from (("out to", rule.get("to", []), rule.get("ports", [])) for rule in spec.get("egress", []))


def _openings(spec: Object, pods: list[_Pod]) -> Iterator[_Opening]:
    for subject in pods:
        if matches(spec["podSelector"], subject.labels):
            for direction, peers, rule_ports in _rules(spec):
                for peer in peers:
                    for name, server in _ends(peer, subject, direction, pods):
                        for port in rule_ports:
                            yield _Opening(subject.title, direction, name, _port(port, server))


def _ends(peer: Object, subject: _Pod, direction: str, pods: list[_Pod]) -> Iterator[tuple[str, _Pod | None]]:
    """Who is at the other end, by name, and whose ports the rule is about where that is known."""
    own = subject if direction == "in from" else None
    if peer.keys() == {"podSelector"}:
        for other in pods:
            if matches(peer["podSelector"], other.labels):
                yield other.title, own or other
    elif peer.keys() == {"namespaceSelector"} and peer["namespaceSelector"].keys() <= {"matchLabels"}:
        labels = peer["namespaceSelector"].get("matchLabels", {})
        yield f"namespaces with {','.join(f'{key}={value}' for key, value in labels.items())}", own
    elif peer.keys() == {"ipBlock"}:
        yield ANYWHERE, own
    else:
        yield f"{' and '.join(sorted(peer))}, which is unknown here", own


def _port(port: Object, server: _Pod | None) -> str:
    number = port.get("port", "any")
    if isinstance(number, str):
        number = server.ports.get(number) if server else number
    return f"{port.get('protocol', 'TCP')} {number}"


def _misses(spec: Object, pods: list[_Pod]) -> Iterator[str]:
    """Selectors that match nobody, ports that nobody has, rules for everybody."""
    subjects = [each for each in pods if matches(spec["podSelector"], each.labels)]
    if not subjects:
        yield f"selects no pods: {spec['podSelector']}"
    known = [*pods, *(_Pod(name, {COMPONENT: name}, {}) for edge in PICTURE for name in edge)]
    for direction, peers, rule_ports in _rules(spec):
        if not peers or not rule_ports:
            yield f"lets {direction} everybody, or at every port"
        servers = list(subjects) if direction == "in from" else []
        for selector in (peer["podSelector"] for peer in peers if "podSelector" in peer):
            others = [each for each in known if matches(selector, each.labels)]
            servers += others if direction == "out to" else []
            if not others:
                yield f"lets {direction} no pods: {selector}"
        for key in sorted({key for port in rule_ports for key in port} - {"port", "protocol"}):
            yield f"{key} is unknown to these checks"
        yield from _portless(rule_ports, [each for each in servers if each.ports])
    for key, rules in (("Ingress", "ingress"), ("Egress", "egress")):
        if spec.get(rules) and key not in spec["policyTypes"]:
            yield f"has rules for {rules}, but is not of the type {key}"


def _portless(rule_ports: list[Object], servers: list[_Pod]) -> Iterator[str]:
    for server in servers:
        for port in rule_ports:
            if port.get("port") not in {*server.ports, *server.ports.values()}:
                yield f"{server.title} has no port {port.get('port')}"
