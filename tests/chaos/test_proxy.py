"""Bad lines: one that trickles, one that flips bits. All ends bit for bit as on a good one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import yaml

from feddymem.client.tls import channel_to
from feddymem.v1.federation_pb2 import GetStatusRequest
from feddymem.v1.federation_pb2_grpc import FederationServiceStub
from feddymem.v1.release_pb2 import WatchReleasesRequest
from feddymem.v1.release_pb2_grpc import ReleaseServiceStub
from services.cli.certs import authority, issue
from services.runtime.channels import MAX_MESSAGE_BYTES
from services.runtime.identity import Role
from tests.chaos import REPEATS
from tests.chaos.federation import RETRY_SECONDS, ROUNDS, SETTINGS, SITES, Published, Trial, download_release
from tests.chaos.forks import ForkedFleet, own_host
from tests.chaos.matrix import Matrix
from tests.chaos.proxy import Proxy

SITE = SITES[0]
PORT = 6999
"""Of the proxy, beside the ports of a fleet."""
TRICKLE_BYTES_PER_SECOND = 20_000
BYTES_PER_FLIP = 20_000
"""About the longest message, 18 KB: with a flip in 10,000 bytes one of 140 of them would get through. With TLS each
flip costs the connection, and two handshakes take 10,000 bytes."""
SLOW_CALLERS = 16
SLOW_BYTES = MAX_MESSAGE_BYTES - 1000
PAUSE_SECONDS = 0.05
"""Between questions: who asks too often is refused."""
PATIENCE_SECONDS = 10
"""For an answer that comes at once where nobody is in the way."""
BROKEN_LINE = (
    *("--rpc-timeout-seconds", "2", "--transfer-timeout-seconds", "2", "--scan-seconds", "1"),
    *("--aggregator", f"{own_host()}:{PORT}"),
)
"""Flags of an edge client behind the proxy: a flipped bit in HTTP/2's own frames loses a message now and then."""


@pytest.fixture
def trial(matrix: Matrix, tmp_path: Path) -> Iterator[Trial]:
    """A federation whose first site reaches the aggregator through a proxy, once there is one."""
    opened = matrix.trial(tmp_path / "trial", site_flags=BROKEN_LINE)
    yield opened
    opened.close()


def test_a_site_that_trickles_holds_up_nobody_but_its_round(matrix: Matrix, trial: Trial) -> None:
    with Proxy(trial.fleet.address("aggregator"), PORT, bytes_per_second=TRICKLE_BYTES_PER_SECOND):
        for name in trial.names:
            trial.start(name)
        trial.wait_done("through a line that trickles")
        outcome = trial.outcome(matrix.undisturbed.outcome)
    assert outcome.differences(matrix.undisturbed.outcome) == ""


def test_callers_that_trickle_take_little_memory_and_nobody_s_time(trial: Trial) -> None:
    trial.start("aggregator")
    process = psutil.Process(trial.fleet.process_id("aggregator"))
    with (
        Proxy(trial.fleet.address("aggregator"), PORT, bytes_per_second=TRICKLE_BYTES_PER_SECOND) as proxy,
        ThreadPoolExecutor(SLOW_CALLERS) as pool,
    ):
        _answered(trial)
        before = process.memory_info().rss
        slow = [pool.submit(_send_slowly, proxy.address) for _ in range(SLOW_CALLERS)]
        while wait(slow, timeout=PAUSE_SECONDS).not_done:
            _answered(trial)
        assert {sent.result() for sent in slow} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    assert proxy.connections == SLOW_CALLERS
    assert process.memory_info().rss - before < SLOW_CALLERS * SLOW_BYTES


def _answered(trial: Trial) -> None:
    """Asks the aggregator something, on a good line.

    Raises:
        grpc.RpcError: no answer in time.
    """
    with grpc.insecure_channel(trial.fleet.address("aggregator")) as channel:
        FederationServiceStub(channel).GetStatus(GetStatusRequest(), timeout=PATIENCE_SECONDS, wait_for_ready=True)


def _send_slowly(address: str) -> grpc.StatusCode:
    """Sends a message that the line cannot carry in the time that there is; what became of it."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options) as channel:
        call: Any = channel.unary_unary("/feddymem.v1.FederationService/GetStatus")
        with pytest.raises(grpc.RpcError) as caught:
            call(bytes(SLOW_BYTES), timeout=3)
        code: grpc.StatusCode = caught.value.code()
        return code


@pytest.mark.parametrize("seed", range(2 * REPEATS))
def test_flipped_bits_without_tls_are_found(matrix: Matrix, trial: Trial, seed: int) -> None:
    with Proxy(trial.fleet.address("aggregator"), PORT, bytes_per_flip=BYTES_PER_FLIP, seed=seed) as proxy:
        for name in trial.names:
            trial.start(name)
        trial.wait_done("through a line that flips bits")
        outcome = trial.outcome(matrix.undisturbed.outcome)
    assert outcome.differences(matrix.undisturbed.outcome) == ""
    assert proxy.flips > 0


@pytest.mark.parametrize("seed", range(REPEATS))
def test_with_tls_flipped_bits_break_the_connection_and_nothing_else(
    matrix: Matrix, tmp_path: Path, tls: Path, seed: int
) -> None:
    undisturbed, _ = _run_with_tls(matrix, tmp_path / "undisturbed", tls, None, seed)
    found, proxy = _run_with_tls(matrix, tmp_path / "flipped", tls, BYTES_PER_FLIP, seed)
    assert found == undisturbed
    assert proxy.flips > 0
    assert proxy.connections > 2  # one to look at the certificate, one to talk


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an authority that has issued certificates for an aggregator, a site, and an operator."""
    folder = tmp_path_factory.mktemp("tls") / "authority"
    authority(folder, days=1)
    for role, name in ((Role.AGGREGATOR, "hub"), (Role.SITE, SITE), (Role.OPERATOR, "ann")):
        issue(folder, role, name, host=[own_host()], days=1)
    return folder


def _run_with_tls(
    matrix: Matrix, folder: Path, tls: Path, bytes_per_flip: int | None, seed: int
) -> tuple[Published, Proxy]:
    """The last release of a federation of one site, through a proxy."""
    folder.mkdir()
    config = folder / "aggregator.yaml"
    config.write_text(yaml.safe_dump({"federations": {"parts": {**SETTINGS, "sites": [SITE], "quorum": 1}}}))
    images = str(matrix.undisturbed.line.image.parent)
    where = ["--federation", "parts", "--site", SITE, "--data", images, "--input-size", "64"]
    retry = ["--retry-seconds", str(RETRY_SECONDS)]
    with ForkedFleet(folder / "services") as fleet:
        fleet.launch("aggregator", "aggregator", "--config", str(config), "--tls-dir", str(tls / "aggregator-hub"))
        with Proxy(fleet.address("aggregator"), PORT, bytes_per_flip=bytes_per_flip, seed=seed) as proxy:
            flags = [*where, *retry, *BROKEN_LINE, "--tls-dir", str(tls / f"site-{SITE}")]
            fleet.launch(SITE, "edge", *flags)
            with channel_to(fleet.address("aggregator"), [], tls / "operator-ann") as channel:
                stub = ReleaseServiceStub(channel)
                for response in stub.WatchReleases(WatchReleasesRequest(), timeout=60, wait_for_ready=True):
                    if response.release.version == ROUNDS:
                        return download_release(stub, response.release), proxy
    raise AssertionError("a watch ended without a status")
