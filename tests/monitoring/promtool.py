"""Prometheus' own programs, and its checks."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest


def program(name: str) -> str:
    """Path of one of them. Without it the test is skipped, or fails where MONITOR_TEST_REQUIRED is set."""
    found = shutil.which(name)
    if found is None:
        missing = f"{name} is missing: tests/monitoring/install has it, of Debian's packages"
        if os.environ.get("MONITOR_TEST_REQUIRED"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


def promtool(*arguments: str, text: str | None = None) -> str:
    """What promtool says; fails where it says that something is wrong, which for names it does with status 3."""
    command = [program("promtool"), *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
