"""The dashboards: what Grafana must be able to rely on, and what whoever is on call must."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import yaml

import services.aggregator.metrics
import services.edge_client.metrics
import services.inference.metrics
import services.runtime.metrics  # noqa: F401 - registers its metrics
from tests.monitoring.dashboards import DASHBOARDS, FOLDER
from tests.monitoring.dashboards.filled import filled
from tests.monitoring.dashboards.grafana import COLUMNS, DATASOURCE, Dashboard
from tests.monitoring.prometheus_rule import ROOT
from tests.monitoring.promtool import promtool
from tests.monitoring.test_rules import ALERTS, RECORDS

MODELS: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
UNITS = {"short", "none", "percentunit", "s", "bytes", "reqps", "cps", "dateTimeFromNow"}
"""As Grafana calls them (packages/grafana-data/src/valueFormats/categories.ts)."""
OTHERS = {"up", "ALERTS", "process_cpu_seconds_total", "process_resident_memory_bytes"}
"""Series that are Prometheus' own, or its client's."""
BY_NAME = {dashboard.name: dashboard for dashboard in DASHBOARDS}


def panels(name: str) -> list[dict[str, Any]]:
    return [panel for panel in MODELS[name]["panels"] if panel["type"] != "row"]


def expressions(name: str) -> list[str]:
    return [target["expr"] for panel in panels(name) for target in panel["targets"]]


def names(expr: str) -> set[str]:
    """Metrics and recordings in PromQL; what stands in braces, brackets, quotes and after `by` or `on` is none."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|on|ignoring|without|group_left) *\([^)]*\)", "", expr)
    return set(re.findall(r"\b(?:[a-z_]+:)?(?:feddymem|process)[a-z0-9_:]+|\bup\b|\bALERTS\b", bare))


def metric(name: str) -> str:
    """Name on the page, of a series of a histogram."""
    return re.sub(r"_(bucket|sum|count)$", "", name)


def test_files_are_of_the_dashboards_as_they_are_now() -> None:
    assert MODELS.keys() == BY_NAME.keys()
    for name, dashboard in BY_NAME.items():
        assert (FOLDER / f"{name}.json").read_text() == dashboard.json(), "stale: run `make dashboards`"


def test_cluster_gets_each_file() -> None:
    generated = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["configMapGenerator"]
    assert sorted(file for each in generated for file in each["files"]) == [f"{name}.json" for name in MODELS]
    assert [each["name"] for each in generated] == [
        f"feddymem-dashboard-{each['files'][0].removesuffix('.json')}" for each in generated
    ]


def test_dashboards_have_ids_of_their_own() -> None:
    assert len({model["uid"] for model in MODELS.values()}) == len({model["title"] for model in MODELS.values()}) == 3


@pytest.mark.parametrize("name", MODELS)
def test_panels_have_ids_of_their_own_and_lie_beside_each_other(name: str) -> None:
    every = MODELS[name]["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    taken: set[tuple[int, int]] = set()
    for panel in every:
        place = panel["gridPos"]
        cells = {
            (column, line)
            for column in range(place["x"], place["x"] + place["w"])
            for line in range(place["y"], place["y"] + place["h"])
        }
        assert cells, panel["title"]
        assert not cells & taken, panel["title"]
        assert max(cells)[0] < COLUMNS, panel["title"]
        taken |= cells
    assert len(taken) == COLUMNS * (max(line for _, line in taken) + 1), "there are holes"


@pytest.mark.parametrize("name", MODELS)
def test_every_query_is_of_the_chosen_datasource(name: str) -> None:
    def found(value: object) -> list[object]:
        if isinstance(value, dict):
            return [inner for key, each in value.items() for inner in ([each] if key == "datasource" else found(each))]
        return [inner for each in value for inner in found(each)] if isinstance(value, list) else []

    assert all(source == DATASOURCE for source in found(MODELS[name]))
    assert len(found(MODELS[name]["panels"])) == len(panels(name)) + len(expressions(name))
    [first, *_] = MODELS[name]["templating"]["list"]
    assert (first["name"], first["type"], first["query"]) == ("datasource", "datasource", "prometheus")


@pytest.mark.parametrize("name", MODELS)
def test_variables_are_there_and_used(name: str) -> None:
    known = [variable["name"] for variable in MODELS[name]["templating"]["list"]]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(MODELS[name]["panels"])))
    assert used == {*known, "__rate_interval"}


@pytest.mark.parametrize("name", MODELS)
def test_panels_say_what_they_show_in_units_that_grafana_knows(name: str) -> None:
    titles = [(panel["title"], panel["type"]) for panel in panels(name)]
    assert len(set(titles)) == len(titles)
    for panel in panels(name):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        legends = [target["legendFormat"] for target in panel["targets"]]
        assert len(set(legends)) == len(legends), panel["title"]
        steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        values = [step["value"] for step in steps]
        assert values == [None, *sorted(values[1:])], panel["title"]
    assert [target["refId"] for panel in panels(name) for target in panel["targets"][:1]] == ["A"] * len(panels(name))


@pytest.mark.parametrize("name", MODELS)
def test_first_row_says_whether_it_is_healthy(name: str) -> None:
    heading, *rest = MODELS[name]["panels"]
    assert (heading["type"], heading["title"]) == ("row", "Is it healthy?")
    row = rest[: next(index for index, panel in enumerate(rest) if panel["type"] == "row")]
    assert {panel["type"] for panel in row} == {"stat"}
    colours = [step["color"] for panel in row for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]]
    assert {"green", "red"} <= set(colours)
    assert all(panel["options"]["colorMode"] == "background" for panel in row)


@pytest.mark.parametrize("name", MODELS)
def test_queries_are_of_metrics_and_alerts_that_there_are(name: str) -> None:
    known = set(prometheus_client.REGISTRY._names_to_collectors) | set(RECORDS) | OTHERS
    for expr in expressions(name):
        assert names(expr), expr
        assert names(expr) <= known, expr
        for alerts in re.findall(r'alertname=~"([^"]*)"', expr):
            assert set(alerts.split("|")) <= ALERTS.keys(), expr


def test_every_metric_of_the_page_is_on_a_dashboard_or_in_a_rule() -> None:
    shown = {metric(each) for name in MODELS for expr in expressions(name) for each in names(expr)}
    shown |= {metric(each) for text in (FOLDER.parent / "rules.yaml").read_text().splitlines() for each in names(text)}
    page = re.findall(r"^\| `(feddymem_\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    assert set(page) - shown == set()


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
@pytest.mark.parametrize("chosen", [(), ("a", "b.c")], ids=["all", "two"])
def test_prometheus_takes_every_query(dashboard: Dashboard, chosen: tuple[str, ...], tmp_path: Path) -> None:
    values = {variable.name: chosen for variable in dashboard.variables}
    queries = [filled(query.expr, values) for panel in dashboard.panels for query in panel.queries]
    assert not [query for query in queries if "$" in query]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    assert f"{len(queries)} rules found" in promtool("check", "rules", str(file))


def test_a_query_that_prometheus_does_not_take_is_found(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": [{"record": "query", "expr": "sum(up"}]}]}))
    with pytest.raises(AssertionError):
        promtool("check", "rules", str(file))


def test_chosen_values_are_taken_literally() -> None:
    assert filled('up{site=~"$site"}', {"site": ["a.b", "c"]}) == r'up{site=~"(a\\.b|c)"}'
    assert filled('up{site=~"$site"}', {"site": []}) == 'up{site=~".*"}'
