"""More rounds after the last: the aggregator is restarted with them, and nobody else has to be."""

from __future__ import annotations

import signal
from pathlib import Path

import grpc
import yaml

from feddymem.v1.federation_pb2 import PHASE_DONE
from tests.chaos.federation import ROUNDS, SETTINGS, SITES, Trial, wait


def settle(folder: Path, rounds: int) -> None:
    """Sets how many rounds there are."""
    settings = {**SETTINGS, "method": {**SETTINGS["method"], "rounds": rounds}}  # type: ignore[dict-item]
    (folder / "trial" / "aggregator.yaml").write_text(yaml.safe_dump({"federations": {"parts": settings}}))


def test_a_federation_that_is_done_goes_on_when_rounds_are_raised(trial: Trial, tmp_path: Path) -> None:
    settle(tmp_path, 1)
    for name in trial.names:
        trial.start(name)

    def done() -> bool:
        try:
            status = trial.status()
        except grpc.RpcError:
            return False
        return (status.phase, status.release) == (PHASE_DONE, 1)

    def heard() -> bool:
        return all(trial.events(site, "federation_done") for site in SITES)

    wait(lambda: done() and heard(), trial.logs)
    assert trial.fleet.kill("aggregator", signal.SIGTERM) == 0
    settle(tmp_path, ROUNDS)
    trial.start("aggregator")
    wait(trial.done, trial.logs)
    trial.outcome()  # global memory, memory generators and scores are those of the last round
    assert trial.fleet.ended() == {}
    for site in SITES:
        assert len(trial.events(site, "listening")) == 1
        assert [event["round"] for event in trial.events(site, "bank_made")] == [1, 2]
        assert len(trial.events(site, "features_extracted")) == 1
