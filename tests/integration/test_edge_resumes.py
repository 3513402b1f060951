"""An edge client that is killed at work, or forgotten, goes on where it was, and the rounds end as if nothing had
happened."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from feddymem.v1.operator_pb2 import RemoveSiteRequest
from feddymem.v1.operator_pb2_grpc import OperatorServiceStub
from services.aggregator.database import DATABASE
from services.aggregator.state import BANKS
from tests.chaos.federation import ROUNDS, SITES, Outcome, Trial, wait, write_images
from tests.chaos.kill_at import KillPoint

SITE, OTHER = SITES
ANSWER_SECONDS = 10
CHUNK_BYTES = 2048
"""As `ForkedFleet` has them."""
IN_EXTRACTION = KillPoint("feddymem.feature_cache:FeatureCache._keep", "after", 3)
BEFORE_THE_SECOND_CHUNK = KillPoint("services.edge_client.upload:UploadBankRequest", "before", 3)
"""The first message is the header."""
WHEN_THE_BANK_IS_MADE = KillPoint("services.edge_client.state:EdgeState.put", "after", 1)


@dataclass(frozen=True)
class Undisturbed:
    """What comes of it when nobody dies.

    Attributes:
        outcome: of the federation.
        bytes: that the site's bank of round 1 took.
    """

    outcome: Outcome
    bytes: int


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    trial = Trial(folder / "trial", write_images(folder / "images"))
    try:
        trial.run({})
        return Undisturbed(trial.outcome(), accepted_bytes(trial))
    finally:
        trial.close()


def accepted_bytes(trial: Trial) -> int:
    """Bytes that the site's bank of round 1 took."""
    [accepted] = [event for event in trial.events(SITE, "bank_accepted") if event["round"] == 1]
    return int(str(accepted["bytes"]))


def instance(trial: Trial) -> str:
    """Who speaks for the site, as the aggregator knows it."""
    database = sqlite3.connect(trial.fleet.state("aggregator") / DATABASE)
    [(name,)] = database.execute("SELECT instance FROM site WHERE name = ?", (SITE,)).fetchall()
    database.close()
    return str(name)


def died_at(trial: Trial, moment: KillPoint, site: str = SITE) -> None:
    """Starts all, and waits until a site's edge client has died."""
    for name in trial.names:
        trial.start(name, moment if name == site else None)
    wait(lambda: site in trial.fleet.ended(), lambda: f"{site} to die{trial.logs()}")


def test_features_that_were_extracted_before_a_kill_are_not_extracted_again(
    trial: Trial, images: dict[str, Path], undisturbed: Undisturbed
) -> None:
    died_at(trial, IN_EXTRACTION)
    kept = list((trial.fleet.state(SITE) / "features").rglob("*.features"))
    assert len(kept) == 3
    assert trial.events(SITE, "features_extracted") == []
    before = {path: path.stat().st_mtime_ns for path in kept}
    trial.start(SITE)
    wait(trial.done, trial.logs)
    count = len(list(images[SITE].iterdir()))
    [extracted] = trial.events(SITE, "features_extracted")
    assert (extracted["images"], extracted["extracted"]) == (count, count - 3)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert trial.outcome(undisturbed.outcome).differences(undisturbed.outcome) == ""


def test_an_upload_that_was_killed_half_way_goes_on_at_its_offset_as_the_same_edge_client(
    trial: Trial, undisturbed: Undisturbed
) -> None:
    died_at(trial, BEFORE_THE_SECOND_CHUNK)
    folder = trial.fleet.state("aggregator") / BANKS / "parts" / SITE

    def held() -> int:
        return sum(path.stat().st_size for path in folder.glob("*.part"))

    wait(lambda: held() == CHUNK_BYTES, lambda: f"the first chunk to be kept; {held()} bytes are{trial.logs()}")
    before = instance(trial)
    trial.start(SITE)
    wait(trial.done, trial.logs)
    assert 0 < accepted_bytes(trial) - undisturbed.bytes < CHUNK_BYTES  # one more header, and no chunk twice
    assert instance(trial) == before
    assert [event["round"] for event in trial.events(SITE, "bank_made")] == list(range(1, ROUNDS + 1))
    assert trial.events(SITE, "bank_not_taken") == []
    assert trial.outcome(undisturbed.outcome).differences(undisturbed.outcome) == ""


def test_a_site_that_is_removed_while_it_is_there_joins_again_and_sends_its_bank_again(
    trial: Trial, undisturbed: Undisturbed
) -> None:
    died_at(trial, WHEN_THE_BANK_IS_MADE, OTHER)  # so that the round stays open

    def accepted() -> int:
        return len(trial.events(SITE, "bank_accepted"))

    wait(lambda: accepted() == 1, trial.logs)
    with grpc.insecure_channel(trial.fleet.address("aggregator")) as channel:
        request = RemoveSiteRequest(federation="parts", site=SITE)
        OperatorServiceStub(channel).RemoveSite(request, timeout=ANSWER_SECONDS)
    wait(lambda: accepted() == 2, trial.logs)
    trial.start(OTHER)
    wait(trial.done, trial.logs)
    assert [event["round"] for event in trial.events(SITE, "bank_made")] == list(range(1, ROUNDS + 1))
    assert trial.outcome(undisturbed.outcome).differences(undisturbed.outcome) == ""
