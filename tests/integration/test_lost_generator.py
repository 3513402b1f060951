"""A memory generator that is damaged at its edge client when all rounds are over: its site's lines do not notice."""

from __future__ import annotations

from pathlib import Path

from feddymem.v1.release_pb2 import RELEASE_KIND_MEMORY_GENERATOR, Release
from tests.chaos.federation import ROUNDS, SITES, Trial, read_release, wait

SITE, OTHER = SITES


def own_array(trial: Trial) -> Path:
    """On the disk of the site's edge client: an array of its generator that is in no bank and no other generator."""
    releases = (Release.FromString(read_release(trial.fleet.address(site), ROUNDS).message) for site in SITES)
    arrays, others = ({array.sha256.hex() for array in release.arrays} for release in releases)
    return trial.fleet.state(SITE) / "arrays" / min(arrays - others)


def test_an_untrained_generator_does_not_take_the_place_of_the_trained_one(trial: Trial) -> None:
    trial.run({})
    expected = trial.outcome().scores
    path = own_array(trial)
    trial.fleet.kill(SITE)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    trial.start(SITE)
    received = f"*-{RELEASE_KIND_MEMORY_GENERATOR}-{0:010}.binpb"
    releases = trial.fleet.state("inference") / "releases"
    wait(lambda: len(list(releases.glob(received))) == 1, trial.logs)
    [_warning] = trial.events(SITE, "generator_untrained")
    assert trial.scores() == expected
    trial.fleet.kill("inference")
    trial.start("inference")
    wait(lambda: trial.scores() == expected, trial.logs)
    trial.restart_inference_afresh()  # it has nothing better then
    wait(lambda: None not in trial.scores().values(), trial.logs)
    assert trial.scores()[OTHER] == expected[OTHER]
