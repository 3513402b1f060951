"""The Kubernetes manifests: overlays, and components in every combination, are sound."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import yaml

import feddymem
from services.aggregator.settings import AggregatorSettings
from services.edge_client.settings import EdgeClientSettings
from services.inference.settings import InferenceSettings
from tests.k8s import check
from tests.k8s.check import TRUSTED_NETWORK, problems
from tests.k8s.configuration import collector_port, load_all
from tests.k8s.manifests import (
    COMPONENTS,
    GPU,
    K8S,
    OVERLAYS,
    Object,
    build,
    containers,
    copied,
    named,
    of_kind,
    title,
    workloads,
)
from tests.k8s.schemas import VERSIONS

BASE = ["namespace", "network/aggregator", "network/site"]
SERVICES = ["aggregator", "edge_client", "inference"]
TLS = ("authority", "tls/aggregator", "tls/site")
OPTIONS = ("autoscaling", "gpu", "monitoring", "tls", "tracing")
COMBINATIONS = [chosen for count in range(6) for chosen in itertools.combinations(OPTIONS, count)]


def overlay(name: str) -> list[Object]:
    return build(K8S / "overlays" / name)


def images(objects: list[Object]) -> set[tuple[str, bool]]:
    """All images, and whether they are given GPUs."""
    boxes = [box for each in workloads(objects) for box in containers(each)]
    return {(box["image"], GPU in box["resources"]["limits"]) for box in boxes}


def extend(file: Path, key: str, entries: Sequence[object]) -> None:
    """Adds to a list of a kustomization."""
    content = yaml.safe_load(file.read_text())
    content[key] = [*content.get(key, []), *entries]
    file.write_text(yaml.safe_dump(content))


def combined(folder: Path, options: Iterable[str]) -> list[Object]:
    """Base with some components, in a namespace of its own; without TLS where that is not among them."""
    copied(folder)
    below = [each for each in ("autoscaling", "gpu") if each in options]
    beside = [f"components/{each}" for each in (TLS if "tls" in options else ())] or ["overlays/dev/without-tls"]
    beside += [f"components/{each}" for each in ("monitoring", "tracing") if each in options]
    services = {
        "namespace": "elsewhere",
        "resources": [f"../../k8s/base/{each}" for each in SERVICES],
        "components": [f"../../k8s/components/{each}" for each in below],
        "labels": [{"pairs": {"app.kubernetes.io/instance": "site-a"}}],
    }
    whole = {
        "namespace": "elsewhere",
        "resources": ["services", *(f"../k8s/base/{each}" for each in BASE)],
        "components": [f"../k8s/{each}" for each in beside],
    }
    for place, content in ((folder / "all" / "services", services), (folder / "all", whole)):
        place.mkdir(parents=True, exist_ok=True)
        (place / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return build(folder / "all")


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_is_sound(name: str) -> None:
    assert problems(overlay(name), trusted_network=name in TRUSTED_NETWORK) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_images_are_of_this_version_and_for_gpus_where_there_are_some(name: str) -> None:
    of_version = {(f"feddymem:{feddymem.__version__}", False), (f"feddymem-cuda:{feddymem.__version__}", True)}
    assert images(overlay(name)) <= of_version


def test_images_of_a_registry_take_the_place_of_both(tmp_path: Path) -> None:
    registry = "registry.example.org:5000/lines"
    copied(tmp_path)
    entries = [
        {"name": name, "newName": f"{registry}/{name}", "newTag": "0.1.0-2"} for name in ("feddymem", "feddymem-cuda")
    ]
    extend(tmp_path / "k8s" / "overlays" / "prod" / "kustomization.yaml", "images", entries)
    objects = build(tmp_path / "k8s" / "overlays" / "prod")
    assert problems(objects) == []
    assert images(objects) == {(f"{registry}/feddymem:0.1.0-2", False), (f"{registry}/feddymem-cuda:0.1.0-2", True)}


@pytest.mark.parametrize("options", COMBINATIONS, ids="+".join)
def test_components_are_sound_in_every_combination(options: tuple[str, ...], tmp_path: Path) -> None:
    objects = combined(tmp_path, options)
    assert problems(objects, trusted_network="tls" not in options) == []
    kinds = {item["kind"] for item in objects}
    made = {"autoscaling": "HorizontalPodAutoscaler", "monitoring": "PodMonitor", "tls": "Certificate"}
    found = {option for option, kind in made.items() if kind in kinds}
    found |= {"tracing"} if all(collector_port(each) for each in workloads(objects)) else set()
    assert found == set(options) - {"gpu"}
    shown = [
        item for item in of_kind(objects, "ConfigMap") if "grafana_dashboard" in item["metadata"].get("labels", {})
    ]
    assert len(shown) == (3 if "monitoring" in options else 0)


def test_combinations_are_of_all_components_and_overlays_use_each() -> None:
    assert {each.split("/")[0] for each in COMPONENTS} == {*OPTIONS, "authority"}
    files = (K8S / "overlays").rglob("kustomization.yaml")
    used = {each for path in files for each in yaml.safe_load(path.read_text()).get("components", [])}
    without = {"tracing"}  # where the collector is, nobody but you knows
    assert {each.partition("/components/")[2] for each in used} == {*COMPONENTS, ""} - without


@pytest.mark.parametrize("name", OVERLAYS)
def test_traces_can_be_added_to_every_overlay(name: str, tmp_path: Path) -> None:
    folder = copied(tmp_path) / "overlays" / name
    extend(folder / "kustomization.yaml", "components", ["../../components/tracing"])
    objects = build(folder)
    assert problems(objects, trusted_network=name in TRUSTED_NETWORK) == []
    assert {collector_port(each) for each in workloads(objects)} == {4317}


def test_base_alone_does_not_start() -> None:
    _loaded, refused = load_all(build(K8S / "base"))
    assert sorted(line.partition(":")[0] for line in refused) == [
        "Deployment/inference",
        "StatefulSet/aggregator",
        "StatefulSet/edge-client",
    ]
    assert all("is not a loopback address, and tls_dir is not set" in line for line in refused)


def test_schemas_are_those_of_the_oldest_version_that_the_manifests_are_for_and_of_a_newer_one() -> None:
    newest, oldest = (tuple(map(int, version.split(".")[:2])) for version in VERSIONS)
    assert newest > oldest
    assert f"For Kubernetes {oldest[0]}.{oldest[1]} and newer." in (K8S / "README.md").read_text()


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_overlay_with_aggregator_and_sites_has_those_that_its_quorum_needs(name: str) -> None:
    loaded = load_all(overlay(name))[0].values()
    sites = {each.site for each in loaded if isinstance(each, EdgeClientSettings)}
    [aggregator] = [each for each in loaded if isinstance(each, AggregatorSettings)]
    [federation] = aggregator.federations.values()
    assert (set(federation.sites), federation.quorum) == (sites, len(sites))


def test_site_and_central_fit_each_other() -> None:
    site, central = overlay("site"), overlay("central")
    loaded = load_all(site)[0].values()
    hosts = {each.aggregator for each in loaded if isinstance(each, EdgeClientSettings | InferenceSettings)}
    [client] = [each for each in loaded if isinstance(each, EdgeClientSettings)]
    [aggregator] = [each for each in load_all(central)[0].values() if isinstance(each, AggregatorSettings)]
    [service] = of_kind(central, "Service")
    names = named(central, "Certificate")["aggregator-tls"]["spec"]["dnsNames"]
    assert {host.partition(":")[0] for host in hosts} <= set(names)
    assert {int(host.partition(":")[2]) for host in hosts} == {port["port"] for port in service["spec"]["ports"]}
    assert client.site in aggregator.federations[client.federation].sites


def test_another_site_is_a_copy_of_the_first_with_another_name(tmp_path: Path) -> None:
    copied(tmp_path)
    prod = tmp_path / "k8s" / "overlays" / "prod"
    shutil.copytree(prod / "site-a", prod / "site-b")
    for path in [path for path in (prod / "site-b").rglob("*") if path.is_file()]:
        path.write_text(path.read_text().replace("site-a", "site-b"))
    for path, old, new in (
        (prod / "kustomization.yaml", "  - site-a\n", "  - site-a\n  - site-b\n"),
        (prod / "aggregator" / "settings" / "aggregator.yaml", "[site-a]", "[site-a, site-b]"),
    ):
        path.write_text(path.read_text().replace(old, new))
    objects = build(prod)
    assert problems(objects) == []
    assert {title(item) for item in of_kind(objects, "Certificate", "HorizontalPodAutoscaler")} >= {
        "Certificate/edge-client-site-b-tls",
        "Certificate/inference-site-b-tls",
        "HorizontalPodAutoscaler/inference-site-b",
    }


@pytest.mark.parametrize(("name", "roles"), [("prod", 3), ("central", 1), ("site", 2)])
def test_secrets_by_hand_take_the_place_of_certificates(name: str, roles: int, tmp_path: Path) -> None:
    page = (K8S / "README.md").read_text()
    [block] = re.findall(r"```yaml\n(patches:.*?)```", page, re.DOTALL)
    copied(tmp_path)
    file = tmp_path / "k8s" / "overlays" / name / "kustomization.yaml"
    extend(file, "patches", yaml.safe_load(block)["patches"])
    objects = build(file.parent)
    assert not of_kind(objects, "Certificate", "Issuer")
    found = problems(objects)
    missing = [re.findall(r"Secret/(\S+) does not exist", problem) for problem in found]
    assert all(missing)
    assert len(missing) == roles
    assert {each for [each] in missing} <= set(re.findall(r"create secret generic (\S+)", page))


def test_command_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main() == 0
    monkeypatch.setattr(check, "TRUSTED_NETWORK", set())
    assert check.main() == 1
    printed = capsys.readouterr().out
    assert "StatefulSet/aggregator: listens without TLS" in printed
    monkeypatch.setattr(check, "OVERLAYS", ["gone"])
    assert check.main() == 1
    assert "k8s/overlays/gone: 0 objects, wrong" in capsys.readouterr().out
