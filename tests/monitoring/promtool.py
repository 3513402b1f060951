"""Prometheus' own checks."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def promtool(*arguments: str, text: str | None = None) -> str:
    """What promtool says; fails where it says that something is wrong, which for names it does with status 3."""
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is missing: tests/monitoring/install has it, of Debian's package `prometheus`")
    done = subprocess.run([found, *arguments], input=text, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
