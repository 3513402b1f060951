"""Grafana's dashboards, as tables of panels; monitoring/dashboards has the files that they become."""

from __future__ import annotations

from tests.monitoring.dashboards import federation, inspection, site
from tests.monitoring.prometheus_rule import ROOT

FOLDER = ROOT / "monitoring" / "dashboards"
DASHBOARDS = (inspection.DASHBOARD, federation.DASHBOARD, site.DASHBOARD)
