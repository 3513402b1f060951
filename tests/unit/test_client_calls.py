"""Both clients against a service that answers as it is told."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

import feddymem.client
from feddymem.client import (
    AsyncInspectionClient,
    InspectionClient,
    InspectionError,
    InspectionResult,
    InspectionTimeoutError,
    InvalidRequestError,
    NotServedError,
    Opinion,
    OverloadedError,
    ServiceFailedError,
    UnavailableError,
)
from feddymem.client.channel import inspection_options, service_config
from feddymem.v1.feedback_pb2 import OPINION_BAD_PART, OPINION_FALSE_ALARM
from feddymem.v1.inspection_pb2 import InspectRequest, InspectResponse, ReportFeedbackRequest
from tests.scripted_service import Answer, scripted_service

SECONDS = 30
TRANSIENT = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED]


def length(request: InspectRequest) -> InspectResponse:
    """Scores a request with the length of its image."""
    return InspectResponse(score=len(request.encoded))


def refuse_first(*statuses: grpc.StatusCode) -> Answer:
    """Refuses the first attempts, then scores."""
    left = list(statuses)
    return lambda request: left.pop(0) if left else length(request)


def always(status: grpc.StatusCode) -> Answer:
    return lambda _request: status


@pytest.mark.parametrize("status", TRANSIENT)
def test_a_call_is_repeated_until_it_works_however_large_its_image(status: grpc.StatusCode) -> None:
    image = bytes(2**21)  # far more than gRPC keeps for a repetition by itself
    with scripted_service(refuse_first(status, status)) as service, InspectionClient(service.address) as client:
        assert client.inspect(image).score == len(image)
        assert [request.encoded for request in service.requests] == [image] * 3


async def test_the_asynchronous_client_repeats_calls_too() -> None:
    with scripted_service(refuse_first(*TRANSIENT)) as service:
        async with AsyncInspectionClient(service.address) as client:
            assert (await client.inspect(b"four")).score == 4
        assert len(service.requests) == 4


def test_feedback_is_repeated_like_an_inspection() -> None:
    with (
        scripted_service(refuse_first(*TRANSIENT)) as service,
        InspectionClient(service.address, federation="parts", site="a") as client,
    ):
        assert client.report_feedback(b"four", Opinion.FALSE_ALARM, note="a shadow") == "kept"
        expected = ReportFeedbackRequest(
            federation="parts", site="a", encoded=b"four", opinion=OPINION_FALSE_ALARM, note="a shadow"
        )
        assert service.reports == [expected] * 4


async def test_feedback_that_is_refused_is_the_error_that_an_inspection_would_be() -> None:
    with scripted_service(always(grpc.StatusCode.NOT_FOUND)) as service:
        async with AsyncInspectionClient(service.address) as client:
            with pytest.raises(NotServedError):
                await client.report_feedback(b"x", Opinion.BAD_PART)
        with InspectionClient(service.address) as other, pytest.raises(NotServedError):
            other.report_feedback(b"x", Opinion.BAD_PART)
        assert [report.opinion for report in service.reports] == [OPINION_BAD_PART] * 2


@pytest.mark.parametrize(("attempts", "made"), [(1, 1), (2, 2)])
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError),
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.CANCELLED, UnavailableError),
    ],
)
def test_attempts_are_as_many_as_was_said(
    status: grpc.StatusCode, kind: type[InspectionError], attempts: int, made: int
) -> None:
    with (
        scripted_service(always(status)) as service,
        InspectionClient(service.address, attempts=attempts) as client,
    ):
        with pytest.raises(kind, match=f"as told; {kind.advice[:10]}"):
            client.inspect(b"x")
        assert len(service.requests) == made


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.NOT_FOUND, NotServedError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, InspectionTimeoutError),
        (grpc.StatusCode.INTERNAL, ServiceFailedError),
        (grpc.StatusCode.FAILED_PRECONDITION, ServiceFailedError),
    ],
)
async def test_what_will_not_work_later_is_not_repeated(status: grpc.StatusCode, kind: type[InspectionError]) -> None:
    with scripted_service(always(status)) as service:
        with InspectionClient(service.address) as client, pytest.raises(kind, match="as told") as caught:
            client.inspect(b"x")
        async with AsyncInspectionClient(service.address) as another:
            with pytest.raises(kind, match="as told"):
                await another.inspect(b"x")
        assert caught.value.status == status
        assert len(service.requests) == 2


def test_an_error_is_the_same_in_another_process() -> None:
    for kind in (OverloadedError, InvalidRequestError):
        error = kind(grpc.StatusCode.RESOURCE_EXHAUSTED, "as told")
        sent = copy.copy(error)  # made anew from the same parts as by pickle
        assert (type(sent), str(sent), sent.status) == (kind, str(error), error.status)


async def test_a_server_that_is_not_there_is_named() -> None:
    with (
        InspectionClient("127.0.0.1:1", attempts=1) as client,
        pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1: .*is the address right"),
    ):
        client.inspect(b"x")
    async with AsyncInspectionClient("127.0.0.1:1", attempts=1) as another:
        with pytest.raises(UnavailableError, match="is the address right"):
            await another.inspect(b"x")


async def test_an_answer_that_does_not_come_ends_with_the_deadline() -> None:
    ended = threading.Event()

    def never(request: InspectRequest) -> InspectResponse:
        assert ended.wait(SECONDS)
        return length(request)

    with scripted_service(never) as service:
        with InspectionClient(service.address) as client, pytest.raises(InspectionTimeoutError, match="allow more"):
            client.inspect(b"x", timeout_seconds=0.05)
        async with AsyncInspectionClient(service.address, timeout_seconds=0.05) as another:
            with pytest.raises(InspectionTimeoutError):
                await another.inspect(b"x")
        ended.set()


def test_calls_go_round_all_servers_of_a_target() -> None:
    with scripted_service(length) as first, scripted_service(length) as second:
        target = f"ipv4:{first.address},{second.address}"
        with InspectionClient(target) as client:
            # Once both are connected, every other call goes to each; the first calls have the one that is connected.
            assert all(client.inspect(b"x").score == 1 for _ in range(50))
    assert min(len(first.requests), len(second.requests)) > 10


def test_a_call_outlasts_a_restart() -> None:
    with scripted_service(length) as service, InspectionClient(service.address) as client:
        assert client.inspect(b"x").score == 1
    with InspectionClient(service.address, attempts=1) as impatient, pytest.raises(UnavailableError):
        impatient.inspect(b"x")
    with InspectionClient(service.address) as client, ThreadPoolExecutor(1) as caller:
        result = caller.submit(client.inspect, b"x")
        with scripted_service(length, service.address):
            assert result.result(SECONDS).score == 1


def refuse_words(request: InspectRequest) -> InspectResponse | grpc.StatusCode:
    return grpc.StatusCode.INVALID_ARGUMENT if request.encoded == b"bad" else length(request)


async def test_of_many_images_each_has_its_own_outcome_in_order() -> None:
    images: list[bytes | str] = [b"a", b"bad", b"ccc", "no such file", b"fffff", *(bytes(n) for n in range(1, 40))]
    expected = [1, "as told", 3, "cannot read no such file: No such file or directory", 5, *range(1, 40)]

    def told(outcome: InspectionResult | InspectionError) -> object:
        return str(outcome) if isinstance(outcome, InspectionError) else outcome.score

    with scripted_service(refuse_words) as service:
        with InspectionClient(service.address) as client:
            assert [told(outcome) for outcome in client.inspect_many(images)] == expected
        async with AsyncInspectionClient(service.address) as another:
            assert [told(outcome) async for outcome in another.inspect_many(images)] == expected


async def test_what_is_no_image_ends_many_too() -> None:
    with scripted_service(length) as service:
        with InspectionClient(service.address) as client, pytest.raises(TypeError, match="cannot inspect int"):
            list(client.inspect_many([b"x", 3]))  # type: ignore[list-item]
        async with AsyncInspectionClient(service.address) as another:
            with pytest.raises(TypeError, match="cannot inspect int"):
                [outcome async for outcome in another.inspect_many([b"x", 3])]  # type: ignore[list-item]


async def test_a_window_of_calls_is_under_way_at_once() -> None:
    together = threading.Barrier(5)

    def wait(request: InspectRequest) -> InspectResponse:
        together.wait(SECONDS)
        return length(request)

    with scripted_service(wait) as service:
        with InspectionClient(service.address, window=5) as client:
            assert len(list(client.inspect_many([b"x"] * 10))) == 10
        async with AsyncInspectionClient(service.address, window=5) as another:
            assert len([outcome async for outcome in another.inspect_many([b"x"] * 10)]) == 10


def test_closing_the_client_ends_what_is_under_way() -> None:
    arrived, ended = threading.Event(), threading.Event()

    def wait(request: InspectRequest) -> InspectResponse:
        arrived.set()
        assert ended.wait(SECONDS)
        return length(request)

    with scripted_service(wait) as service:
        client = InspectionClient(service.address)
        outcomes: list[InspectionResult | InspectionError] = []
        caller = threading.Thread(target=lambda: outcomes.extend(client.inspect_many([b"x"])))
        caller.start()
        assert arrived.wait(SECONDS)
        client.close()
        caller.join(SECONDS)
        ended.set()
    assert [type(outcome) for outcome in outcomes] == [UnavailableError]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"attempts": 0}, "attempts is 0; expected 1 to 5"),
        ({"attempts": 6}, "attempts is 6"),
        ({"window": 0}, "window is 0"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0"),
    ],
)
async def test_a_setting_that_makes_no_sense_is_named(setting: dict[str, int], said: str) -> None:
    for kind in (InspectionClient, AsyncInspectionClient):
        with pytest.raises(ValueError, match=said):
            kind("127.0.0.1:1", **setting)  # type: ignore[arg-type]


def test_the_service_config_repeats_only_if_asked_to_and_always_goes_round() -> None:
    once, often = service_config(1), service_config(5)
    assert once == {"loadBalancingConfig": [{"round_robin": {}}]}
    [method] = often["methodConfig"]
    assert method["retryPolicy"]["maxAttempts"] == 5
    assert method["retryPolicy"]["retryableStatusCodes"] == [status.name for status in TRANSIENT]
    assert dict(inspection_options(5))["grpc.keepalive_time_ms"] == 60_000


def test_the_client_does_without_torch() -> None:
    program = "import sys, feddymem.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_the_names_are_those_that_callers_rely_on() -> None:
    assert feddymem.client.__all__ == [
        "AsyncInspectionClient",
        "Guarantee",
        "HeatScale",
        "Image",
        "InspectionClient",
        "InspectionError",
        "InspectionResult",
        "InspectionTimeoutError",
        "InvalidRequestError",
        "MapKind",
        "NotServedError",
        "Opinion",
        "OverloadedError",
        "Region",
        "ServiceFailedError",
        "TlsError",
        "UnavailableError",
        "Verdict",
        "Wishes",
    ]
