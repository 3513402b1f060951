"""Experiments: every method on a small data set, figures put together, and the report of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from feddymem.backbone import FeatureExtractor
from feddymem.comparison import CONTENDERS, Contender, Detectors, Sites, averaged
from feddymem.dataset_files import load_sites
from feddymem.datasets import SiteData
from feddymem.experiment import METRICS, Experiment, Figures, Result, Run, drawn, extract_all, run, seeds_run
from feddymem.feature_cache import CachedPatches, FeatureCache
from feddymem.method import Method
from services.evaluate.main import InvalidChoiceError, parse_methods, parse_seeds
from services.evaluate.report import as_json, write_report

METHOD = Method(bank_items=64, memory_items=128)


def write_site(folder: Path, seed: int) -> None:
    """Six smooth images for training and four for test, two of them with a bright square."""
    rng = np.random.default_rng(seed)
    for number in range(10):
        pixels = cv2.GaussianBlur(rng.integers(60, 140, (64, 64)).astype(np.uint8), (0, 0), 2)
        mask = np.zeros((64, 64), np.uint8)
        mask[20:40, 20:40] = 255
        kind = "train/good" if number < 6 else "test/good" if number < 8 else "test/square"
        if kind == "test/square":
            pixels = np.maximum(pixels, mask)
            truth = folder / "ground_truth" / "square" / f"{number}_mask.png"
            truth.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(truth), mask)
        (folder / kind).mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(folder / kind / f"{number}.png"), pixels)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> tuple[SiteData, ...]:
    root = tmp_path_factory.mktemp("squares")
    for seed, name in enumerate(("north", "south")):
        write_site(root / name, seed)
    return load_sites(root)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, small: FeatureExtractor) -> FeatureCache:
    return FeatureCache(tmp_path_factory.mktemp("cache"), small)


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_method_finds_squares_that_no_training_image_has(
    name: str, sites: tuple[SiteData, ...], cache: FeatureCache
) -> None:
    outcome = run(sites, name, METHOD, cache)
    assert set(outcome.sites) == {"north", "south"}
    for figures in (*outcome.sites.values(), outcome.mean):
        assert set(figures) == set(METRICS)
        assert figures["image_auroc"] == 1
        assert figures["pixel_auroc"] > 0.8
        assert all(math.isfinite(value) for value in figures.values())
        assert figures["seconds"] > 0
        assert figures["peak_memory_bytes"] > 50e6


def test_extracting_all_says_how_far_it_is(sites: tuple[SiteData, ...], cache: FeatureCache) -> None:
    seen: list[tuple[str, int, int]] = []
    extract_all(sites, cache, lambda *step: seen.append(step))
    assert seen[-1] == ("features", 20, 20)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_a_site_without_test_images_has_no_detection_figures(sites: tuple[SiteData, ...], cache: FeatureCache) -> None:
    untested = SiteData("untested", sites[0].train[:3], ())
    figures = run([untested], "without-rounds", METHOD, cache).sites["untested"]
    assert {key for key in METRICS if math.isnan(figures[key])} == {*METRICS[:5], "false_alarm_rate", "detection_rate"}


def test_verdicts_are_by_what_all_sites_hold_out_and_of_a_site_alone_by_its_own(
    sites: tuple[SiteData, ...], cache: FeatureCache
) -> None:
    """Three of six images are held out: with another site's, 1 / 7 can be guaranteed, by themselves 1 / 4."""
    for name, rate in (("feddymem", 1 / 7), ("pooled", 1 / 7), ("local", 1 / 4)):
        for figures in run(sites, name, METHOD, cache).sites.values():
            assert figures["held_out_images"] == 3
            assert figures["guaranteed_rate"] == pytest.approx(rate)
            assert figures["detection_rate"] == 1
            assert figures["false_alarm_rate"] in {0, 0.5, 1}


def test_without_held_out_images_there_are_no_verdicts(sites: tuple[SiteData, ...], cache: FeatureCache) -> None:
    whole = METHOD.model_copy(update={"hold_out_share": 0.0})
    for figures in run(sites, "without-rounds", whole, cache).sites.values():
        assert figures["held_out_images"] == 0
        unknown = {key for key in METRICS if math.isnan(figures[key])}
        assert unknown == {"false_alarm_rate", "detection_rate", "guaranteed_rate"}


