"""`feddymem evaluate` from the outside."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from feddymem.datasets import SiteData

EVALUATE = [sys.executable, "-m", "services.cli", "evaluate"]


@pytest.fixture
def data(products: dict[str, SiteData], tmp_path: Path) -> Path:
    """Two sites with few images."""
    for name in ("brick-hall", "dim-hall"):
        site = products[name].train[0].parents[2]
        shutil.copytree(site, tmp_path / "data" / name)
    for path in sorted((tmp_path / "data").glob("*/train/good/*"))[::2]:
        path.unlink()
    return tmp_path / "data"


def evaluate(data: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [*EVALUATE, str(data), "--out", str(out), "--cache", str(out / "cache"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_it_reports_every_method_and_site(data: Path, tmp_path: Path) -> None:
    finished = evaluate(data, tmp_path / "out", "--methods", "feddymem,local,running-average", "--seeds", "0,1")
    assert finished.returncode == 0, finished.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["data"], report["seeds"], len(report["fingerprint"])) == (str(data), [0, 1], 64)
    assert list(report["methods"]) == ["feddymem", "local", "running-average"]
    for method in report["methods"].values():
        assert set(method["sites"]) == {"brick-hall", "dim-hall"}
        assert 0.5 < method["image_auroc"] <= 1
        assert 0 <= method["false_alarm_rate"] <= method["detection_rate"] <= 1
    assert 0 < report["methods"]["feddymem"]["bytes_per_site_round"] <= 256 * 1024
    assert report["methods"]["local"]["bytes_per_site_round"] == 0
    assert "running-average" in (tmp_path / "out" / "report.html").read_text()
    assert "running-average" in (tmp_path / "out" / "report.md").read_text()


def test_the_memory_has_the_size_asked_for(data: Path, tmp_path: Path) -> None:
    """With one item it tells normal from defect less well."""
    figures = []
    for items in ("1", "4000"):
        out = tmp_path / items
        finished = evaluate(data, out, "--methods", "feddymem", "--memory-items", items)
        assert finished.returncode == 0, finished.stderr
        report = json.loads((out / "report.json").read_text())
        assert report["method"]["memory_items"] == int(items)
        figures.append(report["methods"]["feddymem"]["pixel_auroc"])
    assert figures[0] < figures[1]


def test_nothing_is_held_out_where_none_is_wanted(data: Path, tmp_path: Path) -> None:
    """Then the method comes out the same with every seed, and runs once."""
    flags = ("--methods", "feddymem", "--seeds", "2", "--hold-out-share", "0")
    finished = evaluate(data, tmp_path / "out", *flags)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("feddymem, seed") == 1
    figures = json.loads((tmp_path / "out" / "report.json").read_text())["methods"]["feddymem"]
    assert (figures["held_out_images"], figures["false_alarm_rate"], figures["detection_rate"]) == (0, None, None)


def test_a_wrong_flag_is_a_usage_error(data: Path, tmp_path: Path) -> None:
    finished = evaluate(data, tmp_path / "out", "--checkpoint", "missing.safetensors")
    assert (finished.returncode, "missing.safetensors" in finished.stderr) == (2, True), finished.stderr


def test_a_folder_without_sites_is_a_usage_error(tmp_path: Path) -> None:
    finished = evaluate(tmp_path, tmp_path / "out")
    assert (finished.returncode, str(tmp_path) in finished.stderr) == (2, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_the_report_of_the_methods_done(
    data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    report = tmp_path / "out" / "report.json"
    flags = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--methods", "running-average,local"]
    with subprocess.Popen([*EVALUATE, str(data), *flags, "--seeds", "4"]) as process:
        while not (tmp_path / "out" / "report.md").exists():  # the last file written
            assert process.poll() is None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        process.send_signal(number)
        assert process.wait(60) == 130
    assert list(json.loads(report.read_text())["methods"]) == ["running-average"]
