"""What a build of kustomize asks of a node: workloads, their pods, Services, settings and claims, as plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.deploy.fields import Fields, UnknownFieldError, read_all
from tests.k8s.manifests import Object, named


@dataclass(frozen=True)
class Probe:
    """A `grpc:` probe; times in seconds."""

    port: int
    service: str
    initial_delay: float
    period: float
    timeout: float
    failures: int
    successes: int


@dataclass(frozen=True)
class Volume:
    """Where the files of a volume come from.

    Attributes:
        kind: of its source.
        source: name of the ConfigMap or claim.
        limit: bytes that an emptyDir may hold; none: any number.
    """

    kind: Literal["emptyDir", "configMap", "claim"]
    source: str = ""
    limit: float | None = None


@dataclass(frozen=True)
class Mount:
    """A volume's place in a container."""

    volume: str
    path: str
    read_only: bool


@dataclass(frozen=True)
class Container:
    """The container of a pod.

    Attributes:
        command: instead of the image's entrypoint; none: that.
        cpus: that it may use, of time.
        memory: that it may use, in bytes.
        storage: bytes that it may write outside of claims; none: any number.
        linger: seconds before it is told to end (preStop).
    """

    name: str
    image: str
    command: tuple[str, ...]
    args: tuple[str, ...]
    environment: Mapping[str, str]
    ports: Mapping[str, int]
    mounts: tuple[Mount, ...]
    cpus: float
    memory: int
    storage: float | None
    read_only_root: bool
    linger: float
    startup: Probe | None
    readiness: Probe | None
    liveness: Probe | None


@dataclass(frozen=True)
class PodSpec:
    """What the pods of a workload are like."""

    container: Container
    volumes: Mapping[str, Volume]
    user: int
    group: int
    fs_group: int
    grace_seconds: float
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Workload:
    """A Deployment or StatefulSet.

    Attributes:
        revision: says whether two have the same pods.
        surge: pods above `replicas` during a rolling update.
        unavailable: pods below `replicas` during a rolling update.
        claims: names of its claim templates.
    """

    kind: Literal["Deployment", "StatefulSet"]
    name: str
    replicas: int
    pod: PodSpec
    revision: str
    surge: int = 0
    unavailable: int = 0
    claims: tuple[str, ...] = ()


@dataclass(frozen=True)
class Service:
    """A Service.

    Attributes:
        headless: whether its name stands for its pods' addresses, not for one of its own.
        ports: its ports, and the name or number of the pods' port behind each.
    """

    name: str
    headless: bool
    selector: Mapping[str, str]
    ports: Mapping[int, str | int]


@dataclass
class Manifest:
    """All objects of a build, read.

    Raises:
        UnknownFieldError: it has anything that is neither understood nor known to be without effect.
    """

    workloads: dict[str, Workload] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=dict)
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    claims: set[str] = field(default_factory=set)


def read(objects: list[Object]) -> Manifest:
    """What a build asks for.

    Raises:
        UnknownFieldError: it has anything that is neither understood nor known to be without effect.
    """
    manifest = Manifest()
    namespace = next(iter(named(objects, "Namespace")), None)

    def config_map(fields: Fields) -> None:
        manifest.settings[_name(fields, namespace)] = fields.get("data", {})

    def claim(fields: Fields) -> None:
        manifest.claims.add(_name(fields, namespace))
        with fields.inside("spec", "PersistentVolumeClaimSpec") as spec:
            _claim_spec(spec)

    def service(fields: Fields) -> None:
        one = _service(_name(fields, namespace), fields)
        manifest.services[one.name] = one

    def workload(kind: Literal["Deployment", "StatefulSet"]) -> Any:
        def add(fields: Fields) -> None:
            one = _workload(kind, _name(fields, namespace), fields)
            manifest.workloads[one.name] = one

        return add

    readers = {
        "ConfigMap": ("v1", config_map),
        "PersistentVolumeClaim": ("v1", claim),
        "Service": ("v1", service),
        "Deployment": ("apps/v1", workload("Deployment")),
        "StatefulSet": ("apps/v1", workload("StatefulSet")),
    }
    read_all([Fields(item, f"{item['kind']}/{item['metadata']['name']}", item["kind"]) for item in objects], readers)
    return manifest


