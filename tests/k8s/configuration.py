"""Whether services would take their settings, and whether these fit the manifests around them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit

from services.aggregator.settings import AggregatorSettings
from services.edge_client.settings import EdgeClientSettings
from services.inference.settings import InferenceSettings
from services.runtime.channels import FAREWELL_SECONDS
from services.runtime.settings import ClientSettings, InvalidSettingsError, ServiceSettings, load_settings
from services.runtime.trace_export import FLUSH_SECONDS
from tests.k8s.manifests import (
    GPU,
    Object,
    containers,
    environment,
    mounts,
    named,
    of_kind,
    pod,
    ports,
    served,
    title,
    volumes,
    workloads,
)

Loaded = dict[str, ServiceSettings]
"""Settings, by the title of the workload."""

COLLECTOR = "OTEL_EXPORTER_OTLP_ENDPOINT"

SETTINGS: dict[str, type[ServiceSettings]] = {
    "aggregator": AggregatorSettings,
    "edge": EdgeClientSettings,
    "inference": InferenceSettings,
}


def load_all(objects: list[Object]) -> tuple[Loaded, list[str]]:
    """The settings of all workloads, and what is wrong with those that would not start."""
    loaded: Loaded = {}
    problems = []
    for workload in workloads(objects):
        try:
            loaded[title(workload)] = _load(objects, workload)
        except (InvalidSettingsError, LookupError) as error:
            problems.append(f"{title(workload)}: settings: {error}")
    return loaded, problems


def _load(objects: list[Object], workload: Object) -> ServiceSettings:
    """Settings as the container would have them: its flags, its environment and the file of its ConfigMap."""
    command, *flags = pod(workload)["containers"][0]["args"]
    path = Path(flags[flags.index("--config") + 1])
    volume = volumes(workload)[mounts(workload)[str(path.parent)]["name"]]
    content = named(objects, "ConfigMap")[volume["configMap"]["name"]]["data"][path.name]
    variables = {key: value for key, value in os.environ.items() if not key.startswith("FEDDYMEM_")}
    variables |= environment(workload)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, variables, clear=True):
        file = Path(folder) / path.name
        file.write_text(content)
        return load_settings(SETTINGS[command], [str(file) if flag == str(path) else flag for flag in flags])


def called(settings: ServiceSettings) -> list[str]:
    """The addresses of other services that a service calls."""
    if isinstance(settings, InferenceSettings):
        return [settings.aggregator, *settings.edge_clients]
    return [settings.aggregator] if isinstance(settings, EdgeClientSettings) else []


def is_remote(address: str) -> bool:
    """Whether an address is that of a host outside of the cluster."""
    host = address.rpartition(":")[0]
    return "." in host and not host.endswith((".svc", ".local"))


def offered(objects: list[Object]) -> dict[str, Object]:
    """Who answers gRPC at an address in the namespace."""
    return {
        f"{service['metadata']['name']}:{port['port']}": served(objects, service)[0]
        for service in of_kind(objects, "Service")
        for port in service["spec"]["ports"]
        if port["name"] == "grpc" and served(objects, service)
    }


def collector_port(workload: Object) -> int | None:
    """The port of the collector that a workload sends traces to; None for none, 0 for an address that has no port."""
    endpoint = environment(workload).get(COLLECTOR)
    return None if endpoint is None else urlsplit(endpoint).port or 0


def misfits(objects: list[Object], loaded: Loaded, trusted_network: bool) -> Iterator[str]:
    """What is wrong with settings beside the rest of the manifests.

    Args:
        objects: the whole build.
        loaded: see `load_all`.
        trusted_network: whether services may do without TLS.
    """
    for workload in workloads(objects):
        settings = loaded.get(title(workload))
        if settings is None:
            continue
        found = [*_addresses(objects, workload, settings), *_time(workload, settings), *_folders(workload, settings)]
        if collector_port(workload) == 0:
            found.append(f"{COLLECTOR} is {environment(workload)[COLLECTOR]}, and not http(s)://HOST:PORT")
        gpus = any(GPU in box.get("resources", {}).get("limits", {}) for box in containers(workload))
        if isinstance(settings, ClientSettings) and settings.device == "cuda" and not gpus:
            found.append(f"computes on a GPU, and has no limit of {GPU}")
        if settings.danger_listen_without_tls and not trusted_network:
            found.append("listens without TLS")
        yield from (f"{title(workload)}: {problem}" for problem in found)
    yield from _federations(loaded)


def _addresses(objects: list[Object], workload: Object, settings: ServiceSettings) -> Iterator[str]:
    listens = {"grpc": settings.listen, "health": settings.health_listen, "metrics": settings.metrics_listen}
    for port, address in listens.items():
        if address != f"0.0.0.0:{ports(workload).get(port)}":
            yield f"listens on {address}, but its port {port} is {ports(workload).get(port)}"
    for address in called(settings):
        if not is_remote(address) and address not in offered(objects):
            yield f"calls {address}, which no Service offers"


def _time(workload: Object, settings: ServiceSettings) -> Iterator[str]:
    hooks = pod(workload)["containers"][0].get("lifecycle", {})
    pause = hooks.get("preStop", {}).get("sleep", {}).get("seconds", 0)
    if not pause:
        yield "stops before others have heard that it is going"
    most = pause + settings.drain_seconds + FAREWELL_SECONDS + FLUSH_SECONDS
    if pod(workload).get("terminationGracePeriodSeconds", 30) <= most:
        yield f"is killed before the {pause} s of preStop and {settings.drain_seconds} s for draining are over"


def _folders(workload: Object, settings: ServiceSettings) -> Iterator[str]:
    written = [("state_dir", str(settings.state_dir))]
    if not isinstance(settings, AggregatorSettings):
        written.append(("XDG_CACHE_HOME", environment(workload).get("XDG_CACHE_HOME", "")))
    for name, folder in written:
        if mounts(workload).get(folder, {"readOnly": True}).get("readOnly", False):
            yield f"{name} {folder} is not a writable volume"
    if isinstance(settings, EdgeClientSettings) and not mounts(workload).get(str(settings.data), {}).get("readOnly"):
        yield f"data {settings.data} is not a read-only volume"


def _federations(loaded: Loaded) -> Iterator[str]:
    aggregators = [each for each in loaded.values() if isinstance(each, AggregatorSettings)]
    federations = {name: federation for each in aggregators for name, federation in each.federations.items()}
    clients = [(each.federation, each.site) for each in loaded.values() if isinstance(each, EdgeClientSettings)]
    for federation, site in sorted(set(clients)):
        if clients.count((federation, site)) > 1:
            yield f"several edge clients take part in {federation} as {site}"
        if not aggregators:
            continue
        if federation not in federations:
            yield f"edge client of {site}: the aggregator has no federation {federation}"
        elif federations[federation].sites and site not in federations[federation].sites:
            yield f"edge client of {site}: is not on the list of sites of {federation}"
