"""For all tests, before any of them loads torch."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `feddymem` does, see services/cli/main.py
