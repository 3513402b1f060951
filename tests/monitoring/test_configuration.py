"""What is shipped for a Prometheus and an Alertmanager without a cluster, and how the live run makes it faster."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from services.demo.prometheus import MONITORING, Target, write_targets
from tests.monitoring.faster import FACTOR, faster
from tests.monitoring.promtool import program, promtool

FILES = ("prometheus.yaml", "rules.yaml", "alertmanager.yaml")
MILLISECONDS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def durations(text: str) -> list[int]:
    return [int(count) * MILLISECONDS[unit] for count, unit in re.findall(r"(?<![\w.:])(\d+)(ms|[smhd])\b", text)]


def amtool(*arguments: str) -> str:
    command = [program("amtool"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_prometheus_takes_its_configuration() -> None:
    assert "SUCCESS: 1 rule files found" in promtool("check", "config", str(MONITORING / "prometheus.yaml"))


def test_alertmanager_takes_its_configuration() -> None:
    assert "SUCCESS" in amtool("check-config", str(MONITORING / "alertmanager.yaml"))


@pytest.mark.parametrize("severity", ["page", "ticket"])
def test_alerts_go_to_the_receiver_of_their_severity(severity: str) -> None:
    file = str(MONITORING / "alertmanager.yaml")
    assert amtool("config", "routes", "test", f"--config.file={file}", f"severity={severity}").split() == [severity]


def test_targets_are_those_of_the_readme() -> None:
    targets = yaml.safe_load((MONITORING / "targets.yaml").read_text())
    readme = (MONITORING.parent / "README.md").read_text()
    sites = {group["labels"].get("app_kubernetes_io_instance") for group in targets}
    assert {f"--site {site} " in readme for site in sites - {None}} == {True}
    assert {group["labels"]["job"] for group in targets} == {"aggregator", "edge-client", "inference"}
    assert f"--metrics-listen {targets[2]['targets'][0]}" in readme


def test_written_targets_have_the_labels_of_the_shipped_ones(tmp_path: Path) -> None:
    shipped = yaml.safe_load((MONITORING / "targets.yaml").read_text())
    targets = [
        Target(group["targets"][0], group["labels"]["job"], group["labels"].get("app_kubernetes_io_instance", ""))
        for group in shipped
    ]
    write_targets(tmp_path, targets)
    assert yaml.safe_load((tmp_path / "targets.yaml").read_text()) == shipped


@pytest.mark.parametrize("name", FILES)
def test_faster_files_differ_in_durations_only(name: str) -> None:
    shipped = (MONITORING / name).read_text()
    made = faster(shipped)
    assert durations(shipped)
    assert durations(made) == [duration // FACTOR for duration in durations(shipped)]
    duration = r"(?<![\w.:])\d+(ms|[smhd])\b"
    assert re.sub(duration, "", made) == re.sub(duration, "", shipped)


def test_prometheus_takes_the_faster_rules(tmp_path: Path) -> None:
    for name in ("prometheus.yaml", "rules.yaml"):
        (tmp_path / name).write_text(faster((MONITORING / name).read_text()))
    promtool("check", "config", str(tmp_path / "prometheus.yaml"))