def _name(fields: Fields, namespace: str | None = None) -> str:
    with fields.inside("metadata", "ObjectMeta") as metadata:
        metadata.only("namespace", namespace)
        metadata.get("labels")
        return str(metadata.need("name"))


def _claim_spec(spec: Fields) -> None:
    spec.only("accessModes", ["ReadWriteOnce"])


def _service(name: str, fields: Fields) -> Service:
    with fields.inside("spec", "ServiceSpec") as spec:
        spec.only("type", "ClusterIP", default="ClusterIP")
        headless = spec.only("clusterIP", None, "None") == "None"
        ports: dict[int, str | int] = {}
        for port in spec.each("ports", "ServicePort"):
            with port:
                port.get("name")
                port.only("protocol", "TCP", default="TCP")
                number = port.need("port")
                ports[number] = port.get("targetPort", number)
        return Service(name, headless, spec.need("selector"), ports)


def _workload(kind: Literal["Deployment", "StatefulSet"], name: str, fields: Fields) -> Workload:
    surge = unavailable = 0
    claims: list[str] = []
    with fields.inside("spec", f"{kind}Spec") as spec:
        template = spec.need("template")
        revision = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:10]
        with Fields(template, f"{spec.path}.template", "PodTemplateSpec") as read_template:
            pod = _pod(read_template)
        with spec.inside("selector", "LabelSelector") as selector:
            if not selector.get("matchLabels", {}).items() <= pod.labels.items():
                raise UnknownFieldError(f"{selector.path} does not select the workload's own pods")
        if kind == "Deployment":
            with spec.inside("strategy", "DeploymentStrategy") as strategy:
                strategy.only("type", "RollingUpdate", default="RollingUpdate")
                with strategy.inside("rollingUpdate", "RollingUpdateDeployment") as rolling:
                    surge, unavailable = (_count(rolling, key) for key in ("maxSurge", "maxUnavailable"))
        else:
            spec.need("serviceName")
            claims = [_claim_template(template) for template in spec.each("volumeClaimTemplates", "Claim")]
        for mount in pod.container.mounts:
            if mount.volume not in {*pod.volumes, *claims}:
                raise UnknownFieldError(f"{spec.path}.template mounts {mount.volume}, which is no volume of it")
        return Workload(kind, name, spec.get("replicas", 1), pod, revision, surge, unavailable, tuple(claims))


def _count(fields: Fields, key: str) -> int:
    value = fields.need(key)
    if not isinstance(value, int):
        raise UnknownFieldError(f"{fields.path}.{key}: {value} is unknown to tests/deploy, which counts pods")
    return value


def _claim_template(fields: Fields) -> str:
    with fields:
        fields.only("kind", None, "PersistentVolumeClaim")
        fields.only("apiVersion", None, "v1")
        name = _name(fields)
        with fields.inside("spec", "PersistentVolumeClaimSpec") as spec:
            _claim_spec(spec)
        return name


def _pod(template: Fields) -> PodSpec:
    with template.inside("metadata", "ObjectMeta") as metadata:
        labels = metadata.get("labels", {})
    with template.inside("spec", "PodSpec") as spec:
        spec.only("automountServiceAccountToken", False)
        spec.only("enableServiceLinks", False)
        spec.only("restartPolicy", "Always", default="Always")
        with spec.inside("securityContext", "PodSecurityContext") as security:
            security.only("runAsNonRoot", True)
            user, group, fs_group = (security.need(key) for key in ("runAsUser", "runAsGroup", "fsGroup"))
            if user == 0:
                raise UnknownFieldError(f"{security.path}.runAsUser is 0, although runAsNonRoot is true")
            with security.inside("seccompProfile", "SeccompProfile") as seccomp:
                seccomp.only("type", "RuntimeDefault")
        volumes = dict(_volume(volume) for volume in spec.each("volumes", "Volume"))
        containers = [_container(container) for container in spec.each("containers", "Container")]
        if len(containers) != 1:
            raise UnknownFieldError(f"{spec.path}.containers: {len(containers)} in a pod are unknown to tests/deploy")
        grace = spec.get("terminationGracePeriodSeconds", 30)
        return PodSpec(containers[0], volumes, user, group, fs_group, grace, labels)


