"""An edge client dies while it keeps feedback or a decision: it is kept whole or not at all, and can be said again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from feddymem.v1.feedback_pb2 import (
    DECISION_ACCEPTED,
    DECISION_REJECTED,
    DECISION_UNSPECIFIED,
    OPINION_FALSE_ALARM,
    DecideFeedbackRequest,
    Decision,
    KeepFeedbackRequest,
    ListFeedbackRequest,
)
from feddymem.v1.feedback_pb2_grpc import FeedbackServiceStub
from tests.chaos.cells import WHENS
from tests.chaos.federation import SITES, Trial, wait, write_images
from tests.chaos.kill_at import KillPoint, When

SITE = SITES[0]
SECONDS = 10
_MODULE = "services.edge_client.feedback"


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    return write_images(tmp_path / "images")


@pytest.fixture
def trial(tmp_path: Path, images: dict[str, Path]) -> Iterator[Trial]:
    opened = Trial(tmp_path / "trial", images)
    yield opened
    opened.close()


def decisions(trial: Trial) -> list[Decision.ValueType]:
    """Of all that is kept, once the edge client is ready."""
    found: list[Decision.ValueType] = []

    def listed() -> bool:
        with grpc.insecure_channel(trial.fleet.address(SITE)) as channel:
            try:
                answer = FeedbackServiceStub(channel).ListFeedback(ListFeedbackRequest(), timeout=SECONDS)
            except grpc.RpcError:
                return False
        found[:] = [each.decision for each in answer.feedback]
        return True

    wait(listed, trial.logs)
    return found


def say(trial: Trial, request: KeepFeedbackRequest | DecideFeedbackRequest) -> str:
    with grpc.insecure_channel(trial.fleet.address(SITE)) as channel:
        stub = FeedbackServiceStub(channel)
        if isinstance(request, KeepFeedbackRequest):
            return stub.KeepFeedback(request, timeout=SECONDS).image
        return stub.DecideFeedback(request, timeout=SECONDS).image


def keep(image: Path) -> KeepFeedbackRequest:
    return KeepFeedbackRequest(
        federation="parts", site=SITE, encoded=image.read_bytes(), opinion=OPINION_FALSE_ALARM, note="a shadow"
    )


def die(trial: Trial, request: KeepFeedbackRequest | DecideFeedbackRequest) -> None:
    """Says it to an edge client that dies of it, and starts that again."""
    with pytest.raises(grpc.RpcError):
        say(trial, request)
    wait(lambda: trial.fleet.ended() == {SITE: -signal.SIGKILL}, trial.logs)
    trial.start(SITE)


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("write", ["write_atomically", "write_record", "FeedbackStore.keep"])
def test_feedback_is_kept_or_not_at_all(trial: Trial, images: dict[str, Path], write: str, when: When) -> None:
    request = keep(min(images[SITE].iterdir()))
    trial.start(SITE, KillPoint(f"{_MODULE}:{write}", when, 1))
    assert decisions(trial) == []
    die(trial, request)
    is_kept = when == "after" and write != "write_atomically"
    assert decisions(trial) == [DECISION_UNSPECIFIED] * is_kept
    assert len(list((trial.fleet.state(SITE) / "feedback").iterdir())) == 2 * is_kept
    say(trial, request)
    assert decisions(trial) == [DECISION_UNSPECIFIED]


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize(("write", "number"), [("write_record", 2), ("FeedbackStore.decide", 1)])
def test_a_decision_is_made_or_not_at_all(
    trial: Trial, images: dict[str, Path], write: str, number: int, when: When
) -> None:
    trial.start(SITE, KillPoint(f"{_MODULE}:{write}", when, number))
    assert decisions(trial) == []
    accept = DecideFeedbackRequest(image=say(trial, keep(min(images[SITE].iterdir()))), decision=DECISION_ACCEPTED)
    die(trial, accept)
    assert decisions(trial) == [DECISION_ACCEPTED if when == "after" else DECISION_UNSPECIFIED]
    say(trial, accept)
    assert decisions(trial) == [DECISION_ACCEPTED]


@pytest.mark.parametrize("when", WHENS)
def test_when_it_dies_while_it_makes_room_the_next_start_does_without_what_was_going(
    tmp_path: Path, images: dict[str, Path], when: When
) -> None:
    first, second, *_ = sorted(images[SITE].iterdir())
    room = str(first.stat().st_size + second.stat().st_size - 1)
    trial = Trial(tmp_path / "small", images, site_flags=["--max-feedback-bytes", room])
    try:
        trial.start(SITE, KillPoint(f"{_MODULE}:FeedbackStore._remove", when, 1))
        assert decisions(trial) == []
        name = say(trial, keep(first))
        say(trial, DecideFeedbackRequest(image=name, decision=DECISION_REJECTED))
        die(trial, keep(second))
        assert decisions(trial) == ([DECISION_REJECTED] if when == "before" else [])
        say(trial, keep(second))
        assert decisions(trial) == [DECISION_UNSPECIFIED]
    finally:
        trial.close()
