"""A calibrated release: service, client, command line and library say the same of every image."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.publishing import Publishing
from feddymem.backbone import FeatureExtractor, load_extractor
from feddymem.calibration import Calibration, SiteCalibration, site_key
from feddymem.client import InspectionClient, InvalidRequestError, Verdict
from feddymem.datasets import SiteData
from feddymem.federation import federate
from feddymem.hold_out import calibrate
from feddymem.images import decode_file
from feddymem.maps import anomaly_map, coloured, heatmap_png, regions
from feddymem.method import Method
from feddymem.patches import PatchArray, PatchSource
from feddymem.scoring import Scorer
from feddymem.sketch import ScoreSketch
from feddymem.verdicts import ReleaseLimits, judge
from services.cli.inference_status import get_inspection_status
from services.demo.processes import Fleet, RunningService
from services.runtime.arrays import bank_from_wire, bank_to_wire

RATE = 0.1
SITES = ("brick-hall", "dim-hall")
HELD_OUT = 12
TIMEOUT_SECONDS = 60


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A service with a calibrated release, and the same in this process."""

    inference: RunningService
    publishing: Publishing
    sites: dict[str, SiteData]
    extractor: FeatureExtractor
    scorer: Scorer
    limits: ReleaseLimits
    publish: Callable[[int, Calibration | None], None]
    calibration: Calibration

    def score(self, image: Path) -> tuple[float, NDArray[np.float32]]:
        [found] = self.scorer.inspect(self.extractor.prepare(decode_file(image))[None])
        return found.score, found.distances

    def client(self, site: str) -> InspectionClient:
        return InspectionClient(self.inference.grpc, site=site)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, products: dict[str, SiteData]) -> Iterator[Calibrated]:
    folder, extractor = tmp_path_factory.mktemp("calibrated"), load_extractor(device="cpu")
    sites = {name: products[name] for name in SITES}

    def patches(images: tuple[Path, ...]) -> PatchArray:
        return PatchArray(np.concatenate([extractor(extractor.prepare(decode_file(p))[None]).numpy() for p in images]))

    banks: dict[str, PatchSource] = {name: patches(site.train[HELD_OUT:]) for name, site in sites.items()}
    memory = federate(banks, Method(bank_items=200, memory_items=400)).memory
    arrays = bank_to_wire(memory, "float16")
    scorer = Scorer(extractor, bank_from_wire((array.manifest, array.data) for array in arrays), None)
    held_out = {
        site_key("parts", name): calibrate(scorer, patches(site.train[:HELD_OUT])) for name, site in sites.items()
    }
    calibration = Calibration.of(held_out, RATE)
    publishing = Publishing(folder / "published", extractor.feature_space, "parts")
    with Fleet(folder) as fleet:
        inference = fleet.start("inference", "inference", "--aggregator", publishing.address, "--retry-seconds", "0.2")

        def publish(version: int, known: Calibration | None) -> None:
            publishing.publish(version, arrays, calibration=known)
            fleet.wait_until(lambda: scored_by(inference) == version, TIMEOUT_SECONDS, f"release {version}")

        publish(1, calibration)
        limits = ReleaseLimits("parts", calibration)
        yield Calibrated(inference, publishing, sites, extractor, scorer, limits, publish, calibration)
    publishing.stop()


def feddymem(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.cli", *arguments]
    wide = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=wide)


