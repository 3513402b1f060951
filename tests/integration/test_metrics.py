"""The /metrics of real services: all that the page lists is there, named as Prometheus would have it."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from feddymem.client import InspectionClient
from services.demo.processes import RunningService
from services.inference.settings import InferenceSettings
from tests.integration.conftest import TIMEOUT_SECONDS, System
from tests.monitoring.prometheus_rule import ROOT, RULES
from tests.monitoring.promtool import promtool

SERVICES = ("aggregator", "edge", "inference")
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scraped(service: RunningService) -> str:
    with urllib.request.urlopen(f"http://{service.metrics}/metrics", timeout=TIMEOUT_SECONDS) as page:
        return str(page.read().decode())


def samples(text: str) -> Samples:
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in found}


@pytest.fixture
def inspected(system: System) -> tuple[Samples, Samples]:
    """What inference has counted before and after two inspections: an anomalous one, and one without a threshold."""
    [site, *_] = system.sites.values()
    before = samples(scraped(system.inference))
    with InspectionClient(system.inference.grpc, site=site.name) as client:
        client.inspect(site.train[0], threshold=0.0)
        client.inspect(site.train[0])
    return before, samples(scraped(system.inference))


def services(system: System) -> dict[str, RunningService]:
    return dict(zip(SERVICES, (system.aggregator, next(iter(system.edges.values())), system.inference), strict=True))


@pytest.mark.parametrize("name", SERVICES)
def test_names_and_types_are_as_promtool_wants_them(system: System, name: str) -> None:
    promtool("check", "metrics", text=scraped(services(system)[name]))


def test_what_the_page_lists_is_there_with_the_collectors_of_the_process(
    system: System, inspected: tuple[Samples, Samples]
) -> None:
    names = set()
    for service in services(system).values():
        text = scraped(service)
        names |= set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
        assert {"process_resident_memory_bytes", "python_info", "feddymem_build_info"} <= names
        assert "_created" not in text
        shown = samples(text)
        assert shown["feddymem_ready", ()] == 1
        assert 0 < shown["feddymem_state_free_bytes", ()] <= shown["feddymem_state_size_bytes", ()]
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"^\| `(feddymem_\w+)`", page, re.MULTILINE)) == {
        name for name in names if name.startswith("feddymem_")
    }


def test_every_metric_of_a_rule_is_shown_by_some_service(system: System, inspected: tuple[Samples, Samples]) -> None:
    shown = {name for service in services(system).values() for name, _labels in samples(scraped(service))}
    rules = [rule for group in yaml.safe_load(Path(RULES).read_text())["groups"] for rule in group["rules"]]
    used = {name for rule in rules for name in re.findall(r"(?<![:\w])(?:feddymem|process)_\w+\b(?!:)", rule["expr"])}
    assert used - shown == set()


def test_an_inspection_is_counted_where_it_belongs(inspected: tuple[Samples, Samples]) -> None:
    before, after = inspected

    def more(name: str, **labels: str) -> float:
        key = name, tuple(sorted(labels.items()))
        return after[key] - before.get(key, 0)

    assert more("feddymem_inspections_total", outcome="anomalous") == 1
    assert more("feddymem_inspections_total", outcome="ok") == 1
    assert more("feddymem_verdicts_total", federation="bricks", verdict="anomalous") == 1
    assert more("feddymem_inspection_score_ratio_count", federation="bricks") == 2
    for part in ("duration", "queue", "decode", "compute", "encode"):
        assert more(f"feddymem_inspection_{part}_seconds_count") == 2
    parts = sum(more(f"feddymem_inspection_{part}_seconds_sum") for part in ("queue", "decode", "compute", "encode"))
    assert 0 < parts <= more("feddymem_inspection_duration_seconds_sum")
    assert more("feddymem_inspection_batch_images_sum") == 2
    method = "/feddymem.v1.InspectionService/Inspect"
    assert more("feddymem_rpc_started_total", method=method) == 2
    assert more("feddymem_rpc_handled_total", method=method, code="OK") == 2


def test_a_federation_that_is_done_says_so(system: System) -> None:
    shown = samples(scraped(system.aggregator))
    of = (("federation", "bricks"),)
    assert shown["feddymem_federation_phase", (*of, ("phase", "done"))] == 1
    assert (shown["feddymem_sites_known", of], shown["feddymem_sites_present", of]) == (2, 2)
    assert {shown["feddymem_site_present", (*of, ("site", site))] for site in system.sites} == {1}
    assert shown["feddymem_release_version", of] == 2
    inference = samples(scraped(system.inference))
    assert inference["feddymem_serving_release_version", of] == 2
    assert (
        shown["feddymem_release_timestamp_seconds", of] == inference["feddymem_serving_release_timestamp_seconds", of]
    )
    assert inference["feddymem_inspection_queue_images", ()] == inference["feddymem_inspections_waiting", ()] == 0
    assert inference["feddymem_inspection_queue_limit_images", ()] == InferenceSettings(aggregator="127.0.0.1:1").room
    assert inference["feddymem_publishers_connected", (("role", "aggregator"),)] == 1
    assert inference["feddymem_publishers_connected", (("role", "site"),)] == 2
    assert shown["feddymem_published_bytes_total", of] > 0
    edge = samples(scraped(services(system)["edge"]))
    assert 0 < edge["feddymem_edge_memory_reduce_ratio", ()] < 1
    assert edge["feddymem_edge_features_total", ()] > 0
    assert edge["feddymem_edge_extraction_seconds_total", ()] > 0
