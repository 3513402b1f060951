"""A federation with mutual TLS: it works, and whoever has no business there is refused, whatever RPC it tries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from feddymem.client import InspectionClient, NotServedError, Opinion, UnavailableError
from feddymem.client.tls import AUTHORITY, channel_to, read_tls
from feddymem.datasets import SiteData
from feddymem.openinference import open_inference_pb2
from feddymem.v1 import federation_pb2, feedback_pb2, inspection_pb2, operator_pb2, release_pb2
from feddymem.v1.federation_pb2 import (
    BankHeader,
    CalibrateRequest,
    GetStatusRequest,
    JoinRequest,
    UploadBankRequest,
    WatchRoundsRequest,
)
from feddymem.v1.federation_pb2_grpc import FederationServiceStub
from feddymem.v1.feedback_pb2 import (
    DECISION_ACCEPTED,
    DECISION_REJECTED,
    OPINION_FALSE_ALARM,
    DecideFeedbackRequest,
    KeepFeedbackRequest,
    ListFeedbackRequest,
)
from feddymem.v1.feedback_pb2_grpc import FeedbackServiceStub
from feddymem.v1.release_pb2 import DownloadArrayRequest, Release, WatchReleasesRequest
from feddymem.v1.release_pb2_grpc import ReleaseServiceStub
from services.demo.processes import Fleet, RunningService
from services.runtime.identity import Role
from tests.certificates import Authority
from tests.integration.conftest import edge_flags, inference_flags

SECONDS = 30
HERE, THERE = "brick-hall", "dim-hall"
"""The sites of the federation."""

FEDERATION, OPERATOR, RELEASES, FEEDBACK, INSPECTION, OPEN_INFERENCE = (
    file.services_by_name[name]
    for file, name in (
        (federation_pb2.DESCRIPTOR, "FederationService"),
        (operator_pb2.DESCRIPTOR, "OperatorService"),
        (release_pb2.DESCRIPTOR, "ReleaseService"),
        (feedback_pb2.DESCRIPTOR, "FeedbackService"),
        (inspection_pb2.DESCRIPTOR, "InspectionService"),
        (open_inference_pb2.DESCRIPTOR, "GRPCInferenceService"),
    )
)
SERVED = {
    "aggregator": (FEDERATION, OPERATOR, RELEASES),
    f"edge-{HERE}": (RELEASES, FEEDBACK),
    "inference": (INSPECTION, OPEN_INFERENCE),
}
RPCS = [
    pytest.param(process, f"/{service.full_name}/{method.name}", id=f"{process}-{method.name}")
    for process, services in SERVED.items()
    for service in services
    for method in service.methods
]
HEALTH = [pytest.param(process, "/grpc.health.v1.Health/Check", id=f"{process}-health") for process in SERVED]

ALLOWED = {
    ("aggregator", "Join"): {Role.SITE},
    ("aggregator", "WatchRounds"): {Role.SITE},
    ("aggregator", "UploadBank"): {Role.SITE},
    ("aggregator", "Calibrate"): {Role.SITE},
    ("aggregator", "GetStatus"): {Role.SITE, Role.OPERATOR},
    ("aggregator", "ListReleases"): {Role.OPERATOR},
    ("aggregator", "ActivateRelease"): {Role.OPERATOR},
    ("aggregator", "GetRelease"): {Role.OPERATOR},
    ("aggregator", "ShadowRelease"): {Role.OPERATOR},
    ("aggregator", "SetStanding"): {Role.OPERATOR},
    ("aggregator", "RemoveSite"): {Role.OPERATOR},
    ("aggregator", "WatchReleases"): {Role.SITE, Role.INFERENCE, Role.OPERATOR},
    ("aggregator", "DownloadArray"): {Role.SITE, Role.INFERENCE, Role.OPERATOR},
    (f"edge-{HERE}", "WatchReleases"): {Role.INFERENCE},
    (f"edge-{HERE}", "DownloadArray"): {Role.INFERENCE},
    (f"edge-{HERE}", "GetFeedbackOwner"): {Role.INFERENCE},
    (f"edge-{HERE}", "KeepFeedback"): {Role.INFERENCE},
    (f"edge-{HERE}", "ListFeedback"): {Role.SITE},
    (f"edge-{HERE}", "DecideFeedback"): {Role.SITE},
}
"""Everything of the inference service is for lines, sites and operators."""


@dataclass(frozen=True, eq=False)
class Secure:
    """A federation with TLS whose only round is done, and one site's inference service."""

    authority: Authority
    stranger: Authority
    processes: dict[str, RunningService]
    image: Path

    def identity(self, role: Role, name: str) -> Path:
        """A certificate for the machine that the test plays."""
        return self.authority.issue(role, name)

    def log(self, process: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.processes[process].log.read_text().splitlines() if line[:1] == "{"]


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, products: dict[str, SiteData]) -> Iterator[Secure]:
    folder = tmp_path_factory.mktemp("secure")
    authority, stranger = Authority(folder / "authority"), Authority(folder / "stranger")

    def tls(role: Role, name: str) -> list[str]:
        return ["--tls-dir", str(authority.issue(role, name))]

    method = {"bank_items": 100, "memory_items": 100, "rounds": 1, "generator": True}
    config = folder / "aggregator.yaml"
    config.write_text(yaml.safe_dump({"federations": {"bricks": {"sites": [HERE, THERE], "method": method}}}))
    with Fleet(folder / "services") as fleet:
        flags = ["--config", str(config), *tls(Role.AGGREGATOR, "hub")]
        aggregator = fleet.start("aggregator", "aggregator", *flags)
        for name in (HERE, THERE):
            site = edge_flags(aggregator, products[name], "bricks")
            fleet.launch(f"edge-{name}", "edge", *site, *tls(Role.SITE, name))
        edge = fleet.wait_listening(f"edge-{HERE}")
        flags = [*inference_flags(aggregator, [edge]), *tls(Role.INFERENCE, HERE)]
        inference = fleet.start("inference", "inference", *flags)
        processes = {"aggregator": aggregator, f"edge-{HERE}": edge, "inference": inference}
        made = Secure(authority, stranger, processes, products[HERE].train[0])
        line = made.identity(Role.LINE, "camera")
        fleet.wait_until(lambda: _scores(inference, line, made.image), 120, "the inference service to score")
        yield made


