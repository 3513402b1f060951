"""From an image to its result: the verdict, and regions and maps for those who ask for them."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import grpc
import numpy as np
import pytest
from PIL import Image

from feddymem import maps, scoring
from feddymem.calibration import Calibration, SiteCalibration, site_key
from feddymem.image_data import EncodedImage, RawImage
from feddymem.images import ImageError, decode
from feddymem.maps import MapKind, Region, anomaly_map
from feddymem.sketch import ScoreSketch
from feddymem.verdicts import ReleaseLimits
from services.inference import inspector as inspector_module
from services.inference.active import Active
from services.inference.batcher import Batcher
from services.inference.inspector import Inspection, Inspector, Result
from services.inference.job import Afterwards, Scored
from services.inference.large_images import LargeImages
from services.inference.lines import Lines
from services.inference.registry import Registry
from services.runtime.changes import Changes
from services.runtime.errors import Refusal, not_found
from tests.feature_spaces import SPACE
from tests.samples import total

SECONDS = 30
IMAGE = EncodedImage(b"image")
SCORE, HEIGHT, WIDTH = 2.5, 40, 60
FULL = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
DISTANCES = np.zeros((4, 4), np.float32)
DISTANCES[0, 3] = 9
Made = TypeVar("Made")


class FakeRegistry:
    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.limits: ReleaseLimits | None = None

    def find(self, federation: str, site: str) -> Active:
        self.asked.append((federation, site))
        if federation == "moon":
            raise not_found("no such federation")
        scorer: Any = SimpleNamespace(extractor=SimpleNamespace(feature_space=SPACE), typical_distance=1.0)
        return Active("parts", "", 7, 0, scorer, Lines("parts", self.limits))


class FakeBatcher:
    """Answers with what is in `answers`, the last of them for ever, made into a result in another thread."""

    def __init__(self) -> None:
        scored = Scored(scoring.Inspection(SCORE, DISTANCES), HEIGHT, WIDTH, queue_seconds=0.5, compute_seconds=0.25)
        self.answers: list[Scored | Exception] = [scored]
        self.asked: list[tuple[EncodedImage | RawImage, str, float | None]] = []
        self.changes = Changes()
        self.waiting = asyncio.Event()
        self.large_images = LargeImages(HEIGHT * WIDTH)

    async def inspect(
        self,
        active: Active,
        image: EncodedImage | RawImage,
        finish: Callable[[Scored], Made],
        caller: str = "",
        seconds_left: float | None = None,
        afterwards: Afterwards | None = None,
    ) -> Made:
        self.asked.append((image, caller, seconds_left))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return await asyncio.to_thread(finish, answer)

    async def room(self, seconds: float | None) -> None:
        self.waiting.set()
        await self.changes.wait()


class Core:
    """An inspector between fakes."""

    def __init__(self) -> None:
        self.registry, self.batcher = FakeRegistry(), FakeBatcher()
        self.inspector = Inspector(cast(Registry, self.registry), cast(Batcher, self.batcher))

    async def result(self, **wanted: Any) -> Result:
        return await asyncio.wait_for(self.inspector.inspect(Inspection(IMAGE, **wanted)), SECONDS)


@pytest.fixture
def core() -> Core:
    return Core()


@pytest.mark.parametrize(
    ("threshold", "anomalous"),
    [(None, None), (0.0, True), (2.4999, True), (SCORE, True), (2.5001, False), (float("inf"), False)],
)
async def test_an_image_is_anomalous_from_the_threshold_on(
    core: Core, threshold: float | None, anomalous: bool | None
) -> None:
    result = await core.result(threshold=threshold)
    assert result.anomalous is anomalous
    assert result.score == SCORE


def calibrated(sites: dict[str, list[float]], rate: float = 0.1) -> ReleaseLimits:
    """Limits of images with these scores, and peaks of twice as much."""
    keyed = {
        site_key("parts", name): SiteCalibration(ScoreSketch.of(scores), ScoreSketch.of(2 * each for each in scores))
        for name, scores in sites.items()
    }
    return ReleaseLimits("parts", Calibration.of(keyed, rate))


async def test_verdicts_are_counted_by_what_they_say(core: Core) -> None:
    def verdicts() -> list[float]:
        return [total("verdicts_total", federation="parts", verdict=each) for each in ("normal", "anomalous")]

    normal, anomalous = verdicts()
    for threshold in (0.0, SCORE, float("inf"), None):
        await core.result(threshold=threshold)
    assert verdicts() == [normal + 1, anomalous + 2]


NORMALS = list(np.linspace(1, 2, 40))


async def test_a_calibrated_release_gives_a_verdict_and_what_it_rests_on(core: Core) -> None:
    core.registry.limits = calibrated({"north": NORMALS})
    found = await core.result(site="north")
    assert found.anomalous is True
    judgement = found.judgement
    assert judgement is not None
    assert judgement.p_value == 1 / 41
    assert judgement.normalised is not None
    assert judgement.normalised > 0.5
    assert judgement.limit is not None
    assert (judgement.limit.images, judgement.limit.basis) == (40, "site")
    assert (found.regions, found.float_map, found.png_map) == ((), None, None)
    core.registry.limits = calibrated({"north": [2 * each for each in NORMALS]})
    assert (await core.result(site="north")).anomalous is False


async def test_the_threshold_of_a_request_wins_and_so_does_its_rate(core: Core) -> None:
    core.registry.limits = calibrated({"north": [*NORMALS, 2.6, 2.7]})
    assert (await core.result(site="north")).anomalous is True
    strict = await core.result(site="north", false_alarm_rate=0.03)
    assert strict.anomalous is False
    own = await core.result(site="north", threshold=2.4, false_alarm_rate=0.03)
    assert own.anomalous is True
    assert own.judgement is not None
    assert strict.judgement is not None
    assert (own.judgement.limit, own.judgement.p_value) == (None, strict.judgement.p_value)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
async def test_a_rate_that_makes_no_sense_is_refused_before_anything_is_done(core: Core, rate: float) -> None:
    with pytest.raises(Refusal, match=f"^false_alarm_rate is {rate}; expected a number above 0 and below 1") as caught:
        await core.result(false_alarm_rate=rate)
    assert caught.value.status is grpc.StatusCode.INVALID_ARGUMENT
    assert core.batcher.asked == []


async def test_a_site_that_is_not_known_is_judged_by_all_sites(core: Core) -> None:
    core.registry.limits = calibrated({"north": NORMALS, "south": [10 * each for each in NORMALS]})
    found = await core.result(site="somebody")
    assert found.anomalous is False
    assert found.judgement is not None
    assert found.judgement.limit is not None
    assert (found.judgement.limit.basis, found.judgement.limit.images) == ("federation", 80)


async def test_regions_are_by_the_calibrated_threshold_if_they_are_asked_for_without_one(core: Core) -> None:
    core.registry.limits = calibrated({"north": NORMALS})
    found = await core.result(site="north", regions=True)
    pixels = anomaly_map(DISTANCES, (SPACE.input_size, SPACE.input_size))
    assert found.pixel_threshold is not None
    assert 3.8 < found.pixel_threshold < 3.9
    assert found.regions == maps.regions(pixels, found.pixel_threshold, (HEIGHT, WIDTH)) != ()
    assert (await core.result(site="north", regions=True, pixel_threshold=9.1)).regions == ()
    core.registry.limits = None
    nothing = await core.result(site="north", regions=True)
    assert (nothing.regions, nothing.pixel_threshold) == ((), None)


async def test_a_heatmap_has_the_colours_of_the_calibration_or_of_the_memory_without_one(core: Core) -> None:
    pixels = anomaly_map(DISTANCES, (HEIGHT, WIDTH))
    core.registry.limits = calibrated({"north": NORMALS})
    found = await core.result(site="north", map_kind="png", pixel_threshold=1.0)
    assert found.png_map is not None
    assert found.pixel_threshold == 1.0  # regions are by it, colours are not
    peaks = core.registry.limits.of("north")
    assert peaks is not None
    assert found.heat_scale.first == pytest.approx(3, abs=0.05)
    assert (found.heat_scale.first + found.heat_scale.last) / 2 == pytest.approx(peaks.peaks.threshold, rel=1e-6)
    np.testing.assert_array_equal(decode(found.png_map), maps.coloured(pixels, found.heat_scale))
    core.registry.limits = None
    assert (await core.result(map_kind="png")).heat_scale == maps.HeatScale.of_memory(1.0)


@pytest.mark.parametrize(
    ("normals", "anomalous", "rate"),
    [([1.0] * 40, True, 0.097), ([2.5] * 40, False, 0.097), ([1.0], True, 0.5), ([2.5], False, 0.5), ([], None, None)],
    ids=["all equal", "all equal to it", "one image", "one image like it", "none at all"],
)
async def test_few_or_equal_held_out_images_give_sane_answers(
    core: Core, normals: list[float], anomalous: bool | None, rate: float | None
) -> None:
    core.registry.limits = calibrated({"north": normals})
    found = await core.result(site="north", regions=True, map_kind="png")
    assert found.anomalous is anomalous
    assert (found.judgement is None) == (anomalous is None)
    if found.judgement is not None:
        assert found.judgement.limit is not None
        assert found.judgement.limit.rate == pytest.approx(rate, abs=0.002)


@pytest.mark.parametrize("name", ["threshold", "pixel_threshold"])
@pytest.mark.parametrize("value", [float("nan"), -0.001, -float("inf")])
async def test_a_threshold_that_makes_no_sense_is_refused_before_anything_is_done(
    core: Core, name: str, value: float
) -> None:
    with pytest.raises(Refusal, match=f"^{name} is {value}; expected a number of at least 0") as caught:
        await core.result(**{name: value})
    assert caught.value.status is grpc.StatusCode.INVALID_ARGUMENT
    assert core.registry.asked == []
    assert core.batcher.asked == []


async def test_nothing_is_drawn_that_nobody_asked_for(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("anomaly_map", "regions", "heatmap_png"):
        monkeypatch.delattr(inspector_module, name)
    result = await core.result(threshold=1.0)
    assert (result.regions, result.float_map, result.png_map) == ((), None, None)


@pytest.mark.parametrize("map_kind", ["none", "float32", "png"])
@pytest.mark.parametrize("pixel_threshold", [None, 4.0])
async def test_the_result_has_what_was_asked_for_and_nothing_else(
    core: Core, pixel_threshold: float | None, map_kind: MapKind
) -> None:
    result = await core.result(pixel_threshold=pixel_threshold, map_kind=map_kind)
    assert (result.float_map is not None) == (map_kind == "float32")
    assert (result.png_map is not None) == (map_kind == "png")
    assert bool(result.regions) == (pixel_threshold is not None)
    assert result.anomalous is None


async def test_regions_are_those_of_the_map_in_pixels_of_the_image(core: Core) -> None:
    [region] = (await core.result(pixel_threshold=4.0)).regions
    pixels = anomaly_map(DISTANCES, (SPACE.input_size, SPACE.input_size))
    expected = maps.regions(pixels, 4.0, (HEIGHT, WIDTH))
    assert (region,) == expected
    assert isinstance(region, Region)
    assert (region.top, region.left + region.width) == (0, WIDTH)
    assert region.height < HEIGHT / 2


async def test_a_pixel_threshold_that_nothing_reaches_gives_no_regions(core: Core) -> None:
    assert (await core.result(pixel_threshold=9.1)).regions == ()


async def test_the_float_map_has_the_size_of_the_backbones_input(core: Core) -> None:
    result = await core.result(map_kind="float32")
    np.testing.assert_array_equal(result.float_map, anomaly_map(DISTANCES, (SPACE.input_size, SPACE.input_size)))


async def test_the_png_has_the_size_of_the_image(core: Core) -> None:
    result = await core.result(map_kind="png")
    assert result.png_map is not None
    with Image.open(io.BytesIO(result.png_map)) as image:
        assert (image.format, image.size) == ("PNG", (WIDTH, HEIGHT))
    assert (result.height, result.width) == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("anomaly_map", {"map_kind": "float32"}),
        ("anomaly_map", {"map_kind": "png"}),
        ("heatmap_png", {"map_kind": "png"}),
        ("anomaly_map", {"pixel_threshold": 1.0}),
        ("regions", {"pixel_threshold": 1.0}),
    ],
)
async def test_the_event_loop_does_not_draw(
    core: Core, name: str, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batcher's threads do, for it is the batcher that has the result made."""
    threads, draw = [], getattr(inspector_module, name)

    def noted(*args: Any) -> Any:
        threads.append(threading.current_thread())
        return draw(*args)

    monkeypatch.setattr(inspector_module, name, noted)
    await core.result(**wanted)
    [thread] = threads
    assert thread is not threading.main_thread()


