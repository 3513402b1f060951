"""The dashboards' files: `make dashboards` writes them, `make check` fails where they are stale.

Run as a module; with the argument `write` it writes.
"""

from __future__ import annotations

import sys

from tests.monitoring.dashboards import DASHBOARDS, FOLDER
from tests.monitoring.prometheus_rule import ROOT

for dashboard in DASHBOARDS:
    file = FOLDER / f"{dashboard.name}.json"
    if sys.argv[1:] == ["write"]:
        file.write_text(dashboard.json())
    elif not file.exists() or file.read_text() != dashboard.json():
        sys.exit(f"stale: {file.relative_to(ROOT)}; run `make dashboards`")