def metrics(inference: RunningService) -> str:
    with urllib.request.urlopen(f"http://{inference.metrics}/metrics", timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def scored_by(inference: RunningService) -> int:
    return max((each.release for each in get_inspection_status(inference.grpc).scoring), default=0)


@pytest.mark.parametrize("rate", [None, 0.3])
def test_library_and_service_say_the_same_of_every_image(calibrated: Calibrated, rate: float | None) -> None:
    verdicts = []
    for name, site in calibrated.sites.items():
        limits = calibrated.limits.of(name, rate)
        assert limits is not None
        with calibrated.client(name) as client:
            outcomes = client.inspect_many([image.path for image in site.test], false_alarm_rate=rate, regions=True)
            for image, answer in zip(site.test, outcomes, strict=True):
                assert not isinstance(answer, Exception)
                score, distances = calibrated.score(image.path)
                assert answer.score == pytest.approx(score, rel=1e-4)
                expected = judge(answer.score, limits.scores)
                assert expected is not None
                assert answer.threshold == expected.threshold
                assert (answer.verdict is Verdict.ANOMALOUS) is expected.anomalous
                assert answer.p_value == pytest.approx(expected.p_value)
                assert answer.normalised_score == pytest.approx(expected.normalised)
                assert answer.guarantee is not None
                assert answer.guarantee.images == HELD_OUT
                assert answer.guarantee.own_site
                assert answer.guarantee.false_alarm_rate == pytest.approx(limits.scores.rate)
                assert answer.pixel_threshold == limits.peaks.threshold
                found = regions(
                    anomaly_map(distances, (224, 224)), limits.peaks.threshold, decode_file(image.path).shape[:2]
                )
                assert len(answer.regions) == len(found)
                verdicts.append((image.defect, expected.anomalous))
    assert sum(anomalous for defect, anomalous in verdicts if defect) > 10
    assert sum(anomalous for defect, anomalous in verdicts if not defect) < 10


def test_a_normal_part_stays_dark_and_a_defect_glows(calibrated: Calibrated) -> None:
    for name, site in calibrated.sites.items():
        limits = calibrated.limits.of(name)
        assert limits is not None
        colours = [coloured(np.full((1, 1), value, np.float32), limits.heat_scale)[0, 0] for value in (0.0, 1e9)]
        dark, glowing = 0, 0
        with calibrated.client(name) as client:
            for image in site.test:
                found = client.inspect(image.path, map_kind="png", regions=True)
                assert found.heatmap is not None
                assert found.scale is not None
                assert found.scale.first == pytest.approx(limits.heat_scale.first)
                assert found.scale.last == pytest.approx(limits.heat_scale.last)
                first = (found.heatmap == colours[0]).all(axis=2).mean()
                dark += not image.defect and first > 0.95
                glowing += image.defect and (found.heatmap == colours[1]).all(axis=2).any()
        assert dark >= 8
        assert glowing >= 5


def test_an_overlay_of_distances_has_the_colours_of_the_heatmap(calibrated: Calibrated) -> None:
    image = calibrated.sites["dim-hall"].test[0].path
    with calibrated.client("dim-hall") as client:
        floats, png = client.inspect(image, map_kind="float32"), client.inspect(image, map_kind="png")
    assert floats.anomaly_map is not None
    assert floats.scale is not None
    assert png.heatmap_png is not None
    difference = floats.overlay(image).astype(int) - png.overlay(image)
    assert np.abs(difference).mean() < 1
    assert heatmap_png(floats.anomaly_map, floats.scale)


def test_a_rate_that_is_none_is_refused_and_a_threshold_wins(calibrated: Calibrated) -> None:
    image = calibrated.sites["dim-hall"].test[0].path
    with calibrated.client("dim-hall") as client:
        for rate in (0.0, 1.0, float("nan")):
            with pytest.raises(InvalidRequestError, match="false_alarm_rate"):
                client.inspect(image, false_alarm_rate=rate)
        found = client.inspect(image, threshold=1e6, false_alarm_rate=0.3)
        assert (found.verdict, found.threshold, found.guarantee) == (Verdict.NORMAL, 1e6, None)
        assert found.p_value is not None
    with calibrated.client("somebody") as client:
        stranger = client.inspect(image)
    assert stranger.guarantee is not None
    assert not stranger.guarantee.own_site
    assert stranger.guarantee.images == 2 * HELD_OUT


def test_the_command_line_shows_verdicts_and_the_state_of_the_lines(calibrated: Calibrated, tmp_path: Path) -> None:
    site = calibrated.sites["dim-hall"]
    images = [str(image.path) for image in site.test]
    common = (
        "--server",
        calibrated.inference.grpc,
        "--site",
        "dim-hall",
        "--regions",
        "--csv",
        str(tmp_path / "out.csv"),
    )
    done = feddymem("inspect", *images, *common, "--false-alarm-rate", "0.2", "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["verdict"] for row in rows} == {"normal", "anomalous"}
    assert all((row["p_value"] <= 0.2) == (row["verdict"] == "anomalous") for row in rows)
    assert {row["guaranteed_images"] for row in rows} == {HELD_OUT}
    assert "p_value" in (tmp_path / "out.csv").read_text().splitlines()[0]
    shown = feddymem("status", "--inference", calibrated.inference.grpc, "--json")
    states = {each["site"]: each for each in json.loads(shown.stdout)["scoring"]}
    assert states["dim-hall"]["guarantee"]["images"] == HELD_OUT
    assert int(states["dim-hall"]["images"]) >= len(images)
    table = feddymem("status", "--inference", calibrated.inference.grpc)
    assert table.returncode == 0
    assert f"parts: release {states['dim-hall']['release']}" in table.stdout
    assert f"by {HELD_OUT} of its own images" in table.stdout


def test_drift_is_shown_within_50_images_and_ends_with_another_release(calibrated: Calibrated) -> None:
    site, rng = calibrated.sites["brick-hall"], np.random.default_rng(0)
    usual = np.array([calibrated.score(path)[0] for path in site.train[:HELD_OUT]])
    many = SiteCalibration(*[ScoreSketch.of(rng.normal(usual.mean(), usual.std(), 100).clip(0))] * 2)
    calibrated.publish(2, Calibration.of({site_key("parts", "brick-hall"): many}, RATE))
    relit = [(0.8 * decode_file(path) + 15).astype(np.uint8) for path in site.train]
    with calibrated.client("brick-hall") as client:
        for number in range(50):
            client.inspect(relit[number % len(relit)])
    [state] = [each for each in get_inspection_status(calibrated.inference.grpc).scoring if each.site == "brick-hall"]
    assert state.drift
    assert 0 <= state.images_since_drift < 50
    assert 'feddymem_drift{federation="parts",site="brick-hall"} 1.0' in metrics(calibrated.inference)
    calibrated.publish(3, None)
    with calibrated.client("brick-hall") as client:
        found = client.inspect(relit[0])
    assert (found.verdict, found.p_value, found.threshold) == (None, None, None)
    assert 'feddymem_drift{federation="parts",site="brick-hall"} 0.0' in metrics(calibrated.inference)
    calibrated.publish(4, calibrated.calibration)