def _scores(inference: RunningService, line: Path, image: Path) -> bool:
    with InspectionClient(inference.grpc, site=HERE, attempts=1, tls_dir=line) as client:
        try:
            return client.inspect(image).release == 1
        except (UnavailableError, NotServedError):
            return False


def status_of(channel: grpc.Channel, method: str) -> tuple[grpc.StatusCode, str]:
    """How an RPC of any kind ends that sends an empty request."""
    rpc: Any = channel.stream_stream(method)
    call = rpc(iter([b""]), timeout=SECONDS)
    try:
        for _ in call:
            call.cancel()
            return grpc.StatusCode.OK, ""
    except grpc.RpcError:
        return call.code(), call.details()
    return grpc.StatusCode.OK, ""


def test_images_are_scored_and_the_asyncio_free_client_knows_tls(secure: Secure) -> None:
    line = secure.identity(Role.LINE, "camera")
    with InspectionClient(secure.processes["inference"].grpc, tls_dir=line) as client:
        result = client.inspect(secure.image)
    assert (result.federation, result.site, result.release) == ("bricks", HERE, 1)


@pytest.mark.parametrize(("process", "method"), [*RPCS, *HEALTH])
@pytest.mark.parametrize("credentials", ["none", "no TLS", "other authority", "expired"])
def test_without_a_valid_certificate_every_rpc_is_refused(
    secure: Secure, process: str, method: str, credentials: str
) -> None:
    address = secure.processes[process].grpc
    if credentials == "no TLS":
        channel = grpc.insecure_channel(address)
    elif credentials == "none":
        root = (secure.authority.folder / AUTHORITY).read_bytes()
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(root))
    else:
        days = -0.01 if credentials == "expired" else 1
        authority = secure.authority if credentials == "expired" else secure.stranger
        files = read_tls(authority.issue(Role.OPERATOR, f"ann-{credentials.replace(' ', '-')}", days))
        root = (secure.authority.folder / AUTHORITY).read_bytes()
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(root, files.key, files.certificate))
    with channel:
        code, _details = status_of(channel, method)
    assert code is grpc.StatusCode.UNAVAILABLE
    with channel_to(address, [], secure.identity(Role.OPERATOR, "bea")) as channel:  # somebody is there
        assert status_of(channel, "/grpc.health.v1.Health/Check") == (grpc.StatusCode.OK, "")


