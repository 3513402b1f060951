"""The aggregator dies while it writes an operator's decision: it is made, or not at all, and can be said again."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from feddymem.v1.federation_pb2 import PHASE_DONE, PHASE_OPEN, FederationStatus
from feddymem.v1.operator_pb2 import (
    STANDING_BANNED,
    ActivateReleaseRequest,
    RemoveSiteRequest,
    SetStandingRequest,
    ShadowReleaseRequest,
)
from feddymem.v1.operator_pb2_grpc import OperatorServiceStub
from tests.chaos.cells import WHENS
from tests.chaos.federation import SETTINGS, SITES, Trial, wait, write_images
from tests.chaos.kill_at import KillPoint, When
from tests.integration.fake_site import FakeSite, make_bank

LAST = SITES[-1]
SECONDS = 10

Say = Callable[[OperatorServiceStub], object]
Holds = Callable[[FederationStatus], bool]


def ban(operator: OperatorServiceStub) -> object:
    return operator.SetStanding(
        SetStandingRequest(federation="parts", site=LAST, standing=STANDING_BANNED), timeout=SECONDS
    )


def remove(operator: OperatorServiceStub) -> object:
    return operator.RemoveSite(RemoveSiteRequest(federation="parts", site=LAST), timeout=SECONDS)


def activate(operator: OperatorServiceStub) -> object:
    return operator.ActivateRelease(ActivateReleaseRequest(federation="parts", version=1), timeout=SECONDS)


def shadow(operator: OperatorServiceStub) -> object:
    return operator.ShadowRelease(ShadowReleaseRequest(federation="parts", version=1), timeout=SECONDS)


DECISIONS: dict[str, tuple[Say, Holds]] = {
    "put_standing": (ban, lambda status: STANDING_BANNED in {site.standing for site in status.sites}),
    "remove_site": (remove, lambda status: LAST not in {site.site for site in status.sites}),
    "set_shadow": (shadow, lambda status: status.shadow_release == 1),
    "set_held": (activate, lambda status: status.release_held),
}


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trial]:
    monkeypatch.setitem(SETTINGS, "keep_releases", 2)
    opened = Trial(tmp_path / "trial", write_images(tmp_path / "images"))
    yield opened
    opened.close()


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("write", DECISIONS)
def test_a_decision_is_made_or_not_at_all(trial: Trial, write: str, when: When) -> None:
    say, holds = DECISIONS[write]
    trial.start("aggregator", KillPoint(f"services.aggregator.state:State.{write}", when, 1))
    with grpc.insecure_channel(trial.fleet.address("aggregator")) as channel:
        sites = [FakeSite(channel, name) for name in SITES]
        for site in sites:
            site.join()
        # Two rounds: the second release is active then, and the first may score in its shadow.
        for of_round, then in ((1, (PHASE_OPEN, 2)), (2, (PHASE_DONE, 2))):
            for number, site in enumerate(sites):
                site.upload(make_bank(number), of_round, item_type="uint8")
            for site in sites:
                site.calibrate(round_number=of_round)
            sites[0].wait_for(*then)
        with pytest.raises(grpc.RpcError):
            say(OperatorServiceStub(channel))
    wait(lambda: trial.fleet.ended() == {"aggregator": -signal.SIGKILL}, trial.logs)
    trial.start("aggregator")
    with grpc.insecure_channel(trial.fleet.address("aggregator")) as channel:
        grpc.channel_ready_future(channel).result(SECONDS)
        assert holds(trial.status()) == (when == "after")
        if (write, when) == ("remove_site", "after"):
            with pytest.raises(grpc.RpcError, match="no site"):
                say(OperatorServiceStub(channel))
        else:
            say(OperatorServiceStub(channel))
        assert holds(trial.status())
