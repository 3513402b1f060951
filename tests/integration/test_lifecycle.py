"""Processes that start wrong, stop, die and come back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from feddymem.client import InspectionClient, InspectionError, UnavailableError
from feddymem.datasets import SiteData
from feddymem.v1.federation_pb2 import PHASE_DONE, PHASE_OPEN
from services.cli.status import get_status
from services.demo.processes import Fleet, RunningService
from tests.integration.conftest import StartAggregator, System, edge_flags, inference_flags, serves

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
METHOD = {"generator": True, "bank_items": 60, "memory_items": 100, "rounds": 2}
TIMEOUT_SECONDS = 60


def run_service(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a service that is expected to end by itself."""
    addresses = ("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments, *addresses],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **(environment or {})},
    )


def events(service: RunningService) -> list[dict[str, object]]:
    return [json.loads(line) for line in service.log.read_text().splitlines()]


@pytest.fixture
def aggregator(start_aggregator: StartAggregator) -> RunningService:
    return start_aggregator(quorum=1, method=METHOD)


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (("edge", "--site", "a"), {}, "aggregator: is required"),
        (("aggregator",), {"FEDDYMEM_FEDERATION": "x"}, "FEDDYMEM_FEDERATION"),
        (("inference", "--aggregator", "h:1", "--queue-size", "0"), {}, "queue_size: "),
    ],
)
def test_a_wrong_setting_ends_the_start_and_is_named(
    arguments: tuple[str, ...], environment: dict[str, str], said: str
) -> None:
    run = run_service(*arguments, environment=environment)
    assert run.returncode == 2
    assert said in run.stderr
    assert "Traceback" not in run.stderr


