"""Faults: processes that die, lines that break. `make soak` tries all of them for hours."""

from __future__ import annotations

import os

REPEATS = int(os.environ.get("CHAOS_REPEATS", "1"))
"""How often what depends on chance is tried."""
