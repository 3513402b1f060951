"""Whatever is called or goes wrong, callers get a proper status and an id, and the log tells the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from feddymem.client.tls import async_channel_to
from feddymem.v1.inspection_pb2 import InspectRequest, InspectStreamRequest, InspectStreamResponse
from services.runtime.identity import Role
from services.runtime.rpc import MAX_TEXT_BYTES, RPCS
from tests.certificates import Authority
from tests.unit.boundary.serving import (
    GARBAGE,
    HEALTH,
    INSPECTION,
    METHODS,
    REFLECTION,
    RELEASES,
    SECONDS,
    outcome,
    served,
)


@pytest.mark.parametrize("method", METHODS)
async def test_bytes_that_are_no_message_are_an_invalid_argument(
    tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = RPCS.labels(method, "INVALID_ARGUMENT")._value.get()
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        code, details, _id = await outcome(channel, method, GARBAGE)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith(f"the request is not a valid {METHODS[method]} message: ")
    assert RPCS.labels(method, "INVALID_ARGUMENT")._value.get() == before + 1
    assert not caplog.records  # of gRPC itself, with a stack trace


@pytest.mark.parametrize("method", [name for name in METHODS if "Stream" not in name and name != REFLECTION])
async def test_a_call_without_a_request_is_an_invalid_argument(tmp_path: Path, method: str) -> None:
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        code, details, _id = await outcome(channel, method)
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "the call ended without a request; send one")


async def test_garbage_ends_a_stream_after_its_answers(tmp_path: Path) -> None:
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        rpc: Any = channel.stream_stream(f"{INSPECTION}/InspectStream")
        call = rpc(iter([InspectStreamRequest(id="1").SerializeToString(), GARBAGE]), timeout=SECONDS)
        assert await call.read() == InspectStreamResponse(id="1").SerializeToString()
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_health_and_reflection_answer(tmp_path: Path) -> None:
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        check: Any = channel.unary_unary(f"{HEALTH}/Check")
        answer = await check(health_pb2.HealthCheckRequest(service="liveness").SerializeToString(), timeout=SECONDS)
        assert health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.SERVING
        unknown = health_pb2.HealthCheckRequest(service="moon").SerializeToString()
        assert (await outcome(channel, f"{HEALTH}/Check", unknown))[0] is grpc.StatusCode.NOT_FOUND
        listing: Any = channel.unary_unary(f"{HEALTH}/List")
        listed = health_pb2.HealthListResponse.FromString(await listing(b"", timeout=SECONDS)).statuses
        assert {name: status.status for name, status in listed.items()} == {
            "liveness": health_pb2.HealthCheckResponse.SERVING,
            **dict.fromkeys(("", RELEASES[1:], INSPECTION[1:]), health_pb2.HealthCheckResponse.NOT_SERVING),
        }
        watch: Any = channel.unary_stream(f"{HEALTH}/Watch")
        first = await watch(b"", timeout=SECONDS).read()
        assert health_pb2.HealthCheckResponse.FromString(first).status == health_pb2.HealthCheckResponse.NOT_SERVING
        reflect: Any = channel.stream_stream(REFLECTION)
        question = reflection_pb2.ServerReflectionRequest(list_services="*").SerializeToString()
        listed = await reflect(iter([question]), timeout=SECONDS).read()
        names = reflection_pb2.ServerReflectionResponse.FromString(listed).list_services_response.service
        assert {f"/{service.name}" for service in names} == {
            RELEASES,
            INSPECTION,
            HEALTH,
            REFLECTION.rpartition("/")[0],
        }


@pytest.mark.parametrize(
    ("request_", "event"),
    [
        (InspectRequest(site="no such thing"), "rpc_refused"),
        (InspectRequest(federation="fault"), "rpc_failed"),
    ],
    ids=["refused", "failed"],
)
async def test_what_goes_wrong_is_found_in_the_log_by_the_id_that_the_caller_gets(
    tmp_path: Path, request_: InspectRequest, event: str
) -> None:
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        with capture_logs(processors=[merge_contextvars]) as lines:
            _code, details, request_id = await outcome(channel, f"{INSPECTION}/Inspect", request_.SerializeToString())
    found = [line for line in lines if line.get("request_id") == request_id]
    assert [line["event"] for line in found] == ["audit", event]
    assert {line["method"] for line in found} == {f"{INSPECTION}/Inspect"}
    assert request_id != "mine"
    assert "secret" not in details
    assert event != "rpc_failed" or request_id in details


async def test_every_rpc_has_an_id_of_its_own(tmp_path: Path) -> None:
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        ids = [(await outcome(channel, f"{INSPECTION}/Inspect", b""))[2] for _ in range(3)]
    assert len(set(ids)) == 3


@pytest.mark.parametrize("letter", ["a", "\N{PILE OF POO}"])
async def test_a_text_that_repeats_a_long_name_still_arrives(tmp_path: Path, letter: str) -> None:
    request = InspectRequest(site=letter * 10**5).SerializeToString()
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        code, details, _id = await outcome(channel, f"{INSPECTION}/Inspect", request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details == letter * (MAX_TEXT_BYTES // len(letter.encode())) + " ..."


async def test_a_flood_of_refusals_does_not_flood_the_log(tmp_path: Path) -> None:
    refused = InspectRequest(site="no").SerializeToString()
    async with served(tmp_path) as address, aio.insecure_channel(address) as channel:
        with capture_logs() as lines:
            for _ in range(300):
                await outcome(channel, f"{INSPECTION}/Inspect", refused)
            await outcome(channel, f"{RELEASES}/DownloadArray", b"")
    logged = [line for line in lines if line["event"] == "rpc_refused" and line["code"] == "INVALID_ARGUMENT"]
    assert 0 < len(logged) < 250
    assert [line["code"] for line in lines if line["event"] == "rpc_refused"][-1] == "NOT_FOUND"


async def test_who_may_not_change_anything_is_in_the_audit_log(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    hub, site = authority.issue(Role.INFERENCE, "berlin"), authority.issue(Role.SITE, "berlin")
    async with served(tmp_path, hub) as address, async_channel_to(address, [], site) as channel:
        with capture_logs() as lines:
            for method in ("InspectStream", "Inspect"):
                code, details, _id = await outcome(channel, f"{INSPECTION}/{method}", GARBAGE)
                assert code is grpc.StatusCode.PERMISSION_DENIED
                assert details == f"the certificate is that of site 'berlin'; {INSPECTION}/{method} is for line"
    assert [line for line in lines if line["event"] == "audit"] == [
        {
            "event": "audit",
            "log_level": "info",
            "who": "feddymem://site/berlin",
            "action": "inspect",
            "federation": "",
            "site": "",
            "result": "PERMISSION_DENIED",
        }
    ]
