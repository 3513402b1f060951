"""A rollback reaches the lines, outlives whoever is there, and can be taken back."""

from __future__ import annotations

from pathlib import Path

import grpc
import yaml

from feddymem.client import InspectionClient, InspectionError
from feddymem.v1.operator_pb2 import ActivateReleaseRequest
from feddymem.v1.operator_pb2_grpc import OperatorServiceStub
from tests.chaos.federation import ROUNDS, SETTINGS, SITES, Trial, wait

SITE = SITES[0]
NEWEST = 0
ANSWER_SECONDS = 10


def activate(trial: Trial, version: int) -> None:
    with grpc.insecure_channel(trial.fleet.address("aggregator")) as channel:
        request = ActivateReleaseRequest(federation="parts", version=version)
        OperatorServiceStub(channel).ActivateRelease(request, timeout=ANSWER_SECONDS)


def test_back_and_forth_with_the_publishers_gone_in_between(
    trial: Trial, images: dict[str, Path], tmp_path: Path
) -> None:
    settings = {"federations": {"parts": {**SETTINGS, "keep_releases": ROUNDS}}}
    (tmp_path / "trial" / "aggregator.yaml").write_text(yaml.safe_dump(settings))
    image = min(images[SITE].iterdir())

    def served() -> tuple[int, float]:
        """Release that scores the site's line, and the score."""
        with InspectionClient(trial.fleet.address("inference"), site=SITE, attempts=1) as client:
            try:
                result = client.inspect(image)
            except InspectionError:
                return 0, 0.0
        return result.release, result.score

    trial.run({})
    trial.outcome()
    _, newest = served()
    activate(trial, 1)
    wait(lambda: served()[0] == 1, trial.logs)
    _, first = served()
    assert first != newest
    for name in trial.names:
        trial.fleet.kill(name)
    trial.start("inference")
    wait(lambda: served() == (1, first), trial.logs)
    for name in ("aggregator", *SITES):
        trial.start(name)
        trial.fleet.wait_listening(name)
    assert trial.status().release == 1
    assert served() == (1, first)
    activate(trial, NEWEST)
    wait(lambda: served() == (ROUNDS, newest), trial.logs)
    trial.fleet.kill("inference")
    trial.start("inference")
    wait(lambda: served() == (ROUNDS, newest), trial.logs)