def _volume(fields: Fields) -> tuple[str, Volume]:
    with fields:
        name = fields.need("name")
        if "configMap" in fields:
            with fields.inside("configMap", "ConfigMapVolumeSource") as settings:
                return name, Volume("configMap", settings.need("name"))
        if "persistentVolumeClaim" in fields:
            with fields.inside("persistentVolumeClaim", "PersistentVolumeClaimVolumeSource") as claim:
                return name, Volume("claim", claim.need("claimName"))
        if "emptyDir" in fields:
            with fields.inside("emptyDir", "EmptyDirVolumeSource") as empty:
                return name, Volume("emptyDir", limit=empty.quantity("sizeLimit") if "sizeLimit" in empty else None)
        raise UnknownFieldError(f"{fields.path} has a source that is unknown to tests/deploy")


def _container(fields: Fields) -> Container:
    with fields:
        environment = dict(_variable(variable) for variable in fields.each("env", "EnvVar"))
        ports = dict(_port(port) for port in fields.each("ports", "ContainerPort"))
        mounts = tuple(_mount(mount) for mount in fields.each("volumeMounts", "VolumeMount"))
        with (
            fields.inside("resources", "ResourceRequirements") as resources,
            resources.inside("limits", "Limits") as limits,
        ):
            cpus, memory, storage = (limits.quantity(key) for key in ("cpu", "memory", "ephemeral-storage"))
        with fields.inside("securityContext", "SecurityContext") as security:
            security.only("allowPrivilegeEscalation", False)
            read_only_root = bool(security.get("readOnlyRootFilesystem", False))
            with security.inside("capabilities", "Capabilities") as capabilities:
                capabilities.only("drop", ["ALL"])
        startup, readiness, liveness = (_probe(fields, f"{name}Probe") for name in ("startup", "readiness", "liveness"))
        return Container(
            fields.need("name"),
            fields.need("image"),
            tuple(_literal(fields, "command", text) for text in fields.get("command", ())),
            tuple(_literal(fields, "args", text) for text in fields.get("args", ())),
            environment,
            ports,
            mounts,
            cpus,
            int(memory),
            storage,
            read_only_root,
            _linger(fields),
            startup,
            readiness,
            liveness,
        )


def _variable(fields: Fields) -> tuple[str, str]:
    with fields:
        return fields.need("name"), _literal(fields, "value", str(fields.need("value")))


def _literal(fields: Fields, key: str, text: str) -> str:
    """A text in which the kubelet would replace nothing: neither $(NAME) nor $$."""
    if "$(" in text or "$$" in text:
        raise UnknownFieldError(f"{fields.path}.{key}: {text} is unknown to tests/deploy, which expands no variables")
    return text


def _port(fields: Fields) -> tuple[str, int]:
    with fields:
        fields.only("protocol", "TCP", default="TCP")
        return fields.need("name"), int(fields.need("containerPort"))


def _mount(fields: Fields) -> Mount:
    with fields:
        return Mount(fields.need("name"), fields.need("mountPath"), bool(fields.get("readOnly", False)))


def _linger(container: Fields) -> float:
    if "lifecycle" not in container:
        return 0
    with (
        container.inside("lifecycle", "Lifecycle") as lifecycle,
        lifecycle.inside("preStop", "LifecycleHandler") as stop,
        stop.inside("sleep", "SleepAction") as sleep,
    ):
        return float(sleep.need("seconds"))


def _probe(container: Fields, key: str) -> Probe | None:
    if key not in container:
        return None
    with container.inside(key, "Probe") as probe:
        with probe.inside("grpc", "GRPCAction") as call:
            port, service = call.need("port"), call.get("service", "")
        return Probe(
            port,
            service,
            probe.get("initialDelaySeconds", 0),
            probe.get("periodSeconds", 10),
            probe.get("timeoutSeconds", 1),
            probe.get("failureThreshold", 3),
            probe.get("successThreshold", 1),
        )
