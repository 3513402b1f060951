"""For all tests, before any of them loads torch."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as `feddymem` does, see services/cli/main.py
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell starts the tests in the background