def test_an_address_in_use_ends_the_start_and_is_named(aggregator: RunningService, tmp_path: Path) -> None:
    addresses = ("--listen", aggregator.grpc, "--metrics-listen", "127.0.0.1:0")
    state = ("--state-dir", str(tmp_path / "state"))
    run = subprocess.run(
        [sys.executable, "-m", "services.cli", "inference", "--aggregator", "127.0.0.1:1", *addresses, *state],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1
    assert aggregator.grpc in run.stderr
    assert "Traceback" not in run.stderr


def test_an_edge_client_without_images_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    flags = (
        "--aggregator",
        "127.0.0.1:1",
        "--federation",
        "parts",
        "--site",
        "a",
        "--state-dir",
        str(tmp_path / "state"),
    )
    run = run_service("edge", *flags, "--data", str(tmp_path / "empty"))
    assert (run.returncode, str(tmp_path / "empty") in run.stderr) == (2, True)
    (tmp_path / "empty" / "x.png").write_bytes(b"broken")
    run = run_service("edge", *flags, "--data", str(tmp_path / "empty"))
    assert (run.returncode, "x.png" in run.stderr) == (2, True)


def test_an_unreadable_image_is_skipped_counted_and_named(
    fleet: Fleet, aggregator: RunningService, products: dict[str, SiteData], tmp_path: Path
) -> None:
    site = products["dim-hall"]
    shutil.copytree(site.train[0].parent, tmp_path / "images")
    (tmp_path / "images" / "broken.png").write_bytes(b"broken")
    flags = edge_flags(aggregator, site)
    flags[flags.index("--data") + 1] = str(tmp_path / "images")
    edge = fleet.start("edge", "edge", *flags)
    fleet.wait_until(lambda: get_status(aggregator.grpc).federations[0].phase == PHASE_DONE, TIMEOUT_SECONDS, "rounds")
    [skipped] = [event for event in events(edge) if event["event"] == "image_skipped"]
    assert "broken.png" in str(skipped["reason"])
    [extracted] = [event for event in events(edge) if event["event"] == "features_extracted"]
    assert (extracted["images"], extracted["skipped"]) == (len(site.train), 1)


def test_a_second_edge_client_of_a_site_is_refused(
    fleet: Fleet, start_aggregator: StartAggregator, products: dict[str, SiteData], tmp_path: Path
) -> None:
    aggregator = start_aggregator(quorum=2, method=METHOD)
    flags = edge_flags(aggregator, products["dim-hall"])
    fleet.start("edge", "edge", *flags)

    def present() -> bool:
        return any(site.present for site in get_status(aggregator.grpc).federations[0].sites)

    fleet.wait_until(present, TIMEOUT_SECONDS, "the first edge client")
    run = run_service("edge", *flags, "--state-dir", str(tmp_path / "second"))
    assert (run.returncode, "another edge client" in run.stderr) == (3, True)


def test_once_ends_when_the_federation_is_done(
    aggregator: RunningService, products: dict[str, SiteData], tmp_path: Path
) -> None:
    flags = edge_flags(aggregator, products["dim-hall"])
    run = run_service("edge", *flags, "--once", "--state-dir", str(tmp_path / "state"))
    assert run.returncode == 0, run.stderr
    assert get_status(aggregator.grpc).federations[0].release == 2


def test_a_state_folder_of_another_site_is_refused(
    aggregator: RunningService, products: dict[str, SiteData], tmp_path: Path
) -> None:
    state = ("--once", "--state-dir", str(tmp_path / "state"))
    assert run_service("edge", *edge_flags(aggregator, products["dim-hall"]), *state).returncode == 0
    run = run_service("edge", *edge_flags(aggregator, products["brick-hall"]), *state)
    assert (run.returncode, "site dim-hall" in run.stderr, "Traceback" in run.stderr) == (1, True, False)


def test_a_damaged_release_on_disk_is_fetched_again(
    fleet: Fleet, aggregator: RunningService, products: dict[str, SiteData]
) -> None:
    site = products["dim-hall"]
    edge = fleet.start("edge", "edge", *edge_flags(aggregator, site))
    flags = inference_flags(aggregator, [edge])
    inference = fleet.start("inference", "inference", *flags)
    fleet.wait_until(lambda: serves(inference, site, 2), TIMEOUT_SECONDS, "release 2")
    fleet.kill("inference")
    for array in (inference.log.parent / "state" / "arrays").iterdir():
        array.write_bytes(bytes(array.stat().st_size))
    inference = fleet.start("inference", "inference", *flags)
    fleet.wait_until(lambda: serves(inference, site, 2), TIMEOUT_SECONDS, "release 2, fetched again")


def test_an_edge_client_killed_in_a_round_finishes_it_after_its_restart(
    fleet: Fleet, start_aggregator: StartAggregator, products: dict[str, SiteData]
) -> None:
    aggregator = start_aggregator(quorum=2, sites=["dim-hall", "brick-hall"], method=METHOD)
    names = ("dim-hall", "brick-hall")
    for name in names:
        fleet.launch(name, "edge", *edge_flags(aggregator, products[name]))

    def opened() -> bool:
        return get_status(aggregator.grpc).federations[0].phase == PHASE_OPEN

    fleet.wait_until(opened, TIMEOUT_SECONDS, "the first round")
    fleet.kill("dim-hall")
    fleet.launch("dim-hall", "edge", *edge_flags(aggregator, products["dim-hall"]))
    fleet.wait_until(lambda: get_status(aggregator.grpc).federations[0].phase == PHASE_DONE, TIMEOUT_SECONDS, "rounds")
    sites = get_status(aggregator.grpc).federations[0].sites
    assert [site.last_round for site in sites] == [2, 2]


def test_sigterm_ends_every_service_with_0_although_it_is_being_watched(
    fleet: Fleet, aggregator: RunningService, products: dict[str, SiteData]
) -> None:
    edge = fleet.start("edge", "edge", *edge_flags(aggregator, products["dim-hall"]))
    inference = fleet.start("inference", "inference", *inference_flags(aggregator, [edge]))
    fleet.wait_until(lambda: serves(inference, products["dim-hall"], 2), TIMEOUT_SECONDS, "release 2")
    with grpc.insecure_channel(inference.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
        assert next(watch).status == SERVING
        for service in (aggregator, edge, inference):
            started = time.monotonic()
            assert fleet.kill(service.name, signal.SIGTERM) == 0
            assert (
                time.monotonic() - started < 15
            )  # the drain limit is 20: nothing was in work, so nothing is waited for
            assert "Traceback" not in service.log.read_text()
        assert next(watch).status == NOT_SERVING
        watch.cancel()


def test_inference_is_ready_exactly_when_it_can_score_and_needs_nobody_to_go_on(
    fleet: Fleet, aggregator: RunningService, products: dict[str, SiteData]
) -> None:
    site = products["dim-hall"]
    inference = fleet.start("inference", "inference", *inference_flags(aggregator, []))
    with grpc.insecure_channel(inference.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
        assert next(watch).status == NOT_SERVING
        with InspectionClient(inference.grpc, attempts=1) as client, pytest.raises(UnavailableError):
            client.inspect(site.train[0])
        watch.cancel()
    fleet.kill("inference", signal.SIGTERM)
    edge = fleet.start("edge", "edge", *edge_flags(aggregator, site))
    inference = fleet.start("inference", "inference", *inference_flags(aggregator, [edge]))
    fleet.wait_until(lambda: serves(inference, site, 2), TIMEOUT_SECONDS, "release 2")

    fleet.kill("aggregator")
    fleet.kill("edge")
    assert serves(inference, site, 2)

    fleet.kill("inference")
    inference = fleet.start("inference", "inference", *inference_flags(aggregator, [edge]))
    fleet.wait_until(lambda: serves(inference, site, 2), TIMEOUT_SECONDS, "release 2 from disk")
    with grpc.insecure_channel(inference.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS).status == SERVING


def test_an_overloaded_queue_refuses_with_a_hint_and_serves_the_rest(system: System, fleet: Fleet) -> None:
    site = system.sites["dim-hall"]
    flags = inference_flags(system.aggregator, system.edges.values())
    inference = fleet.start("inference", "inference", *flags, "--queue-size", "2")
    fleet.wait_until(lambda: serves(inference, site, 2), TIMEOUT_SECONDS, "release 2")
    image = site.train[0].read_bytes()
    together = threading.Barrier(16)

    with InspectionClient(inference.grpc, site=site.name, attempts=1) as client:

        def call(_number: int) -> tuple[grpc.StatusCode, str]:
            together.wait()
            try:
                client.inspect(image)
            except InspectionError as error:
                return error.status, str(error)
            return grpc.StatusCode.OK, ""

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(call, range(16)))
    codes = {code for code, _ in answers}
    assert codes == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all("try again in" in text for code, text in answers if code == grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert serves(inference, site, 2)


@pytest.mark.parametrize("generator", [True, False])
def test_a_release_is_swapped_in_under_load_without_a_failed_request(
    fleet: Fleet, start_aggregator: StartAggregator, products: dict[str, SiteData], generator: bool
) -> None:
    """Without memory generators the inference service needs no edge client."""
    aggregator = start_aggregator(quorum=1, method={**METHOD, "generator": generator, "rounds": 4})
    site = products["dim-hall"]
    edge = fleet.start("edge", "edge", *edge_flags(aggregator, site))
    inference = fleet.start("inference", "inference", *inference_flags(aggregator, [edge] if generator else []))
    fleet.wait_until(lambda: served_release(inference, site) > 0, TIMEOUT_SECONDS, "a release")
    with InspectionClient(inference.grpc, site=site.name) as client:
        seen = list(releases_until(client, site, 4))
    assert seen == sorted(seen)
    assert seen[-1] == 4


def served_release(inference: RunningService, site: SiteData) -> int:
    return next((release for release in range(1, 5) if serves(inference, site, release)), 0)


def releases_until(client: InspectionClient, site: SiteData, last: int) -> Iterator[int]:
    """Releases that answer, request after request; a failed request raises."""
    image = site.train[0].read_bytes()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    release = 0
    while release < last:
        assert time.monotonic() < deadline
        release = client.inspect(image).release
        yield release
