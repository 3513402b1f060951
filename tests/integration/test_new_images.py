"""Images that come while a round is open: its bank is sent as it was made, and the next one has them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import yaml

from services.aggregator.state import State
from tests.chaos.federation import SETTINGS, SITES, Trial, wait
from tests.chaos.kill_at import KillPoint

SITE, OTHER = SITES
WHEN_THE_BANK_IS_MADE = KillPoint("services.edge_client.state:EdgeState.put", "after", 1)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_bank_that_is_made_is_sent_although_images_have_come_since(
    trial: Trial, images: dict[str, Path], tmp_path: Path, share: float
) -> None:
    method = {**SETTINGS["method"], "hold_out_share": share}  # type: ignore[dict-item]
    settings = {"federations": {"parts": {**SETTINGS, "keep_releases": 2, "method": method}}}
    (tmp_path / "trial" / "aggregator.yaml").write_text(yaml.safe_dump(settings))
    for name in trial.names:
        trial.start(name, WHEN_THE_BANK_IS_MADE if name == SITE else None)
    wait(lambda: SITE in trial.fleet.ended(), lambda: f"{SITE} to die{trial.logs()}")

    def said() -> bool:
        return "1 more banks, for the quorum of 2" in [event["waits_for"] for event in trial.events(OTHER, "waiting")]

    wait(said, lambda: f"{OTHER} to say what the round waits for{trial.logs()}")
    made = {path.name for path in (trial.fleet.state(SITE) / "arrays").iterdir()}
    before, others = (len(list(images[site].iterdir())) for site in (SITE, OTHER))
    shutil.copy(min(images[OTHER].iterdir()), images[SITE] / "new.png")
    trial.start(SITE)
    wait(trial.done, trial.logs)

    held = {count: count // 2 if share else 0 for count in (before, before + 1, others)}
    banks = {count: count - held[count] for count in held}
    made_of = [(event["round"], event["images"]) for event in trial.events(SITE, "bank_made")]
    assert made_of == [(1, banks[before]), (2, banks[before + 1])]
    # What is scored is what was held out of the very bank, whatever would be held out of the images that are there now.
    scored = [(event["round"], event["images"]) for event in trial.events(SITE, "calibration_accepted")]
    assert scored == ([(1, held[before]), (2, held[before + 1])] if share else [])
    extracted = [(event["images"], event["extracted"]) for event in trial.events(SITE, "features_extracted")]
    assert extracted == [(before, before), (before + 1, 1)]
    trial.fleet.kill("aggregator")
    state = State(trial.fleet.state("aggregator"))
    first, second = (release.provenance for release in state.releases("parts"))
    state.close()
    assert (first.images, second.images) == (banks[before] + banks[others], banks[before + 1] + banks[others])
    sent = {hashlib.sha256(bytes.fromhex(name)).hexdigest() for name in made}
    assert len(sent & set(first.banks_sha256)) == 1  # the very bank that was made before the images came