async def test_what_goes_wrong_in_drawing_reaches_the_caller(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise MemoryError("map")

    monkeypatch.setattr(inspector_module, "anomaly_map", fail)
    with pytest.raises(MemoryError, match="map"):
        await core.result(map_kind="png")


async def test_the_result_says_what_scored_and_how_long_it_took(core: Core) -> None:
    result = await core.result(federation="parts", site="north", caller="line 3")
    assert core.registry.asked == [("parts", "north")]
    assert core.batcher.asked == [(IMAGE, "line 3", None)]
    assert (result.federation, result.site, result.release) == ("parts", "north", 7)
    assert result.queue_seconds == pytest.approx(0.5, abs=0.1)  # with the wait for room, of which there is none
    assert result.compute_seconds == 0.25
    assert (await core.result()).site == ""


async def test_the_batcher_is_told_how_long_the_caller_waits(core: Core) -> None:
    await core.result(seconds_left=5.0)
    [(_image, _caller, left)] = core.batcher.asked
    assert left is not None
    assert 4 < left <= 5


@pytest.mark.parametrize(
    "error", [FULL, Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "late"), ImageError("broken"), RuntimeError("bug")]
)
async def test_what_goes_wrong_reaches_the_caller_as_it_is(core: Core, error: Exception) -> None:
    core.batcher.answers = [error]
    with pytest.raises(type(error)) as caught:
        await core.result(map_kind="png")
    assert caught.value is error


