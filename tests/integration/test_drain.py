"""A service that is told to stop: it says so first, takes nothing more, and finishes what it has begun."""

from __future__ import annotations

import queue
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from feddymem.v1.federation_pb2 import (
    PHASE_AGGREGATING,
    PHASE_DONE,
    PHASE_OPEN,
    GetStatusRequest,
    UploadBankRequest,
    UploadBankResponse,
)
from feddymem.v1.inspection_pb2 import InspectRequest, InspectStreamRequest
from feddymem.v1.inspection_pb2_grpc import InspectionServiceStub
from services.demo.processes import Fleet, RunningService
from services.runtime.arrays import bank_to_wire, chunks
from services.runtime.settings import ServiceSettings
from tests.chaos.federation import Trial, wait
from tests.integration.fake_site import FakeSite, make_bank

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
TIMEOUT_SECONDS = 60
DRAIN_SECONDS = ServiceSettings.model_fields["drain_seconds"].default

Request = TypeVar("Request")


class Stream(Generic[Request]):
    """What a caller sends on a stream, as it comes to say it."""

    def __init__(self) -> None:
        self._said: queue.Queue[Request | None] = queue.Queue()

    def send(self, *requests: Request) -> None:
        for request in requests:
            self._said.put(request)

    def close(self) -> None:
        self._said.put(None)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._said.get, None)


@contextmanager
def stopping(service: RunningService, channel: grpc.Channel) -> Iterator[None]:
    """SIGTERM before the block, in which the service drains; it ends after the block, well and in time."""
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
    assert next(watch).status == SERVING
    service.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert next(watch).status == NOT_SERVING
    yield
    watch.cancel()
    assert service.process.wait(TIMEOUT_SECONDS) == 0
    assert time.monotonic() - started < DRAIN_SECONDS
    assert "Traceback" not in service.log.read_text()


def is_refused(call: Any) -> bool:
    """Whether a new call is; for a moment after it has said that it stops, a service still takes some."""
    try:
        call(timeout=TIMEOUT_SECONDS)
    except grpc.RpcError as error:
        return error.code() is grpc.StatusCode.UNAVAILABLE
    return False


def test_inspections_in_flight_are_answered(trial: Trial, images: dict[str, Path]) -> None:
    trial.run({})
    trial.outcome()
    service = trial.fleet.wait_listening("inference")
    site = trial.sites[0]
    inspection = InspectRequest(site=site, encoded=min(images[site].iterdir()).read_bytes())
    with grpc.insecure_channel(service.grpc) as channel:
        stub = InspectionServiceStub(channel)
        line: Stream[InspectStreamRequest] = Stream()
        answers = stub.InspectStream(iter(line), timeout=TIMEOUT_SECONDS)
        line.send(InspectStreamRequest(id="before", inspect=inspection))
        assert next(answers).HasField("result")
        line.send(*(InspectStreamRequest(id=f"{number} in flight", inspect=inspection) for number in range(5)))
        with stopping(service, channel):
            wait(lambda: is_refused(partial(stub.Inspect, inspection)), trial.logs)
            line.send(InspectStreamRequest(id="after", inspect=inspection))
            line.close()
            rest = list(answers)
        assert [answer.id for answer in rest] == [*(f"{number} in flight" for number in range(5)), "after"]
        assert all(answer.HasField("result") for answer in rest)
        assert answers.code() is grpc.StatusCode.OK


def test_an_upload_in_flight_is_accepted_and_counts(trial: Trial) -> None:
    trial.start("aggregator")
    service = trial.fleet.wait_listening("aggregator")
    with grpc.insecure_channel(service.grpc) as channel:
        sites = [FakeSite(channel, name) for name in trial.sites]
        for site in sites:
            site.join()
        sites[0].wait_for(PHASE_OPEN, 1)
        arrays = bank_to_wire(make_bank(), "uint8")
        upload: Stream[UploadBankRequest] = Stream()
        answers = sites[0].rounds.UploadBank(iter(upload), timeout=TIMEOUT_SECONDS)
        upload.send(UploadBankRequest(header=sites[0].header(arrays)))
        assert next(answers).HasField("resume")
        with stopping(service, channel):
            wait(lambda: is_refused(partial(sites[1].rounds.GetStatus, GetStatusRequest())), trial.logs)
            for array in arrays:
                upload.send(*(UploadBankRequest(chunk=chunk) for chunk in chunks(array.manifest.sha256, array.data)))
            upload.close()
            accepted: list[UploadBankResponse] = list(answers)
        assert [answer.HasField("accepted") for answer in accepted] == [True]
        assert answers.code() is grpc.StatusCode.OK
    trial.start("aggregator")
    trial.fleet.wait_listening("aggregator")
    assert {site.site: site.last_round for site in trial.status().sites} == {trial.sites[0]: 1, trial.sites[1]: 0}
    wait(lambda: trial.status().waits_for == "1 more banks, for the quorum of 2", trial.logs)


def test_a_merge_is_given_up_and_begun_anew(fleet: Fleet, tmp_path: Path) -> None:
    config = tmp_path / "aggregator.yaml"
    method = {"bank_items": 30, "memory_items": 100, "rounds": 1, "item_type": "float16", "hold_out_share": 0}
    config.write_text(yaml.safe_dump({"federations": {"parts": {"quorum": 2, "method": method}}}))
    endless = (sys.executable, "-m", "tests.integration.endless_merge")
    fleet.launch_with(endless, "aggregator", "aggregator", "--config", str(config))
    service = fleet.wait_listening("aggregator")
    with grpc.insecure_channel(service.grpc) as channel:
        sites = [FakeSite(channel, name) for name in "ab"]
        for site in sites:
            site.join()
        for site in sites:
            site.wait_for(PHASE_OPEN, 1)
            site.upload(make_bank())
        sites[0].wait_for(PHASE_AGGREGATING, 1)
        with stopping(service, channel):
            pass
    fleet.kill("aggregator")
    with grpc.insecure_channel(fleet.start("aggregator", "aggregator", "--config", str(config)).grpc) as channel:
        site = FakeSite(channel, "a")
        site.join()
        site.wait_for(PHASE_DONE, 1)