@pytest.mark.parametrize(("process", "method"), RPCS)
def test_every_rpc_is_for_its_roles_only(secure: Secure, process: str, method: str) -> None:
    name = method.rpartition("/")[2]
    allowed = ALLOWED.get((process, name), {Role.LINE, Role.SITE, Role.OPERATOR})
    for role in Role:
        with channel_to(secure.processes[process].grpc, [], secure.identity(role, HERE)) as channel:
            code, details = status_of(channel, method)
        if role in allowed:
            assert method not in details
        else:
            assert code is grpc.StatusCode.PERMISSION_DENIED
            assert details == f"the certificate is that of {role} '{HERE}'; {method} is for " + " or ".join(
                sorted(allowed)
            )


def _denied(call: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        list(call) if hasattr(call, "__next__") else call()
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    return str(caught.value.details())


def test_a_site_cannot_speak_for_another(secure: Secure) -> None:
    other: dict[str, Any] = {"federation": "bricks", "site": THERE, "instance": "a"}
    with channel_to(secure.processes["aggregator"].grpc, [], secure.identity(Role.SITE, HERE)) as channel:
        stub = FederationServiceStub(channel)
        answers = [
            _denied(lambda: stub.Join(JoinRequest(**other, images=1), timeout=SECONDS)),
            _denied(stub.WatchRounds(WatchRoundsRequest(**other), timeout=SECONDS)),
            _denied(lambda: stub.Calibrate(CalibrateRequest(**other), timeout=SECONDS)),
            _denied(stub.UploadBank(iter([UploadBankRequest(header=BankHeader(**other))]), timeout=SECONDS)),
        ]
    assert set(answers) == {f"the certificate is that of site '{HERE}', which cannot speak for site '{THERE}'"}
    audit = [line for line in secure.log("aggregator") if line["event"] == "audit"]
    tried = [line for line in audit if line["who"] == f"feddymem://site/{HERE}" and line["site"] == THERE]
    assert [(line["action"], line["result"]) for line in tried] == [
        ("join", "PERMISSION_DENIED"),
        ("calibrate", "PERMISSION_DENIED"),
        ("upload_bank", "PERMISSION_DENIED"),
    ]


def test_who_may_not_change_anything_is_in_the_audit_log(secure: Secure) -> None:
    with channel_to(secure.processes["aggregator"].grpc, [], secure.identity(Role.LINE, "curious")) as channel:
        for method in (method for service in SERVED["aggregator"] for method in service.methods):
            assert (
                status_of(channel, f"/{method.containing_service.full_name}/{method.name}")[0]
                is grpc.StatusCode.PERMISSION_DENIED
            )
    audit = [line for line in secure.log("aggregator") if line["event"] == "audit"]
    tried = [(line["action"], line["result"]) for line in audit if line["who"] == "feddymem://line/curious"]
    actions = (
        "join",
        "upload_bank",
        "calibrate",
        "activate_release",
        "shadow_release",
        "set_standing",
        "remove_site",
    )
    assert tried == [(action, "PERMISSION_DENIED") for action in actions]


def test_every_change_of_state_is_in_the_audit_log(secure: Secure) -> None:
    audit = [line for line in secure.log("aggregator") if line["event"] == "audit" and line["result"] == "OK"]
    for site in (HERE, THERE):
        done = [line["action"] for line in audit if line["who"] == f"feddymem://site/{site}"]
        assert done == ["join", "upload_bank", "calibrate"]
    assert all(line["federation"] == "bricks" and line["timestamp"] for line in audit)


def _release(channel: grpc.Channel) -> Release:
    stream = ReleaseServiceStub(channel).WatchReleases(WatchReleasesRequest(), timeout=SECONDS)
    release = next(stream).release
    stream.cancel()
    return release


def _download(channel: grpc.Channel, sha256: bytes) -> grpc.StatusCode:
    call = ReleaseServiceStub(channel).DownloadArray(DownloadArrayRequest(sha256=sha256), timeout=SECONDS)
    try:
        list(call)
    except grpc.RpcError:
        return call.code()
    return grpc.StatusCode.OK


def test_who_is_not_of_the_federation_reads_none_of_its_releases(secure: Secure) -> None:
    aggregator = secure.processes["aggregator"]
    with channel_to(aggregator.grpc, [], secure.identity(Role.SITE, HERE)) as channel:
        released = [array.sha256 for array in _release(channel).arrays]
    for role in (Role.SITE, Role.INFERENCE):
        with channel_to(aggregator.grpc, [], secure.identity(role, "cellar")) as channel:
            request = WatchReleasesRequest(federations=["bricks"])
            assert "bricks" in _denied(ReleaseServiceStub(channel).WatchReleases(request, timeout=SECONDS))
            assert {_download(channel, sha256) for sha256 in released} == {grpc.StatusCode.NOT_FOUND}


def test_a_generator_is_for_its_own_sites_inference_services_only(secure: Secure) -> None:
    edge = secure.processes[f"edge-{HERE}"]
    with channel_to(edge.grpc, [], secure.identity(Role.INFERENCE, HERE)) as channel:
        generator = _release(channel)
    with channel_to(edge.grpc, [], secure.identity(Role.INFERENCE, THERE)) as channel:
        request = WatchReleasesRequest(federations=["bricks"])
        assert "bricks" in _denied(ReleaseServiceStub(channel).WatchReleases(request, timeout=SECONDS))
        codes = {_download(channel, array.sha256) for array in generator.arrays}
    assert codes == {grpc.StatusCode.NOT_FOUND}


def test_feedback_is_for_its_own_site_only(secure: Secure) -> None:
    edge, inference = secure.processes[f"edge-{HERE}"], secure.processes["inference"]
    with InspectionClient(inference.grpc, tls_dir=secure.identity(Role.LINE, "camera")) as line:
        image = line.report_feedback(secure.image, Opinion.FALSE_ALARM)
    with channel_to(edge.grpc, [], secure.identity(Role.SITE, HERE)) as channel:
        stub = FeedbackServiceStub(channel)
        assert [each.image for each in stub.ListFeedback(ListFeedbackRequest(), timeout=SECONDS).feedback] == [image]
        stub.DecideFeedback(DecideFeedbackRequest(image=image, decision=DECISION_REJECTED), timeout=SECONDS)
    accept = DecideFeedbackRequest(image=image, decision=DECISION_ACCEPTED)
    with channel_to(edge.grpc, [], secure.identity(Role.SITE, THERE)) as channel:
        stub = FeedbackServiceStub(channel)
        answers = [
            _denied(lambda: stub.ListFeedback(ListFeedbackRequest(), timeout=SECONDS)),
            _denied(lambda: stub.DecideFeedback(accept, timeout=SECONDS)),
        ]
    assert set(answers) == {f"the certificate is that of site '{THERE}'; what is kept here is for site '{HERE}'"}
    keep = KeepFeedbackRequest(federation="bricks", site=HERE, encoded=b"x", opinion=OPINION_FALSE_ALARM)
    with channel_to(edge.grpc, [], secure.identity(Role.INFERENCE, THERE)) as channel:
        stub = FeedbackServiceStub(channel)
        assert f"for inference '{HERE}'" in _denied(lambda: stub.KeepFeedback(keep, timeout=SECONDS))
    audit = [line for line in secure.log(f"edge-{HERE}") if line["event"] == "audit"]
    shown = [(line["who"].removeprefix("feddymem://"), line["action"], line["result"]) for line in audit]
    for expected in (
        (f"inference/{HERE}", "keep_feedback", "OK"),
        (f"site/{HERE}", f"rejected {image}", "OK"),
        (f"site/{THERE}", f"accepted {image}", "PERMISSION_DENIED"),
        (f"inference/{THERE}", "keep_feedback", "PERMISSION_DENIED"),
    ):
        assert expected in shown


@pytest.mark.parametrize(
    ("role", "name", "sites"),
    [(Role.OPERATOR, "ann", [HERE, THERE]), (Role.SITE, HERE, [HERE]), (Role.SITE, "cellar", None)],
)
def test_a_site_is_not_shown_the_others(secure: Secure, role: Role, name: str, sites: list[str] | None) -> None:
    with channel_to(secure.processes["aggregator"].grpc, [], secure.identity(role, name)) as channel:
        status = FederationServiceStub(channel).GetStatus(GetStatusRequest(), timeout=SECONDS)
    assert [[site.site for site in state.sites] for state in status.federations] == ([] if sites is None else [sites])
