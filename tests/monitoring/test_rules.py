"""The rules: promtool takes them, each alert fires when it must and else is silent, and each is explained."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import yaml

import services.aggregator.metrics
import services.edge_client.metrics
import services.inference.metrics
import services.runtime.files
import services.runtime.metrics
import services.runtime.rpc
import services.runtime.tls
from tests.monitoring.cases import CASES, MINUTES, TARGET, Case
from tests.monitoring.prometheus_rule import OBJECT, ROOT, RULES, generate
from tests.monitoring.promtool import promtool

GROUPS: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}
RECORDS = [rule["record"] for group in GROUPS for rule in group["rules"] if "record" in rule]
TARGETS = {
    "kubernetes": [
        {
            "job": "feddymem/feddymem",
            "instance": f"10.0.0.{number}:9072",
            "namespace": "feddymem",
            "pod": f"inference-site-a-{number}",
            "app_kubernetes_io_component": "inference",
            "app_kubernetes_io_instance": "site-a",
        }
        for number in (1, 2, 3)
    ],
    "plain": [{"job": "inference-site-a", "instance": f"host-{number}:9072"} for number in (1, 2, 3)],
}
"""Labels that the Prometheus of a cluster gives by our PodMonitor, and one without Kubernetes; the last is of an
aggregator."""
MAX_SERIES = 500


def series(key: str, targets: list[dict[str, str]]) -> str:
    """A series of promtool, of the replica that its name says."""
    replica, colon, name = key.rpartition(":")
    labels = targets[{"": 0, "2": 1, "A": 2}[replica]] if colon else targets[0]
    metric, _, own = name.rstrip("}").partition("{")
    pairs = [*([own] if own else []), *(f'{label}="{value}"' for label, value in labels.items())]
    return f"{metric}{{{','.join(pairs)}}}"


def unit_test(case: Case, targets: list[dict[str, str]]) -> dict[str, Any]:
    """A case as promtool takes it."""
    labels = targets[case.replica - 1]
    who = labels.get("pod", labels["instance"])
    service = labels.get("app_kubernetes_io_instance", labels["job"])
    expected = []
    if case.summary is not None:
        own = {name: labels[name] for name in case.target if name in labels}
        rule = ALERTS[case.alert]
        summary = case.summary.replace("WHO", who).replace("SERVICE", service)
        annotations = {"summary": summary, "runbook_url": rule["annotations"]["runbook_url"]}
        expected = [{"exp_labels": {**own, **case.labels, **rule["labels"]}, "exp_annotations": annotations}]
    return {
        "interval": f"{MINUTES.get(case.alert, 1)}m",
        "input_series": [{"series": series(key, targets), "values": values} for key, values in case.series.items()],
        "alert_rule_test": [{"eval_time": case.at, "alertname": case.alert, "exp_alerts": expected}],
    }


def test_promtool_takes_the_rules() -> None:
    assert f"{len(ALERTS) + len(RECORDS)} rules found" in promtool("check", "rules", str(RULES))


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("alert", ALERTS)
def test_alert_fires_when_it_must_and_else_is_silent(alert: str, targets: str, tmp_path: Path) -> None:
    cases = [case for case in CASES if case.alert == alert]
    file = tmp_path / "test.yaml"
    content = {"rule_files": [str(RULES)], "tests": [unit_test(case, TARGETS[targets]) for case in cases]}
    file.write_text(yaml.safe_dump(content | {"evaluation_interval": f"{MINUTES.get(alert, 1)}m"}))
    assert "SUCCESS" in promtool("test", "rules", str(file))


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_has_a_case_of_both_kinds(alert: str) -> None:
    assert {case.summary is None for case in CASES if case.alert == alert} == {True, False}


def test_labels_of_the_cases_are_those_that_the_monitor_gives() -> None:
    monitor = yaml.safe_load((OBJECT.parent / "monitor.yaml").read_text())
    given = {re.sub(r"[^a-z]", "_", label) for label in monitor["spec"]["podTargetLabels"]}
    assert given | {"job", "instance", "namespace", "pod"} == set(TARGET)


def test_cases_are_of_alerts_that_there_are() -> None:
    assert {case.alert for case in CASES} <= ALERTS.keys()
    assert set(TARGET) == set(TARGETS["kubernetes"][0])


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_names_the_thing_and_links_to_its_section(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert "$labels." in rule["annotations"]["summary"]
    assert rule["annotations"]["runbook_url"] == f"docs/alerts.md#{alert.lower()}"
    page = (ROOT / "docs" / "alerts.md").read_text()
    [section] = re.findall(rf"^## {alert}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section.strip().startswith(f"`{rule['labels']['severity']}`.")
    assert "\n- Look" in section


def test_page_has_no_other_sections() -> None:
    page = (ROOT / "docs" / "alerts.md").read_text()
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == list(ALERTS)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_links_to_alerts_lead_to_sections(page: Path) -> None:
    anchors = re.findall(r"alerts\.md#(\w+)", page.read_text())
    anchors += re.findall(r"\]\(#(\w+)\)", page.read_text()) if page.name == "alerts.md" else []
    assert set(anchors) <= {alert.lower() for alert in ALERTS}


def test_rules_are_of_metrics_buckets_and_recordings_that_there_are() -> None:
    known = set(prometheus_client.REGISTRY._names_to_collectors) | set(RECORDS)
    for group in GROUPS:
        for rule in group["rules"]:
            used = set(re.findall(r"[a-z_]*:?(?:feddymem|process)[a-z0-9_:]+", rule["expr"]))
            assert used - known == set(), rule
            assert used or "record" in rule
    bounds = services.inference.metrics.DURATION._upper_bounds
    assert {float(each) for each in re.findall(r'le="([\d.]+)"', RULES.read_text())} <= set(bounds)


def test_recordings_come_before_the_alerts_of_them_in_one_group() -> None:
    """Prometheus evaluates the rules of a group in their order, and groups in none."""
    for group in GROUPS:
        recorded: set[str] = set()
        for rule in group["rules"]:
            assert {record for record in RECORDS if record in rule["expr"]} <= recorded
            recorded.add(rule.get("record", ""))


def test_object_of_the_operator_has_the_same_rules() -> None:
    assert OBJECT.read_text() == generate()
    assert yaml.safe_load(generate())["spec"]["groups"] == GROUPS


def test_a_pod_with_many_federations_has_few_series_and_names_by_the_rules() -> None:
    command = [sys.executable, "-m", "tests.monitoring.inference_pod"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT).stdout
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    shown = {re.split(r"[ {]", line)[0] for line in samples}
    for name in prometheus_client.REGISTRY._names_to_collectors:
        collector: Any = prometheus_client.REGISTRY._names_to_collectors[name]
        if getattr(collector, "_name", "") == name and "inspection" in name:
            assert shown & {name, f"{name}_total", f"{name}_count"}, f"{name} is not counted"
    assert len(samples) < MAX_SERIES
    promtool("check", "metrics", text=text)
