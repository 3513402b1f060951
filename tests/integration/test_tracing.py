"""Traces from real processes at a real receiver of OTLP, and log lines that name them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from feddymem.client import InspectionClient, InvalidRequestError
from feddymem.client.errors import request_id_of
from feddymem.datasets import SiteData
from feddymem.v1.inspection_pb2 import InspectRequest, InspectStreamRequest
from feddymem.v1.inspection_pb2_grpc import InspectionServiceStub
from services.cli.status import get_status
from services.demo.processes import Fleet, RunningService
from services.runtime.trace_export import FLUSH_SECONDS
from tests.collector import Collector, Span, collecting
from tests.integration.conftest import System, edge_flags, inference_flags, serves

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
INSPECT, STREAM = "feddymem.v1.InspectionService/Inspect", "feddymem.v1.InspectionService/InspectStream"
UPLOAD, DOWNLOAD = "feddymem.v1.FederationService/UploadBank", "feddymem.v1.ReleaseService/DownloadArray"
STAGES = ("queue", "decode", "compute", "encode")
TIMEOUT_SECONDS = 60
TRACE, PARENT = "1" * 32, "2" * 16
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A receiver that all processes of the test are told of."""
    with collecting() as running:
        monkeypatch.setenv(ENDPOINT, running.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        yield running


def start_inference(fleet: Fleet, system: System) -> RunningService:
    """Another inference service of the system, once it scores."""
    inference = fleet.start("inference", "inference", *inference_flags(system.aggregator, system.edges.values()))
    for site in system.sites.values():
        fleet.wait_until(lambda site=site: serves(inference, site, 2), 60, "the release")  # type: ignore[misc]
    return inference


def inspect_from_a_process(server: str, *images: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli", "inspect", *map(str, images), "--server", server, "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def lines(service: RunningService) -> list[dict[str, object]]:
    """Our log lines; libraries written in C++ have some of their own when a process ends."""
    return [json.loads(line) for line in service.log.read_text().splitlines() if line.startswith("{")]


def child(collector: Collector, parent: Span, name: str, **wanted: str) -> Span:
    """The only span of a name directly below another one."""
    return collector.one(name, trace=parent.trace, parent=parent.id, **wanted)


def test_an_inspection_is_one_trace_from_the_client_to_the_parts_of_its_computation(
    fleet: Fleet, system: System, collector: Collector, products: dict[str, SiteData]
) -> None:
    inference, image = start_inference(fleet, system), products["brick-hall"].train[0]
    run = inspect_from_a_process(inference.grpc, image)
    assert (run.returncode, len(run.stdout.splitlines())) == (0, 1)
    client = collector.one(INSPECT, service="feddymem-inspect")
    assert (client.kind, client.parent, client.failed) == ("client", "", False)
    server = child(collector, client, INSPECT, service="feddymem-inference")
    assert server.kind == "server"
    assert server.attributes["rpc.response.status_code"] == "OK"
    inspection = child(collector, server, "inspection")
    wanted = {"feddymem.federation": "bricks", "feddymem.site": "", "feddymem.release": 2}
    assert inspection.attributes.items() >= wanted.items()
    parts = [child(collector, inspection, name) for name in STAGES]
    assert parts[2].attributes["feddymem.batch_images"] == 1
    assert 0 < sum(part.seconds for part in parts) <= inspection.seconds <= server.seconds <= client.seconds


def test_images_of_a_stream_are_below_the_stream(
    fleet: Fleet, system: System, collector: Collector, products: dict[str, SiteData]
) -> None:
    inference, image = start_inference(fleet, system), products["brick-hall"].train[0].read_bytes()
    requests = [InspectStreamRequest(id=f"{n}", inspect=InspectRequest(encoded=image)) for n in range(3)]
    requests.append(InspectStreamRequest(id="no image"))
    with grpc.insecure_channel(inference.grpc) as channel:
        stream = InspectionServiceStub(channel).InspectStream(
            iter(requests), timeout=TIMEOUT_SECONDS, metadata=(("traceparent", TRACEPARENT),)
        )
        assert [response.WhichOneof("outcome") for response in stream] == ["result"] * 3 + ["error"]
    server = collector.one(STREAM, trace=TRACE)
    assert (server.parent, server.kind) == (PARENT, "server")
    inspections = collector.wait_for(3, "inspection", trace=TRACE)
    assert [span.parent for span in inspections] == [server.id] * 3
    for inspection in inspections:
        for name in STAGES:
            child(collector, inspection, name)


def test_the_log_tells_of_a_refused_request_by_its_trace_and_by_the_id_that_the_caller_gets(
    fleet: Fleet, system: System, collector: Collector
) -> None:
    inference = start_inference(fleet, system)
    with grpc.insecure_channel(inference.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        InspectionServiceStub(channel).Inspect(
            InspectRequest(encoded=b"no image"), timeout=TIMEOUT_SECONDS, metadata=(("traceparent", TRACEPARENT),)
        )
    request_id = request_id_of(caught.value)
    server = collector.one(INSPECT, trace=TRACE)
    assert server.attributes["feddymem.request_id"] == request_id
    assert server.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert not server.failed  # the caller's fault
    [line] = [line for line in lines(inference) if line.get("request_id") == request_id]
    assert (line["event"], line["trace_id"], line["span_id"]) == ("rpc_refused", TRACE, server.id)
    with InspectionClient(inference.grpc) as client, pytest.raises(InvalidRequestError) as refused:
        client.inspect(b"no image")
    assert refused.value.request_id in str(refused.value)
    assert [line["event"] for line in lines(inference) if line.get("request_id") == refused.value.request_id] == [
        "rpc_refused"
    ]


def test_a_round_is_one_trace_to_the_aggregator_whose_aggregation_links_to_it(
    fleet: Fleet, collector: Collector, products: dict[str, SiteData], tmp_path: Path
) -> None:
    config = tmp_path / "aggregator.yaml"
    method = {"bank_items": 60, "memory_items": 100, "rounds": 1}
    config.write_text(json.dumps({"federations": {"parts": {"quorum": 1, "method": method}}}))
    aggregator = fleet.start("aggregator", "aggregator", "--config", str(config))
    fleet.launch("edge", "edge", *edge_flags(aggregator, products["dim-hall"]), "--input-size", "64")
    edge = fleet.wait_listening("edge")
    of_round = {"feddymem.federation": "parts", "feddymem.site": "dim-hall", "feddymem.round": 1}
    begun = collector.one("round", service="feddymem-edge-client")
    assert begun.parent == ""
    assert begun.attributes.items() >= of_round.items()
    child(collector, begun, "extraction")
    assert child(collector, begun, "local update").events == ("seeds", "averages")
    sent = child(collector, begun, UPLOAD, kind="client")
    received = child(collector, sent, UPLOAD, kind="server", service="feddymem-aggregator")
    aggregation = collector.one("aggregation", service="feddymem-aggregator")
    assert (aggregation.parent, aggregation.links) == ("", ((received.trace, received.id),))
    assert child(collector, aggregation, "k-means").attributes["feddymem.banks"] == 1
    child(collector, aggregation, "candidate")
    publish = collector.one("publish", service="feddymem-aggregator")
    assert (publish.parent, publish.links) == ("", aggregation.links)
    joined = collector.one("feddymem.v1.FederationService/Join", kind="client")
    child(collector, joined, "feddymem.v1.FederationService/Join", kind="server")
    traces = {str(line["event"]): line.get("trace_id") for service in (edge, aggregator) for line in lines(service)}
    assert traces["bank_made"] == traces["bank_accepted"] == begun.trace
    assert traces["released"] == publish.trace
    assert traces["listening"] is None
    fleet.start("inference", "inference", *inference_flags(aggregator, []))
    [fetched] = collector.wait_for(1, "release", service="feddymem-inference")
    for download in collector.wait_for(1, DOWNLOAD, trace=fetched.trace, kind="client"):
        child(collector, download, DOWNLOAD, kind="server", service="feddymem-aggregator")


def test_what_was_not_sent_yet_is_sent_when_a_service_stops(
    fleet: Fleet, collector: Collector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    aggregator = start_aggregator(fleet, tmp_path)
    get_status(aggregator.grpc)
    assert collector.spans == []
    assert fleet.kill("aggregator", signal.SIGTERM) == 0
    assert [span.name for span in collector.spans] == ["feddymem.v1.FederationService/GetStatus"]


def start_aggregator(fleet: Fleet, folder: Path) -> RunningService:
    config = folder / "aggregator.yaml"
    config.write_text(json.dumps({"federations": {"parts": {}}}))
    return fleet.start("aggregator", "aggregator", "--config", str(config))


@pytest.fixture(params=["closed", "silent"])
def nobody(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes are told of a collector that is not there, or that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{silent.getsockname()[1] if request.param == 'silent' else 1}")
        yield


@pytest.mark.usefixtures("nobody")
def test_without_its_collector_a_service_inspects_says_little_of_it_and_stops_soon(
    fleet: Fleet, system: System, products: dict[str, SiteData]
) -> None:
    inference, site = start_inference(fleet, system), products["brick-hall"]
    with InspectionClient(inference.grpc, attempts=1, window=1) as client:
        results = list(client.inspect_many(site.train[:4] * 10))
    assert [type(result).__name__ for result in results] == ["InspectionResult"] * 40
    started = time.monotonic()
    assert fleet.kill("inference", signal.SIGTERM) == 0
    assert time.monotonic() - started < FLUSH_SECONDS + 10
    told = [line["event"] for line in lines(inference) if str(line["event"]).startswith("traces")]
    assert len(told) <= 3
    assert "traces_lost" in told
    assert "library" not in {line["event"] for line in lines(inference)}


@pytest.mark.usefixtures("nobody")
def test_without_its_collector_a_command_does_its_work(system: System, products: dict[str, SiteData]) -> None:
    run = inspect_from_a_process(system.inference.grpc, *products["brick-hall"].train[:2])
    assert run.returncode == 0
    assert [json.loads(line)["release"] for line in run.stdout.splitlines()] == [2, 2]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {ENDPOINT: "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {ENDPOINT: "x", "OTEL_TRACES_EXPORTER": "none"},
    ],
    ids=["no endpoint", "disabled", "no exporter"],
)
def test_where_no_traces_are_wanted_the_sdk_is_not_even_imported(environment: dict[str, str]) -> None:
    program = """
import sys
import services.aggregator.main, services.edge_client.main, services.inference.main, services.cli.inspect
from services.runtime import tracing
from services.runtime.trace_export import exported_traces
with exported_traces("test"), tracing.span("something"):
    assert not tracing.enabled()
print(sorted(name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))))
"""
    known = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**known, **environment},
    )
    assert (run.stdout, run.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli"),
    ],
)
def test_a_variable_that_cannot_be_followed_ends_the_start_and_is_named(
    system: System, products: dict[str, SiteData], name: str, value: str
) -> None:
    environment = {ENDPOINT: "http://127.0.0.1:1", name: value}
    run = inspect_from_a_process(system.inference.grpc, products["brick-hall"].train[0], **environment)
    assert run.returncode == 2
    assert name in run.stderr
    assert value in run.stderr
    assert "Traceback" not in run.stderr
