"""The `feddymem` command itself."""

from __future__ import annotations

import subprocess
import sys


def test_torch_is_loaded_by_commands_and_not_before_its_threads_are_told_to_sleep() -> None:
    """OpenMP reads GOMP_SPINCOUNT once, when torch loads it."""
    loaded = "import sys, services.cli.main; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, check=True).stdout == b"False\n"
