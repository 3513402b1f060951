"""Real Prometheus, real Alertmanager, real services: `make monitor-test`. What is shipped runs, only faster."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from services.demo.prometheus import NoPrometheusError, find_prometheus
from tests.monitoring.dashboards import DASHBOARDS
from tests.monitoring.dashboards.filled import filled
from tests.monitoring.dashboards.grafana import Dashboard, Panel
from tests.monitoring.faster import faster
from tests.monitoring.servers import Prometheus, asked, find_alertmanager
from tests.monitoring.stack import TOLD, Stack
from tests.monitoring.test_rules import ALERTS, RECORDS

pytestmark = [pytest.mark.monitor, pytest.mark.timeout(900)]

PANELS = [(dashboard, panel) for dashboard in DASHBOARDS for panel in dashboard.panels]


@dataclass(frozen=True)
class Seen:
    """What happened, and the servers that know of it.

    Attributes:
        fired: alerts that Alertmanager had while all was broken.
        left: alerts of those that were broken on purpose that it has when all is mended.
        ended: when, in seconds since the epoch.
    """

    stack: Stack
    fired: dict[str, str]
    left: set[str]
    ended: float

    @property
    def prometheus(self) -> Prometheus:
        return self.stack.prometheus


def active(stack: Stack) -> dict[str, str]:
    """Alerts that Alertmanager has, with their summaries."""
    return {
        alert["labels"]["alertname"]: alert["annotations"]["summary"]
        for alert in asked(stack.alertmanager, "v2/alerts", active="true")
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """All is well, is broken until whoever is on call hears of it, and is mended until they hear of that."""
    try:
        programs = find_prometheus(), find_alertmanager()
    except NoPrometheusError as error:
        if os.environ.get("MONITOR_TEST_REQUIRED"):
            pytest.fail(str(error))
        pytest.skip(f"monitor-test is skipped: {error}")
    with Stack(tmp_path_factory.mktemp("monitor"), *programs) as stack:
        stack.break_all()
        stack.wait(lambda: stack.told("firing"), f"somebody to be told of {', '.join(TOLD)}")
        fired = active(stack)
        stack.mend_all()
        stack.wait(lambda: stack.told("resolved"), "somebody to be told that all is well again")
        stack.wait(stack.all_up, "every target to be up")
        yield Seen(stack, fired, active(stack).keys() & TOLD.keys(), time.time())


def test_alerts_reach_alertmanager_and_their_receivers_and_resolve(seen: Seen) -> None:
    assert seen.fired.keys() >= TOLD.keys()
    assert seen.fired["SiteSilent"] == "site dim-hall of bricks is silent"
    assert seen.fired["InspectionErrors"].endswith("of the inspections of brick-hall fail")
    assert seen.left == set()


def test_every_rule_is_evaluated(seen: Seen) -> None:
    rules = seen.prometheus.rules()
    assert len(rules) == len(ALERTS) + len(RECORDS)
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []


@pytest.mark.parametrize(
    ("dashboard", "panel"), PANELS, ids=[f"{dashboard.name}-{panel.title}" for dashboard, panel in PANELS]
)
def test_panel_has_data(seen: Seen, dashboard: Dashboard, panel: Panel) -> None:
    values = {variable.name: seen.prometheus.values(variable.of, variable.metric) for variable in dashboard.variables}
    for query in panel.queries:
        expr = faster(filled(query.expr, values))
        assert seen.prometheus.numbers(expr, seen.stack.started, seen.ended), f"{panel.title!r} is empty: {expr}"


def test_a_query_without_data_is_found(seen: Seen) -> None:
    for expr in ("feddymem_gone", "feddymem_ready > 1", "0 * feddymem_ready / 0"):
        assert seen.prometheus.numbers(expr, seen.stack.started, seen.ended) == []
