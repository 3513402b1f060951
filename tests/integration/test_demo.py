"""`feddymem demo` from the outside."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from feddymem.datasets import SiteData
from tests.monitoring.promtool import program
from tests.monitoring.servers import asked

DEMO = [sys.executable, "-m", "services.cli", "demo"]
TIMEOUT_SECONDS = 240


@pytest.fixture
def data(products: dict[str, SiteData], tmp_path: Path) -> Path:
    """Two sites with few images."""
    for name in ("brick-hall", "dim-hall"):
        site = products[name]
        shutil.copytree(site.train[0].parent.parent.parent, tmp_path / "data" / name)
    for path in sorted((tmp_path / "data").glob("*/train/good/*"))[::2]:
        path.unlink()
    return tmp_path / "data"


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    while not condition():
        assert process.poll() is None
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue


def test_it_reports_every_site_and_leaves_no_process(data: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([*DEMO, "--data", str(data), "--out", str(tmp_path / "out")])
    children: set[psutil.Process] = set()

    def ended() -> bool:
        children.update(psutil.Process(process.pid).children(recursive=True))
        return process.poll() is not None

    while not ended():
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
        break
    assert process.returncode == 0
    assert len(children) >= 4
    assert not [child for child in children if child.is_running()]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report) >= {"sites", "mean", "seconds", "rounds", "fingerprint", "release"}
    assert set(report["sites"]) == {"brick-hall", "dim-hall"}
    for figures in (*report["sites"].values(), report["mean"]):
        assert 0.5 < figures["image_auroc"] <= 1
        assert 0.5 < figures["pixel_auroc"] <= 1
        assert 0.5 < figures["local_image_auroc"] <= 1
        assert 0 < figures["bytes_per_round"] <= 256 * 1024
    assert (report["rounds"], report["release"], len(report["fingerprint"])) == (2, 2, 64)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 2 * 3 * 4
    assert "http" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_or_killed_it_leaves_no_process(data: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen([*DEMO, "--data", str(data), "--out", str(tmp_path / "out")])
    parent = psutil.Process(process.pid)
    wait_for(process, lambda: len(parent.children(recursive=True)) >= 3)
    children = parent.children(recursive=True)
    process.send_signal(number)
    code = process.wait(60)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert (len(gone) >= 3, alive) == (True, [])


def test_with_prometheus_all_of_it_runs_until_it_is_interrupted(data: Path, tmp_path: Path) -> None:
    program("prometheus")
    command = [*DEMO, "--with-prometheus", "--data", str(data), "--out", str(tmp_path / "out")]
    output = tmp_path / "output"
    with output.open("wb") as written:
        process = subprocess.Popen(command, stdout=written, stderr=written)
    wait_for(process, lambda: "runs until Ctrl-C" in output.read_text())
    text = output.read_text()
    [address] = re.findall(r"^prometheus: http://(\S+)", text, re.MULTILINE)
    shown = set(re.findall(r"http://(\S+)/metrics$", text, re.MULTILINE))
    assert (tmp_path / "out" / "report.html").exists()

    def all_up() -> bool:
        targets = asked(address, "v1/targets")["data"]["activeTargets"]
        return {target["labels"]["instance"] for target in targets if target["health"] == "up"} == shown

    wait_for(process, all_up)
    assert len(shown) == 4
    assert len(asked(address, "v1/rules")["data"]["groups"]) == 2
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert (len(gone), alive) == (5, [])


def test_without_the_program_prometheus_it_says_what_to_install(tmp_path: Path) -> None:
    command = [*DEMO, "--with-prometheus", "--out", str(tmp_path)]
    environment = os.environ | {"PATH": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (run.returncode, "apt-get install prometheus" in run.stderr) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_sites_is_a_usage_error(tmp_path: Path) -> None:
    run = subprocess.run(
        [*DEMO, "--data", str(tmp_path)], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert (run.returncode, str(tmp_path) in run.stderr) == (2, True)
