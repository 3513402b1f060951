"""What is counted of lines: alarms, drift, and what a shadow says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feddymem.calibration import Calibration, SiteCalibration, site_key
from feddymem.image_data import EncodedImage, RawImage
from feddymem.scoring import Scorer
from feddymem.sketch import ScoreSketch
from feddymem.v1.calibration_pb2 import Calibration as CalibrationMessage
from feddymem.v1.inspection_pb2 import ScoringStatus
from feddymem.verdicts import ReleaseLimits
from services.inference import metrics
from services.inference.active import Active
from services.inference.batcher import Batcher
from services.inference.inspector import Inspection, Inspector
from services.inference.job import Afterwards, Result, Scored
from services.inference.lines import Line, Lines
from services.inference.registry import Registry
from services.inference.scoring_status import scoring
from services.runtime.messages import calibration_to_message
from tests.samples import sample, total
from tests.unit.test_registry import small_registry, small_release

IMAGE = RawImage(bytes(32 * 32 * 3), 32, 32, 3, 8)
SECONDS = 30


@pytest.fixture(autouse=True)
def _no_lines_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_lines", {})


def calibration(federation: str, scores: Any, site: str = "north") -> Calibration:
    known = SiteCalibration(ScoreSketch.of(scores), ScoreSketch.of(scores))
    return Calibration.of({site_key(federation, site): known}, 0.05)


def lines(federation: str, scores: Any) -> Lines:
    return Lines(federation, ReleaseLimits(federation, calibration(federation, scores)))


def opened(found: Line | None) -> Line:
    assert found is not None
    return found


def test_alarms_are_those_of_the_last_images() -> None:
    line = opened(lines("alarms", np.linspace(1, 2, 60)).of("north", known=False))
    for number in range(1_500):
        line.note(9.0 if number < 510 or number % 100 == 0 else 1.5)
    status = line.status()
    assert (status.site, status.images, status.recent_images, status.recent_alarms) == ("north", 1_500, 1_000, 19)
    assert status.threshold == pytest.approx(2, rel=0.06)
    assert (status.guarantee.images, status.guarantee.own_site) == (60, True)


def test_drift_is_shown_until_it_is_over_or_the_release_goes() -> None:
    rng = np.random.default_rng(0)
    of = lines("drifts", rng.normal(10, 1, 100))
    line = opened(of.of("north", known=False))

    def shown() -> float | None:
        return sample("drift", federation="drifts", site="north")

    assert shown() == 0
    for score in rng.normal(12, 1, 60):
        line.note(score)
    assert (shown(), line.status().drift) == (1, True)
    assert line.status().images_since_drift > 0
    for score in rng.normal(10, 1, 400):
        line.note(score)
    assert (shown(), line.status().drift) == (0, False)
    for score in rng.normal(12, 1, 60):
        line.note(score)
    assert shown() == 1
    of.leave()
    assert shown() == 0


def test_without_held_out_images_there_is_no_drift_and_no_alarm() -> None:
    for of in (Lines("plain", None), lines("plain", [])):
        line = opened(of.of("north", known=False))
        line.note(5.0)
        assert line.status() == ScoringStatus(site="", images=1)


def test_one_held_out_image_and_equal_ones_raise_no_drift() -> None:
    for scores in ([5.0], [5.0] * 40):
        line = opened(lines("equal", scores).of("north", known=False))
        for _ in range(300):
            line.note(5.0)
        status = line.status()
        assert (status.drift, status.recent_alarms, status.recent_images) == (False, 0, 300)


def test_names_that_only_a_caller_knows_are_one_line_and_lines_have_an_end() -> None:
    of = lines("named", [1.0] * 60)
    assert of.of("somebody", known=False) is of.of("", known=False) is not of.of("north", known=False)
    assert opened(of.of("south", known=True)).site == "south"
    for number in range(100):
        of.of(f"site-{number}", known=True)
    assert len(of.all()) == metrics.NAMED_LINES
    assert of.of("too many", known=True) is None
    assert of.of("north", known=False) is not None


def test_the_alarm_band_is_that_of_the_site_with_the_widest_and_goes_with_the_calibration() -> None:
    keyed = {
        site_key("band", name): SiteCalibration(*[ScoreSketch.of(np.linspace(1, 2, images))] * 2)
        for name, images in (("few", 20), ("many", 1_000))
    }
    of = Lines("band", ReleaseLimits("band", Calibration.of(keyed, 0.05)))
    shown = []
    for site in ("many", "few", "many"):
        of.of(site, known=False)
        shown.append(sample("alarm_rate_highest_ratio", federation="band"))
    assert shown[0] == pytest.approx(0.118, abs=0.005)
    assert shown[1] == shown[2] == pytest.approx(0.20, abs=0.01)
    of.leave()
    assert sample("alarm_rate_highest_ratio", federation="band") is None


@asynccontextmanager
async def inspecting(folder: Path) -> AsyncIterator[tuple[Registry, Inspector]]:
    registry, batcher = small_registry(folder), Batcher(1, 1, 0, 8, 10**6)
    batcher.start()
    try:
        yield registry, Inspector(registry, batcher)
    finally:
        await asyncio.to_thread(batcher.stop)


def message(scores: Any) -> CalibrationMessage:
    return calibration_to_message(calibration("parts", scores))


HIGH, LOW = [1e6] * 40, [1e-6] * 40


def judged() -> float:
    return sum(total("shadow_images_total", outcome=each) for each in ("judged", "failed"))


async def inspect(inspector: Inspector, **wanted: Any) -> bool | None:
    """The verdict, when the shadow has had its turn."""
    before = judged()
    found = await asyncio.wait_for(inspector.inspect(Inspection(IMAGE, site="north", **wanted)), SECONDS)
    async with asyncio.timeout(SECONDS):
        while judged() == before:  # noqa: ASYNC110 - there is no event for a metric
            await asyncio.sleep(0.001)
    return found.anomalous


@pytest.mark.parametrize(
    ("active", "shadow", "only", "missing"),
    [(HIGH, LOW, 1, 0), (LOW, HIGH, 0, 1), (LOW, LOW, 0, 0), (HIGH, HIGH, 0, 0)],
)
async def test_a_shadow_is_counted_and_answers_nothing(
    tmp_path: Path, active: list[float], shadow: list[float], only: int, missing: int
) -> None:
    async with inspecting(tmp_path) as (registry, inspector):
        await registry.receive(small_release(registry, 3, calibration=message(active)))
        await registry.receive(small_release(registry, 4, seed=1, calibration=message(shadow), shadow=True))
        agreements = ("same", "shadow_only", "active_only")
        names = [("shadow_verdicts", {"federation": "parts", "agreement": each}) for each in agreements]
        names += [("shadow_images", {"outcome": each}) for each in ("judged", "dropped", "failed")]
        before = [total(f"{name}_total", **labels) for name, labels in names]
        assert await inspect(inspector) is (active is LOW)
        assert await inspect(inspector, threshold=1e9) is False  # the request's: none of the shadow's business
        after = [total(f"{name}_total", **labels) for name, labels in names]
        more = [now - old for now, old in zip(after, before, strict=True)]
        assert more == [2 * (not only and not missing), 2 * only, 2 * missing, 2, 0, 0]
        [state] = scoring(registry.active(), "")
        assert (state.release, state.shadow, state.shadow_images) == (3, 4, 2)
        assert (state.shadow_only_alarms, state.shadow_missing_alarms) == (2 * only, 2 * missing)
        assert scoring(registry.active(), "other") == []


async def test_an_error_of_the_shadow_reaches_no_caller_and_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with inspecting(tmp_path) as (registry, inspector):
        await registry.receive(small_release(registry, 3, calibration=message(HIGH)))
        await registry.receive(small_release(registry, 4, seed=1, calibration=message(LOW), shadow=True))
        shadow = registry.find("parts", "north").lines.shadow
        assert shadow is not None

        def fail(*_args: Any) -> Any:
            raise RuntimeError("out of memory")

        scorer = shadow.scorer("")
        assert isinstance(scorer, Scorer)
        monkeypatch.setattr(scorer, "inspect_features", fail)
        for _ in range(3):
            assert await inspect(inspector) is False
        [state] = scoring(registry.active(), "")
        assert state.shadow_images == 0
    assert capsys.readouterr().out.count("shadow_failed") == 1


class Busy(Batcher):
    """Has no time for what is to be done afterwards."""

    async def inspect(
        self,
        active: Active,
        image: EncodedImage | RawImage,
        finish: Callable[[Scored], Result],
        caller: str = "",
        seconds_left: float | None = None,
        afterwards: Afterwards | None = None,
    ) -> Result:
        assert afterwards is not None
        return await super().inspect(active, image, finish, caller, seconds_left, lambda _scored: afterwards(None))


async def test_an_image_that_the_shadow_has_no_time_for_is_dropped_and_no_verdict(tmp_path: Path) -> None:
    def dropped() -> float:
        return total("shadow_images_total", outcome="dropped")

    registry, batcher = small_registry(tmp_path), Busy(1, 1, 0, 8, 10**6)
    await registry.receive(small_release(registry, 3, calibration=message(HIGH)))
    await registry.receive(small_release(registry, 4, seed=1, calibration=message(LOW), shadow=True))
    before, seen = dropped(), judged()
    batcher.start()
    try:
        result = await asyncio.wait_for(Inspector(registry, batcher).inspect(Inspection(IMAGE, site="north")), SECONDS)
    finally:
        await asyncio.to_thread(batcher.stop)
    assert result.anomalous is False
    assert (dropped(), judged()) == (before + 1, seen)
    [state] = scoring(registry.active(), "")
    assert state.shadow_images == 0


async def test_a_shadow_of_another_feature_space_looks_at_the_image_itself(tmp_path: Path) -> None:
    async with inspecting(tmp_path) as (registry, inspector):
        await registry.receive(small_release(registry, 3, calibration=message(HIGH)))
        await registry.receive(small_release(registry, 4, input_size=64, calibration=message(LOW), shadow=True))
        assert await inspect(inspector) is False
        [state] = scoring(registry.active(), "")
        assert (state.shadow_images, state.shadow_only_alarms) == (1, 1)


async def test_a_release_that_nobody_has_sent_images_for_is_in_the_status(tmp_path: Path) -> None:
    async with inspecting(tmp_path) as (registry, _inspector):
        await registry.receive(small_release(registry, 3, calibration=message(HIGH)))
        assert scoring(registry.active(), "") == [ScoringStatus(federation="parts", release=3)]


async def test_an_image_is_noted_on_its_line_with_its_score(tmp_path: Path) -> None:
    async with inspecting(tmp_path) as (registry, inspector):
        await registry.receive(small_release(registry, 3, calibration=message(LOW)))
        for _ in range(3):
            await asyncio.wait_for(inspector.inspect(Inspection(IMAGE, site="north")), SECONDS)
        [state] = scoring(registry.active(), "")
        assert (state.images, state.recent_alarms) == (3, 3)
