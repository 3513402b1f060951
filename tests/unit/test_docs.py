"""Pages and code together: what a page lists exists, and what exists is listed."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import prometheus_client
import pytest
from pydantic import BaseModel

import services.aggregator.metrics
import services.edge_client.metrics
import services.inference.metrics
import services.runtime.rpc
import services.runtime.tls  # noqa: F401 - registers its metrics
from feddymem.client import InspectionClient, channel
from services.aggregator import news, rounds
from services.aggregator.settings import AggregatorSettings, FederationSettings
from services.cli import exit_codes
from services.edge_client.settings import EdgeClientSettings
from services.inference import feedback
from services.inference.settings import InferenceSettings
from services.runtime import backoff, channels, following, rate, receiving, server_identity, trace_export

DOCS = Path(__file__).parent.parent.parent / "docs"
ROOT = DOCS.parent


def test_the_metrics_page_lists_exactly_the_metrics_with_type_and_labels() -> None:
    listed = {}
    for line in (DOCS / "metrics.md").read_text().splitlines():
        match = re.match(r"\| `(feddymem_\w+)` \| (\w+) \| ([^|]*)\|", line)
        if match:
            labels = re.sub(r"\([^)]*\)", "", match[3])
            listed[match[1]] = (match[2], tuple(name.strip() for name in labels.split(",") if name.strip()))
    collectors = set(prometheus_client.REGISTRY._names_to_collectors.values())
    registered = {}
    for collector in collectors:
        name = getattr(collector, "_name", "")
        if name.startswith("feddymem_"):
            kind = str(collector._type)  # type: ignore[attr-defined]
            registered[f"{name}_total" if kind == "counter" else name] = (kind, tuple(collector._labelnames))  # type: ignore[attr-defined]
    assert listed == registered


def settings_in_seconds(model: type[BaseModel]) -> dict[str, object]:
    return {name: field.default for name, field in model.model_fields.items() if name.endswith("_seconds")}


def test_the_timeouts_page_lists_exactly_the_waits_with_their_defaults() -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", (DOCS / "timeouts.md").read_text(), re.MULTILINE))
    expected: dict[str, object] = {}
    for model in (AggregatorSettings, FederationSettings, EdgeClientSettings, InferenceSettings):
        expected |= settings_in_seconds(model)
    modules = (backoff, channel, channels, feedback, following, news, rate, receiving, rounds, server_identity)
    for module in (*modules, trace_export):
        expected |= {name: value for name, value in vars(module).items() if name.endswith("_SECONDS")}
    assert {name: float(value) for name, value in listed.items()} == expected | client_waits()


def client_waits() -> dict[str, object]:
    """What bounds a call of the client library."""
    [method] = channel.service_config(channel.MAX_ATTEMPTS)["methodConfig"]
    policy = method["retryPolicy"]
    defaults = inspect.signature(InspectionClient).parameters
    assert policy["maxAttempts"] == defaults["attempts"].default
    return {
        **{name: defaults[name].default for name in ("timeout_seconds", "attempts")},
        **{name: float(policy[name].removesuffix("s")) for name in ("initialBackoff", "maxBackoff")},
        "backoffMultiplier": policy["backoffMultiplier"],
    }


def test_the_operations_page_lists_exactly_the_exit_codes() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", (DOCS / "operations.md").read_text(), re.MULTILINE)}
    assert listed == {value for name, value in vars(exit_codes).items() if name.isupper()}


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "k8s" / "README.md"]), ids=lambda p: p.name
)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []
