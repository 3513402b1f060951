"""Every check finds what it is for: sound manifests, broken at one place."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.k8s.check import problems
from tests.k8s.manifests import K8S, Object, build, title
from tests.k8s.schemas import VERSIONS

META = "spec template metadata"
POD = "spec template spec"
BOX = f"{POD} containers 0"
GONE = object()

AGGREGATOR, EDGE, INFERENCE = "StatefulSet/aggregator", "StatefulSet/edge-client-site-a", "Deployment/inference-site-a"
BUDGET, SCALER = "PodDisruptionBudget/inference-site-a", "HorizontalPodAutoscaler/inference-site-a"
CERTIFICATE, MONITOR = "Certificate/inference-site-a-tls", "PodMonitor/feddymem"
RULE = "PrometheusRule/feddymem"
POLICY = "NetworkPolicy/"
SERVICE = "Service/inference-site-a"
CONFIG = "ConfigMap/inference-settings-site-a"
DASHBOARD = "ConfigMap/feddymem-dashboard-site"
TEXT = "aggregator: nowhere:7070\ndanger_listen_without_tls: true"


def find(objects: list[Object], name: str) -> Object:
    """By title, without the hash of a ConfigMap."""
    [item] = [each for each in objects if title(each) == name or re.sub(r"-\w{10}$", "", title(each)) == name]
    return item


def step(target: Any, key: str) -> Any:
    """A key or index; `KEY=VALUE` is the place in a list of what has it."""
    if not isinstance(target, list):
        return key
    if key.isdigit():
        return int(key)
    name, _, value = key.partition("=")
    return next(place for place, item in enumerate(target) if str(item[name]) == value)


def change(item: Object, path: str, value: object) -> None:
    """Puts a value at a path, or takes away what is there."""
    *parents, last = path.split()
    target: Any = item
    for key in parents:
        target = target[step(target, key)]
    if value is GONE:
        del target[step(target, last)]
    else:
        target[step(target, last)] = value


BROKEN = [
    # Schemas
    (AGGREGATOR, "spec replica", 1, "'replica' was unexpected"),
    (INFERENCE, "apiVersion", "apps/v1beta1", "Couldn't find schema"),
    (CERTIFICATE, "spec secretname", "x", "'secretname' was unexpected"),
    (CERTIFICATE, "spec issuerRef", GONE, "'issuerRef' is a required property"),
    (CERTIFICATE, "spec privateKey size", 2048, "256 was expected"),
    (CERTIFICATE, "apiVersion", "cert-manager.io/v1alpha2", "Couldn't find schema"),
    ("Issuer/feddymem", "spec ca", GONE, "is not valid under any"),
    (MONITOR, "spec podMetricsEndpoints 0 port", 9072, "9072 is not of type 'string'"),
    (RULE, "spec groups 1 rules 0 labels severity", "critical", "is not valid under any"),
    (RULE, "spec groups 0 rules", [], "non-empty"),
    # Names, namespaces
    (AGGREGATOR, "metadata name", "Aggregator_1", "bad name"),
    ("Service/inference-site-a", "metadata name", "aggregator", "is there twice"),
    (AGGREGATOR, "metadata labels app.kubernetes.io/version", "0.1.0+local", "bad label"),
    (AGGREGATOR, "metadata labels app.kubernetes.io/version", "0.0.9", "is not labelled as version"),
    (AGGREGATOR, "metadata namespace", "default", "is not in the namespace feddymem"),
    ("ServiceAccount/aggregator", "kind", "DaemonSet", "DaemonSet/aggregator: is of a kind unknown"),
    (POLICY + "dns", "kind", "Role", "Role/dns: is of a kind unknown"),
    ("Namespace/feddymem", "kind", "Name", "0 namespaces instead of one"),
    ("Namespace/feddymem", "metadata labels pod-security.kubernetes.io/enforce", "baseline", "to the restricted"),
    # Selectors
    (AGGREGATOR, f"{META} labels app.kubernetes.io/component", "x", "matches other pods"),
    (INFERENCE, f"{POD} topologySpreadConstraints 0 labelSelector matchLabels", {"a": "b"}, "spreads other pods"),
    ("Service/aggregator", "spec selector", {"app.kubernetes.io/name": "feddymem"}, "selects the pods of 3"),
    ("Service/edge-client-site-a", "spec ports 0 targetPort", 7071, "target port 7071 is no named port"),
    ("Service/edge-client-site-a", "spec ports 0 targetPort", "http", "target port http is no named port"),
    (SERVICE, "spec clusterIP", GONE, f"{INFERENCE}: has no headless Service"),
    (SERVICE, "spec publishNotReadyAddresses", True, "is for pods that are not ready, too"),
    # References
    (EDGE, "spec serviceName", "edge", "Service/edge does not exist"),
    (EDGE, f"{POD} volumes name=settings configMap name", "gone", "ConfigMap/gone does not exist"),
    (EDGE, f"{POD} volumes name=images persistentVolumeClaim claimName", "x", "Claim/x does not exist"),
    (EDGE, f"{POD} volumes name=tls secret secretName", "gone", "Secret/gone does not exist"),
    (EDGE, "spec volumeClaimTemplates 0 metadata name", "disk", "volume disk is mounted but"),
    (EDGE, f"{POD} serviceAccountName", "gone", "ServiceAccount/gone does not exist"),
    (EDGE, f"{POD} serviceAccountName", GONE, "ServiceAccount/default does not exist"),
    (EDGE, f"{POD} serviceAccountName", "aggregator", "is that of 2 workloads"),
    (EDGE, f"{POD} serviceAccountName", "aggregator", "nobody uses it"),
    ("ServiceAccount/aggregator", "automountServiceAccountToken", GONE, "mounts a token"),
    # Quantities
    ("PersistentVolumeClaim/edge-client-images-site-a", "spec resources requests storage", "20GB", "requests no st"),
    (EDGE, "spec volumeClaimTemplates 0 spec resources requests storage", "ten", "state: requests no storage"),
    (INFERENCE, f"{POD} volumes name=tmp emptyDir", {}, "an emptyDir has no size"),
    (INFERENCE, f"{BOX} resources limits ephemeral-storage", "5Gi", "emptyDirs may become larger"),
    (INFERENCE, f"{BOX} resources limits memory", GONE, "memory needs a request and a limit"),
    (INFERENCE, f"{BOX} resources limits memory", "3GB", "memory needs a request and a limit"),
    (INFERENCE, f"{BOX} resources requests cpu", "64", "cpu needs a request and a limit"),
    # Pod security
    (INFERENCE, f"{POD} enableServiceLinks", GONE, "enableServiceLinks is not false"),
    (INFERENCE, f"{POD} automountServiceAccountToken", True, "automountServiceAccountToken is not"),
    (INFERENCE, f"{POD} securityContext runAsNonRoot", False, "may run as root"),
    (INFERENCE, f"{POD} securityContext seccompProfile", GONE, "seccompProfile is not"),
    (INFERENCE, f"{POD} hostNetwork", True, "hostNetwork is unknown to these checks"),
    (INFERENCE, f"{POD} securityContext sysctls", [], "sysctls is unknown to these checks"),
    (INFERENCE, f"{POD} volumes name=tmp", {"name": "tmp", "hostPath": {"path": "/dev"}}, "volume tmp is a hostPath"),
    (INFERENCE, f"{BOX} securityContext allowPrivilegeEscalation", GONE, "may be escalated"),
    (INFERENCE, f"{BOX} securityContext readOnlyRootFilesystem", False, "filesystem is writable"),
    (INFERENCE, f"{BOX} securityContext capabilities", {"add": ["NET_RAW"]}, "capabilities other"),
    (INFERENCE, f"{BOX} securityContext privileged", True, "privileged is unknown to these checks"),
    (INFERENCE, f"{BOX} securityContext runAsUser", 0, "runAsUser is unknown to these checks"),
    (INFERENCE, f"{BOX} securityContext runAsNonRoot", False, "runAsNonRoot is unknown to these checks"),
    (INFERENCE, f"{BOX} securityContext seccompProfile", {"type": "Unconfined"}, "seccompProfile is unknown to these"),
    (INFERENCE, f"{BOX} ports name=grpc hostPort", 7072, "hostPort is unknown to these checks"),
    (INFERENCE, f"{BOX} command", ["sh"], "command is unknown to these checks"),
    (INFERENCE, f"{BOX} envFrom", [{"secretRef": {"name": "gone"}}], "envFrom is unknown to these checks"),
    (
        INFERENCE,
        f"{BOX} env name=XDG_CACHE_HOME",
        {"name": "XDG_CACHE_HOME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        "XDG_CACHE_HOME: valueFrom is unknown to these checks",
    ),
    (INFERENCE, f"{BOX} env name=XDG_CACHE_HOME value", "$(HOME)", "$( is unknown to these checks"),
    (INFERENCE, f"{BOX} args 2", "$(CONFIG)", "$( is unknown to these checks"),
    # Images
    (INFERENCE, f"{BOX} image", "feddymem:latest", "image feddymem:latest has neither a fixed tag nor"),
    (INFERENCE, f"{BOX} image", "feddymem", "image feddymem has neither a fixed tag nor"),
    (INFERENCE, f"{BOX} image", "registry:5000/feddymem", "image registry:5000/feddymem has neither a fixed tag nor"),
    (EDGE, f"{BOX} resources limits nvidia.com/gpu", GONE, "computes on a GPU, and has no limit of nvidia.com/gpu"),
    # Probes
    (INFERENCE, f"{BOX} readinessProbe", GONE, "readinessProbe does not ask"),
    (INFERENCE, f"{BOX} livenessProbe grpc service", GONE, "livenessProbe does not ask"),
    (INFERENCE, f"{BOX} startupProbe grpc port", 7072, "startupProbe does not ask the health port"),
    (INFERENCE, f"{BOX} ports name=health containerPort", 7083, "readinessProbe does not ask the health port"),
    # Numbers of pods, disruption budgets, autoscalers
    (AGGREGATOR, "spec replicas", 2, f"{AGGREGATOR}: has 2 pods, and one alone writes its state"),
    (EDGE, "spec replicas", 0, f"{EDGE}: has 0 pods, and one alone writes its state"),
    (
        SCALER,
        "spec scaleTargetRef",
        {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "aggregator"},
        "StatefulSet/aggregator has one pod, and it alone writes its state",
    ),
    (BUDGET, "spec maxUnavailable", 5, "all pods may be evicted at once"),
    (BUDGET, "spec maxUnavailable", 2, "all pods may be evicted at once"),
    (BUDGET, "spec maxUnavailable", "100%", "no pod may ever be evicted, or not a number of them"),
    (BUDGET, "spec selector matchLabels app.kubernetes.io/component", "x", "is for the pods of 0 workloads"),
    (BUDGET, "spec selector matchLabels app.kubernetes.io/component", "x", "has no disruption budget"),
    (BUDGET, "spec maxUnavailable", 0, "no pod may ever be evicted"),
    (SCALER, "spec scaleTargetRef name", "inference", "Deployment/inference does not exist"),
    (SCALER, "spec scaleTargetRef apiVersion", GONE, "Deployment/inference-site-a does not exist"),
    (SCALER, "spec minReplicas", 9, "minReplicas is above maxReplicas"),
    (SCALER, "spec metrics type=Pods pods metric name", "feddymem_queue", "there is no metric feddymem_queue"),
    (SCALER, "spec metrics type=Pods pods target averageValue", "some", "feddymem_inspections_waiting has no target"),
    (SCALER, "spec metrics type=Resource resource name", "storage", "requests no storage"),
    (SCALER, "spec metrics type=Pods type", "Object", "metrics of type Object are unknown"),
    (INFERENCE, "spec replicas", 2, "has a number of replicas of its own"),
    (INFERENCE, f"{BOX} resources requests cpu", GONE, "requests no cpu"),
    # Monitors
    (MONITOR, "spec podMetricsEndpoints 0 port", "http", "has no port named http"),
    (MONITOR, "spec selector matchLabels app.kubernetes.io/component", "inference", "aggregator is not monitored"),
    # Settings
    (INFERENCE, f"{BOX} args 2", "/etc/feddymem/gone.yaml", "settings: 'gone.yaml'"),
    (INFERENCE, f"{BOX} args 0", "aggregator", "settings: "),
    (INFERENCE, f"{BOX} env", [{"name": "FEDDYMEM_TREADS", "value": "2"}], "FEDDYMEM_TREADS is not"),
    (INFERENCE, f"{BOX} env name=FEDDYMEM_TLS_DIR", GONE, "tls_dir is not set"),
    (CONFIG, "data inference.yaml", "aggregator: x:1\nlissen: x:1", "lissen: is not a known"),
    (CONFIG, "data inference.yaml", TEXT, "inference-site-a: listens without TLS"),
    (CONFIG, "data inference.yaml", TEXT, "calls nowhere:7070"),
    (CONFIG, "data inference.yaml", TEXT, "listens on 127.0.0.1:7072"),
    (CONFIG, "data inference.yaml", TEXT, "listens on None, but its port health is 7082"),
    (CONFIG, "data inference.yaml", TEXT, "state_dir state/inference is not a writable volume"),
    (INFERENCE, f"{BOX} env name=XDG_CACHE_HOME", GONE, "XDG_CACHE_HOME  is not a writable volume"),
    (EDGE, f"{BOX} volumeMounts name=images readOnly", GONE, "is not a read-only volume"),
    (EDGE, f"{POD} terminationGracePeriodSeconds", 25, "is killed before the 5 s of preStop and 20"),
    (EDGE, f"{BOX} lifecycle", GONE, "stops before others have heard"),
    # Certificates
    (CERTIFICATE, "spec secretName", "other", "nobody uses its Secret other"),
    (CERTIFICATE, "spec secretName", "other", "Secret/inference-site-a-tls does not exist"),
    (CERTIFICATE, "spec uris 0", "feddymem://inference/site-b", "is that of inference 'site-b', not of"),
    (CERTIFICATE, "spec uris 0", "feddymem://site/site-a", "is that of site 'site-a', not of inference"),
    (CERTIFICATE, "spec uris", GONE, "not one identity"),
    ("Certificate/edge-client-site-a-tls", "spec uris 0", "feddymem://site/SITE", "not of site 'site-a'"),
    ("Certificate/aggregator-tls", "spec uris 0", "feddymem://operator/ann", "not of role aggregator"),
    (CERTIFICATE, "spec dnsNames 0", "inference", "is not for the host inference-site-a"),
    (CERTIFICATE, "spec dnsNames 0", "inference", "is for the host inference, which is somebody else"),
    (CERTIFICATE, "spec usages", ["server auth"], "is not for both ends"),
    (CERTIFICATE, "spec isCA", True, "is an authority"),
    (CERTIFICATE, "spec issuerRef name", "gone", "Issuer/gone does not exist"),
    (CERTIFICATE, "spec privateKey rotationPolicy", "Never", "rotationPolicy is not Always"),
    ("Certificate/feddymem-authority", "spec privateKey rotationPolicy", "Always", "rotationPolicy is not Never"),
    ("Issuer/feddymem", "spec ca secretName", "gone", "Secret/gone of an Issuer is made by no Certificate"),
    (
        INFERENCE,
        f"{BOX} volumeMounts name=tls mountPath",
        "/tls",
        "tls_dir /etc/feddymem-tls is not a read-only Secret",
    ),
    (INFERENCE, f"{BOX} volumeMounts name=tls readOnly", GONE, "tls_dir /etc/feddymem-tls is not a read-only Secret"),
    # Network policies
    (f"{POLICY}default-deny", "spec policyTypes", ["Ingress"], "no NetworkPolicy denies by default"),
    (f"{POLICY}default-deny", "spec egress", [{}], "no NetworkPolicy denies by default"),
    (f"{POLICY}default-deny", "spec egress", [{}], "lets out to everybody, or at every port"),
    (f"{POLICY}dns", "spec egress 0 ports port=53 port", 54, "lets it out to namespaces with kubernetes.io/metadata"),
    (f"{POLICY}inference", "spec podSelector matchLabels app.kubernetes.io/component", "x", "selects no pods"),
    (f"{POLICY}inference", "spec egress 1 to 0 podSelector matchLabels", {"a": "b"}, "lets out to no pods: {"),
    (f"{POLICY}inference", "spec ingress 0 ports 0 port", 7073, "inference-site-a has no port 7073"),
    (f"{POLICY}inference", "spec egress 1", GONE, f"{INFERENCE}: no NetworkPolicy lets it out to {EDGE} at TCP 7071"),
    (f"{POLICY}edge-client", "spec ingress", GONE, f"{EDGE}: no NetworkPolicy lets it in from {INFERENCE} at TCP 7071"),
    (
        f"{POLICY}aggregator",
        "spec ingress 0 from 0 podSelector matchExpressions 0 values 0",
        "line",
        "line at TCP 7070",
    ),
    (f"{POLICY}aggregator", "spec ingress 0 from 0", {"podSelector": {}}, "in from line at TCP 7070, for nothing"),
    (f"{POLICY}aggregator", "spec ingress 0 from 0", {"ipBlock": {"cidr": "0.0.0.0/0"}}, "addresses at TCP 7070, for"),
    (f"{POLICY}inference", "spec policyTypes", ["Ingress"], "has rules for egress, but is not of the type Egress"),
    (f"{POLICY}inference", "spec ingress 0 from 1 namespaceSelector", {}, "in from namespaces with  at TCP 7072, for"),
    (f"{POLICY}inference", "spec ingress 0 ports 0 protocol", "UDP", "no NetworkPolicy lets it in from line at TCP"),
    (
        f"{POLICY}inference",
        "spec ingress 0 from 1 podSelector",
        {},
        "in from namespaceSelector and podSelector, which is",
    ),
    (f"{POLICY}inference", "spec ingress 0 ports 0 endPort", 65535, "endPort is unknown to these checks"),
    (
        f"{POLICY}inference",
        "spec ingress 0 from 1 namespaceSelector matchExpressions",
        [{"key": "a", "operator": "Exists"}],
        "in from namespaceSelector, which is unknown",
    ),
    (f"{POLICY}metrics", "spec ingress 0 ports 0 port", "http", "has no port http"),
    (f"{POLICY}metrics", "spec ingress 0 ports 0 port", "grpc", "lets it in from namespaces with feddymem.io/monitor"),
    # Dashboards
    (DASHBOARD, "data site.json", "{", "site.json is no dashboard"),
    (DASHBOARD, "data site.json", '{"uid": "site"}', "site.json is no dashboard"),
    (DASHBOARD, "data site", "{}", "site is no dashboard"),
    (DASHBOARD, "data again.json", '{"uid": "feddymem-site", "panels": [1]}', "dashboard feddymem-site: is there 2"),
    (DASHBOARD, "data site.json", " " * 250_000, "is too large for kubectl apply"),
    (DASHBOARD, "metadata labels", {}, "nobody mounts it"),
    (MONITOR, "kind", "Monitor", "feddymem.io/monitoring=true at TCP 9072, for nothing"),
]


@pytest.mark.parametrize(("name", "path", "value", "problem"), BROKEN)
def test_broken_manifest_is_found(name: str, path: str, value: object, problem: str) -> None:
    objects = build(K8S / "overlays" / "prod")
    change(find(objects, name), path, value)
    assert [line for line in problems(objects) if problem in line]


def test_both_versions_of_kubernetes_are_asked() -> None:
    objects = build(K8S / "overlays" / "prod")
    change(find(objects, AGGREGATOR), "spec replica", 1)
    found = problems(objects)
    assert [line.split(": ")[1] for line in found] == [f"Kubernetes {version}" for version in VERSIONS]


@pytest.mark.parametrize(
    "image",
    [
        "feddymem:0.0.9",
        "registry.example.org:5000/lines/feddymem:0.1.0",
        f"registry.example.org/feddymem@sha256:{'0a' * 32}",
        f"feddymem:latest@sha256:{'0a' * 32}",
    ],
)
def test_an_image_of_another_name_is_sound(image: str) -> None:
    objects = build(K8S / "overlays" / "prod")
    change(find(objects, INFERENCE), f"{BOX} image", image)
    assert problems(objects) == []


def test_what_an_overlay_may_add_is_sound() -> None:
    objects = build(K8S / "overlays" / "prod")
    change(find(objects, INFERENCE), f"{POD} imagePullSecrets", [{"name": "registry"}])
    change(find(objects, INFERENCE), f"{POD} nodeSelector", {"disk": "ssd"})
    assert problems(objects) == []


@pytest.mark.parametrize(
    ("overlay", "name", "path", "value", "problem"),
    [
        ("site", f"{POLICY}remote-aggregator", "spec egress 0 ports 0 port", 7071, "it out to addresses at TCP 7070"),
        ("site", f"{POLICY}remote-aggregator", "spec egress 0 ports 0 port", 7071, "TCP 7071, for nothing"),
        ("central", f"{POLICY}remote-sites", "spec ingress 0 ports 0 port", 9070, "it in from addresses at TCP 7070"),
        ("central", "Service/aggregator", "spec type", "ClusterIP", "it in from addresses at TCP 7070, for nothing"),
        ("central", "Certificate/aggregator-tls", "spec dnsNames 4", GONE, "is for no name outside of the cluster"),
    ],
)
def test_broken_connection_between_clusters_is_found(
    overlay: str, name: str, path: str, value: object, problem: str
) -> None:
    objects = build(K8S / "overlays" / overlay)
    change(find(objects, name), path, value)
    assert [line for line in problems(objects) if problem in line]


ENDPOINT = {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector.tracing.svc:4317"}


def test_a_collector_that_pods_cannot_reach_is_found() -> None:
    objects = build(K8S / "overlays" / "prod")
    change(find(objects, INFERENCE), f"{BOX} env", [*find_env(objects, INFERENCE), ENDPOINT])
    wanted = "namespaces with feddymem.io/tracing=true at TCP 4317"
    assert problems(objects) == [f"{INFERENCE}: no NetworkPolicy lets it out to {wanted}"]
    endpoint = {**ENDPOINT, "value": "http://collector.tracing.svc"}
    change(find(objects, INFERENCE), f"{BOX} env", [*find_env(objects, INFERENCE)[:-1], endpoint])
    assert any("http://collector.tracing.svc, and not http(s)://HOST:PORT" in line for line in problems(objects))


def find_env(objects: list[Object], name: str) -> list[Object]:
    env: list[Object] = find(objects, name)["spec"]["template"]["spec"]["containers"][0]["env"]
    return env


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("site: site-b", "site: site-a", "several edge clients take part in magtile as site-a"),
        ("site: site-b", "site: site-c", "edge client of site-c: is not on the list of sites of magtile"),
        ("federation: magtile", "federation: tiles", "edge client of site-b: the aggregator has no federation tiles"),
    ],
)
def test_site_that_does_not_fit_its_federation_is_found(old: str, new: str, problem: str) -> None:
    objects = build(K8S / "overlays" / "dev")
    config = find(objects, "ConfigMap/edge-client-settings-site-b")
    config["data"]["edge.yaml"] = config["data"]["edge.yaml"].replace(old, new)
    assert problems(objects, trusted_network=True) == [problem]
