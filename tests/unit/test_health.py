"""Health for probes that can show no certificate: a server of its own, which tells as much as the other and no more."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from feddymem.v1 import inspection_pb2_grpc
from feddymem.v1.inspection_pb2 import InspectRequest
from services.runtime.health import LIVENESS
from services.runtime.identity import Role
from services.runtime.server import listening
from services.runtime.settings import ServiceSettings
from tests.certificates import Authority

SECONDS = 10
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def settings(folder: Path, tls_dir: Path | None, health_listen: str) -> ServiceSettings:
    return ServiceSettings(
        listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
        health_listen=health_listen,
        state_dir=folder,
        tls_dir=tls_dir,
        drain_seconds=0,
    )


async def test_probes_need_no_certificate_where_all_else_does(tmp_path: Path) -> None:
    tls_dir = Authority(tmp_path / "ca").issue(Role.INFERENCE, "plant")
    with capture_logs() as lines:
        async with listening(settings(tmp_path, tls_dir, "127.0.0.1:0"), Role.INFERENCE, []) as readiness:
            [bound] = [line for line in lines if line["event"] == "listening"]
            async with aio.insecure_channel(bound["health"]) as probe, aio.insecure_channel(bound["grpc"]) as line:

                async def state(name: str) -> int:
                    asked = health_pb2.HealthCheckRequest(service=name)
                    answer = await health_pb2_grpc.HealthStub(probe).Check(asked, timeout=SECONDS)
                    return int(answer.status)

                assert (await state(LIVENESS), await state("")) == (SERVING, NOT_SERVING)
                await readiness.set(True)
                assert await state("") == SERVING
                with pytest.raises(aio.AioRpcError) as without_certificate:
                    await health_pb2_grpc.HealthStub(line).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
                assert without_certificate.value.code() is grpc.StatusCode.UNAVAILABLE
                with pytest.raises(aio.AioRpcError) as nothing_else:
                    await inspection_pb2_grpc.InspectionServiceStub(probe).Inspect(InspectRequest(), timeout=SECONDS)
                assert nothing_else.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_an_address_that_is_taken_is_named_with_its_setting(tmp_path: Path) -> None:
    with capture_logs() as lines:
        async with listening(settings(tmp_path, None, "127.0.0.1:0"), Role.INFERENCE, []):
            [taken] = [line["health"] for line in lines if line["event"] == "listening"]
            with pytest.raises(OSError, match=rf"health_listen: {taken} cannot be bound"):
                async with listening(settings(tmp_path, None, taken), Role.INFERENCE, []):
                    pass