async def test_an_unknown_federation_is_refused_before_anything_is_queued(core: Core) -> None:
    with pytest.raises(Refusal, match="no such federation"):
        await core.result(federation="moon")
    assert core.batcher.asked == []


async def test_a_patient_caller_waits_for_room_and_tries_again(core: Core) -> None:
    [scored] = core.batcher.answers
    core.batcher.answers = [FULL, FULL, scored]
    task = asyncio.create_task(core.result(patient=True, seconds_left=50.0))
    for tries in (1, 2):
        await asyncio.wait_for(core.batcher.waiting.wait(), SECONDS)
        assert len(core.batcher.asked) == tries
        assert not task.done()
        core.batcher.waiting.clear()
        core.batcher.changes.notify()
    assert (await task).score == SCORE
    times = [left for _image, _caller, left in core.batcher.asked if left is not None]
    assert len(times) == 3
    assert 50 >= times[0] > times[1] > times[2] > 50 - SECONDS


@pytest.mark.parametrize("error", [Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "late"), ImageError("broken")])
async def test_a_patient_caller_waits_for_nothing_but_room(core: Core, error: Exception) -> None:
    core.batcher.answers = [error]
    with pytest.raises(type(error)):
        await core.result(patient=True)
    assert len(core.batcher.asked) == 1