def test_what_is_held_out_is_in_no_bank_whatever_the_method(
    sites: tuple[SiteData, ...], cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All methods get the same images, so that the comparison is fair."""
    seen: list[dict[str, tuple[Path, ...]]] = []

    def detectors(sources: Sites, *_: object) -> Detectors:
        seen.append({name: source.paths for name, source in sources.items() if isinstance(source, CachedPatches)})
        return averaged(sources, METHOD)

    monkeypatch.setattr("feddymem.experiment.CONTENDERS", dict.fromkeys(CONTENDERS, Contender(detectors, "")))
    for name in CONTENDERS:
        run(sites, name, METHOD, cache)
    want = {site.name: CachedPatches(cache, site.train).split(0.2, 0)[0].paths for site in sites}
    assert [len(paths) for paths in want.values()] == [3, 3]
    assert seen == [want] * len(CONTENDERS)


def test_methods_without_a_seed_run_once_where_no_image_is_held_out() -> None:
    assert [seeds_run(name, (3, 4), 0, None) for name in ("fedavg", "pooled")] == [(3, 4), (3,)]
    assert seeds_run("pooled", (3, 4), 0.2, None) == (3, 4)


def test_images_are_drawn_by_the_seed_and_all_kept_without_a_number(sites: tuple[SiteData, ...]) -> None:
    fewer, again, others = (drawn(sites, 2, seed) for seed in (0, 0, 1))
    assert drawn(sites, None, 0) == sites
    assert fewer == again != others
    for site, whole in zip(fewer, sites, strict=True):
        assert len(site.train) == 2
        assert set(site.train) < set(whole.train)
        assert site.test == whole.test
    assert drawn(sites, 10_000, 0) == sites


def test_where_images_are_drawn_every_method_runs_with_every_seed() -> None:
    assert seeds_run("pooled", (0, 1, 2), 0, train_images=8) == (0, 1, 2)


def figures(value: float) -> Figures:
    return dict.fromkeys(METRICS, value)


def test_means_leave_out_what_is_not_known_and_deviations_are_over_seeds() -> None:
    runs = (
        Run({"a": figures(0.2), "b": figures(0.4)}),
        Run({"a": figures(0.6), "b": figures(math.nan)}),
    )
    result = Result(runs)
    assert result.mean == pytest.approx(figures((0.3 + 0.6) / 2))
    assert result.std == pytest.approx(figures(0.15))
    assert result.sites["a"] == pytest.approx(figures(0.4))
    assert result.sites["b"] == pytest.approx(figures(0.4))


@pytest.fixture
def experiment(small: FeatureExtractor) -> Experiment:
    known, unknown = figures(0.5), {**figures(0.25), "aupro": math.nan}
    results = {
        "feddymem": Result((Run({"a": known, "b": unknown}), Run({"a": known, "b": known}))),
        "pooled": Result((Run({"a": unknown, "b": unknown}),)),
    }
    return Experiment("<parts>", small.feature_space, Method(), (0, 1), None, results)


def test_the_json_report_has_a_value_for_every_figure_and_null_for_what_is_not_known(experiment: Experiment) -> None:
    report = as_json(experiment)
    assert (report["data"], report["seeds"], report["false_alarm_rate"]) == ("<parts>", [0, 1], 0.05)
    assert report["fingerprint"] == experiment.feature_space.fingerprint
    methods = report["methods"]
    assert isinstance(methods, dict)
    for method in methods.values():
        assert set(method) == {*METRICS, "std", "sites"}
        assert set(method["std"]) == set(METRICS)
        assert {site: set(values) for site, values in method["sites"].items()} == {"a": set(METRICS), "b": set(METRICS)}
    assert methods["pooled"]["aupro"] is None
    assert methods["pooled"]["sites"]["b"]["aupro"] is None
    assert methods["feddymem"]["aupro"] == pytest.approx(0.5)
    assert methods["feddymem"]["image_auroc"] == pytest.approx((0.375 + 0.5) / 2)
    assert methods["feddymem"]["std"]["image_auroc"] == pytest.approx(0.0625)


def test_the_reports_for_people_have_every_method_and_site(experiment: Experiment, tmp_path: Path) -> None:
    write_report(experiment, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(as_json(experiment)))
    page, text = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    assert "&lt;parts&gt;" in page
    assert "http" not in page
    assert "<parts>" in text
    for report in (page, text):
        assert all(
            word in report for word in ("feddymem", "pooled", "0.438 ± 0.062", "AUPRO", "false alarms", "rate of 5.0 %")
        )
        assert report.count("±") == 1 + len(METRICS)  # the legend, and feddymem's: pooled ran once
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == (2 + 2) + 2 * (2 + 2)
    assert len({row.count("|") for row in rows}) == 1


def test_methods_are_all_or_those_named() -> None:
    assert parse_methods("") == tuple(CONTENDERS)
    assert parse_methods("pooled, local") == ("pooled", "local")


@pytest.mark.parametrize("text", ["fedmem", "local,", "local,local"])
def test_a_wrong_method_is_named(text: str) -> None:
    with pytest.raises(InvalidChoiceError, match=r"none of the methods feddymem, local|twice"):
        parse_methods(text)


@pytest.mark.parametrize(
    ("text", "seeds"), [("0", (0,)), ("1", (0,)), ("3", (0, 1, 2)), ("0,1,2", (0, 1, 2)), ("7, 5", (7, 5))]
)
def test_seeds_are_a_list_or_a_number(text: str, seeds: tuple[int, ...]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "one", "-1", "1.5", "0,", "1,1", "9223372036854775808,0", "1000000000"])
def test_wrong_seeds_are_refused(text: str) -> None:
    with pytest.raises(InvalidChoiceError, match="--seeds"):
        parse_seeds(text)
