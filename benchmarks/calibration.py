"""Calibrated verdicts on real images: how often they are wrong on normal ones, and what they find.

- verdicts: at a false-alarm rate of 5 %, on the test images, means over sites and seeds; a seed varies which images are
  held out.
- resampled: held-out and good test images of each site put together and split anew at random, so that both are of one
  distribution: the mean rate over many splits, and the rates between which 95 % of the splits lie.
- relit: the good test images in other lights: whether the rate breaks, and whether drift is reported.
- relearned: at one site, the next one for each seed, the light changes, to each of the others. It has learned from the
  first half of its normal images; then the next 30 (or as many as there are) come in the new light, and one more round
  is run. No image is learned from in one light and tested in the other: tests are on the test images only, in both
  lights. mvtec_screw's good test images are darker than its training images: "brighter" blows out 6 to 9 % of
  their pixels and 57 to 67 % of the training images', so that what is learned there is not the light of the test.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks import write_result
from feddymem.backbone import load_extractor
from feddymem.calibration import FALSE_ALARM_RATE, Calibration, Limit, SiteCalibration
from feddymem.dataset_files import load_sites
from feddymem.datasets import SiteData, TestImage
from feddymem.drift import DriftTest
from feddymem.evaluation import auroc
from feddymem.feature_cache import CachedPatches, FeatureCache
from feddymem.federation import MEMORY_TYPE, federate, next_memory
from feddymem.folders import cache_folder
from feddymem.hold_out import scores_and_peaks
from feddymem.images import decode_file
from feddymem.item_types import as_received
from feddymem.local_update import local_update
from feddymem.memory import MemoryBank
from feddymem.method import Method
from feddymem.scoring import Scorer
from feddymem.sketch import ScoreSketch
from services.runtime.hardware import configure_hardware

SEEDS = 5
NEW_IMAGES = 30
DRIFT_IMAGES = 50
"""Images within which drift is to be reported."""
SPLITS = 400
"""Random splits of each seed's images."""

Scores = NDArray[np.float64]
"""(n, 2): each image's score, and the peak of its map."""


@dataclass(frozen=True)
class Light:
    """Another light than that of the images as they are.

    Attributes:
        gain: what pixels are multiplied by, in the middle.
        offset: what is added, in grey levels of 255.
        fall_off: share of the light that is missing at the left and the right edge; in between it falls evenly.
    """

    gain: float = 1.0
    offset: float = 0.0
    fall_off: float = 0.0

    def on(self, pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Pixels (height, width, 3), 0 to 255, in this light."""
        left_to_right = 1 - self.fall_off * np.abs(np.linspace(-1, 1, pixels.shape[1], dtype=np.float32))
        lit = pixels * (self.gain * left_to_right[None, :, None]) + self.offset
        return np.clip(lit, 0, 255).round().astype(np.uint8)


LIGHTS = {"darker": Light(0.8, 15), "brighter": Light(1.25, 15), "uneven": Light(fall_off=0.4)}
"""What the light of a line changes to."""


@dataclass(frozen=True)
class Relit:
    """Images in other lights.

    Attributes:
        files: the file in a light, by the light and by the file that it was made of.
    """

    files: Mapping[str, Mapping[Path, Path]]

    @staticmethod
    def of(sites: Sequence[SiteData], folder: Path) -> Relit:
        """Writes all images of sites, for training and for tests, in all lights."""
        paths = [path for site in sites for path in (*site.train, *(image.path for image in site.test))]
        return Relit({light: {path: _relit(path, light, folder / light) for path in paths} for light in LIGHTS})

    def of_test(self, light: str, test: Sequence[TestImage], defect: bool) -> list[Path]:
        """Those of test images that have a defect, or those that have none."""
        return [self.files[light][image.path] for image in test if image.defect == defect]


def _relit(path: Path, light: str, folder: Path) -> Path:
    pixels = LIGHTS[light].on(decode_file(path).astype(np.float32))
    # In the form that it was, because large JPEGs are decoded at a reduced scale.
    written = folder.joinpath(*path.parts[-4:])  # site, train or test, kind of defect, file
    assert not written.exists(), f"{written} is of two images"
    written.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(written), pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])
    return written


@dataclass(frozen=True)
class Pools:
    """Scores of one site's images of each sort; of its good test images in each light, too."""

    held_out: Scores
    good: Scores
    defect: Scores
    relit: Mapping[str, Scores]


@dataclass(frozen=True)
class Relearned:
    """One site whose light changed, before and after the round: false-alarm rates of its good test images in the new
    light, and in the old; the share of defects detected in the new light, and in the old; image AUROC in the old."""

    before: float
    after: float
    old_light_before: float
    old_light_after: float
    detected_before: float
    detected_after: float
    old_light_detected_before: float
    old_light_detected_after: float
    auroc_before: float
    auroc_after: float


class Federations:
    """Federations of a data set's sites."""

    def __init__(self, sites: Sequence[SiteData], relit: Relit, cache: FeatureCache) -> None:
        self.sites, self._relit, self._cache = sites, relit, cache

    def pools(self, seed: int) -> dict[str, Pools]:
        """Scores of all sites with the memory of one federation."""
        method = Method(seed=seed)
        memory = federate({site.name: self._split(site.train, method)[0] for site in self.sites}, method).memory
        result = {}
        for site in self.sites:
            test = {image.path: image.defect for image in site.test}
            result[site.name] = Pools(
                self._held_out(site.train, memory, method),
                self._scores(memory, [path for path, defect in test.items() if not defect]),
                self._scores(memory, [path for path, defect in test.items() if defect]),
                {light: self._scores(memory, self._relit.of_test(light, site.test, defect=False)) for light in LIGHTS},
            )
        return result

    def relearned(self, seed: int) -> dict[str, Relearned]:
        """The light of one site changes, and one more round is run; by the light that it changes to."""
        method = Method(seed=seed)
        changed = self.sites[seed % len(self.sites)]
        half = -(-len(changed.train) // 2)
        known, coming = changed.train[:half], changed.train[half:][:NEW_IMAGES]
        train: dict[str, Sequence[Path]] = {site.name: site.train for site in self.sites}
        train[changed.name] = known
        memory = federate({name: self._split(paths, method)[0] for name, paths in train.items()}, method).memory
        result = {}
        for light in LIGHTS:
            new = {**train, changed.name: [*known, *(self._relit.files[light][path] for path in coming)]}
            before = self._of_site(changed, light, memory, train, method)
            after = self._of_site(changed, light, self._one_more_round(memory, new, method), new, method)
            result[light] = Relearned(*itertools.chain(*zip(before, after, strict=True)))
        return result

    def _of_site(
        self, site: SiteData, light: str, memory: MemoryBank, train: Mapping[str, Sequence[Path]], method: Method
    ) -> tuple[float, ...]:
        """False-alarm rates in the new light and the old; shares of defects detected; image AUROC in the old light."""
        held_out = {name: self._held_out(paths, memory, method) for name, paths in train.items()}
        labels = np.array([image.defect for image in site.test], bool)
        scores = self._scores(memory, [image.path for image in site.test])
        good, bad = (self._scores(memory, self._relit.of_test(light, site.test, each)) for each in (False, True))
        anomalous = Verdicts(held_out)
        return (
            anomalous.share(site.name, good),
            anomalous.share(site.name, scores[~labels]),
            anomalous.share(site.name, bad),
            anomalous.share(site.name, scores[labels]),
            auroc(labels, scores[:, 0]),
        )

    def _one_more_round(self, memory: MemoryBank, train: Mapping[str, Sequence[Path]], method: Method) -> MemoryBank:
        number = method.rounds + 1
        banks = {
            name: as_received(
                local_update(self._split(paths, method)[0], memory, None, method, number).bank, method.item_type
            )
            for name, paths in sorted(train.items())
        }
        return as_received(next_memory(memory, banks, sorted(train), method).memory, MEMORY_TYPE)

    def _split(self, paths: Sequence[Path], method: Method) -> tuple[CachedPatches, CachedPatches | None]:
        return CachedPatches(self._cache, paths).split(method.hold_out_share, method.seed)

    def _held_out(self, paths: Sequence[Path], memory: MemoryBank, method: Method) -> Scores:
        _, held_out = self._split(paths, method)
        return self._scores(memory, () if held_out is None else held_out.paths)

    def _scores(self, memory: MemoryBank, paths: Sequence[Path]) -> Scores:
        scorer = Scorer(self._cache.extractor, memory, None)
        return np.array(scores_and_peaks(scorer, CachedPatches(self._cache, paths)), np.float64).reshape(-1, 2)


class Verdicts:
    """Verdicts at FALSE_ALARM_RATE by what the sites hold out."""

    def __init__(self, held_out: Mapping[str, Scores]) -> None:
        sites = {name: SiteCalibration(*map(ScoreSketch.of, scores.T)) for name, scores in held_out.items()}
        self.calibration = Calibration.of(sites, FALSE_ALARM_RATE)

    def limit(self, site: str) -> Limit:
        """The limit of its scores."""
        limit = self.calibration.scores.limit(site, FALSE_ALARM_RATE)
        assert limit is not None, "sites hold images out"
        return limit

    def share(self, site: str, scores: Scores) -> float:
        """Share of images whose score is anomalous."""
        return float((scores[:, 0] >= self.limit(site).threshold).mean())

    def share_with_regions(self, site: str, scores: Scores) -> float:
        """Share of images of which a pixel is anomalous."""
        limit = self.calibration.peaks.limit(site, FALSE_ALARM_RATE)
        assert limit is not None, "sites hold images out"
        return float((scores[:, 1] >= limit.threshold).mean())


def verdicts(runs: Sequence[Mapping[str, Pools]]) -> dict[str, object]:
    """Shares over sites and seeds, and false-alarm rates of each site."""
    rows: dict[str, list[list[float]]] = {}
    for pools in runs:
        found = Verdicts({name: pool.held_out for name, pool in pools.items()})
        for name, pool in pools.items():
            rows.setdefault(name, []).append(
                [
                    found.share(name, pool.good),
                    found.share(name, pool.defect),
                    found.limit(name).rate,
                    found.share_with_regions(name, pool.good),
                    found.share_with_regions(name, pool.defect),
                    *(found.share(name, pool.relit[light]) for light in LIGHTS),
                ]
            )
    values = np.array(list(rows.values()))  # (sites, seeds, figures)
    names = ("false_alarm_rate", "detected", "guaranteed_rate", "good_with_region", "defect_with_region", *LIGHTS)
    return {
        **dict(zip(names, values.mean((0, 1)).round(4).tolist(), strict=True)),
        "false_alarm_rate_by_seed": values[..., 0].mean(0).round(4).tolist(),
        "false_alarm_rate_by_site": dict(zip(rows, values[..., 0].mean(1).round(4).tolist(), strict=True)),
        "detected_by_site": dict(zip(rows, values[..., 1].mean(1).round(4).tolist(), strict=True)),
    }


def resampled(runs: Sequence[Mapping[str, Pools]]) -> dict[str, float]:
    """False-alarm rates, mean over sites, of random splits of held-out and good test images."""
    rng = np.random.default_rng(0)
    rates = []
    for pools in runs:
        for _ in range(SPLITS):
            mixed = {name: rng.permutation(np.concatenate([p.held_out, p.good])) for name, p in pools.items()}
            found = Verdicts({name: mixed[name][: len(pool.held_out)] for name, pool in pools.items()})
            rates.append(np.mean([found.share(name, mixed[name][len(p.held_out) :]) for name, p in pools.items()]))
    low, high = np.percentile(rates, (2.5, 97.5))
    figures = {"mean": float(np.mean(rates)), "low": low, "high": high}
    return {what: round(float(value), 4) for what, value in figures.items()}


def drift(runs: Sequence[Mapping[str, Pools]]) -> dict[str, object]:
    """Whether drift is reported while a site inspects its good test images, in the new light and in the old."""
    rng = np.random.default_rng(0)
    images: dict[str, list[int | None]] = {what: [] for what in ("old light", *LIGHTS)}
    for pools in runs:
        found = Verdicts({name: pool.held_out for name, pool in pools.items()})
        for name, pool in pools.items():
            for what, scores in {"old light": pool.good, **pool.relit}.items():
                images[what].append(_until_drift(found.limit(name), rng.permutation(scores[:, 0])))
    return {
        what: {
            "reported": round(sum(count is not None for count in counts) / len(counts), 4),
            "most_images": max((count for count in counts if count is not None), default=None),
        }
        for what, counts in images.items()
    }


def _until_drift(limit: Limit, scores: NDArray[np.float64]) -> int | None:
    """Images until drift is reported, of DRIFT_IMAGES at most; None where it is not. Scores come again when they are
    through."""
    test = DriftTest(limit)
    for number, score in enumerate(itertools.islice(itertools.cycle(scores.tolist()), DRIFT_IMAGES), 1):
        test.add(score)
        if test.found:
            return number
    return None


def relearned(outcomes: Sequence[Relearned]) -> dict[str, object]:
    """Means over seeds, each with another site, and of each seed."""
    figures = {what: np.array([getattr(each, what) for each in outcomes]) for what in Relearned.__dataclass_fields__}
    figures["auroc_drop"] = figures.pop("auroc_before") - figures.pop("auroc_after")
    return {
        **{what: round(float(values.mean()), 4) for what, values in figures.items()},
        **{f"{what}_by_seed": values.round(4).tolist() for what, values in figures.items()},
    }


def main(data: list[Path]) -> None:
    """Measures on data sets of site folders, and writes benchmarks/results/calibration.json."""
    configure_hardware(None)
    extractor = load_extractor()
    cache = FeatureCache(cache_folder(), extractor)
    result: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(prefix="feddymem-bench-") as folder:
        for path in data:
            sites = load_sites(path)
            federations = Federations(sites, Relit.of(sites, Path(folder) / path.name), cache)
            runs = [federations.pools(seed) for seed in range(SEEDS)]
            result[path.name] = {"verdicts": verdicts(runs), "resampled": resampled(runs), "drift": drift(runs)}
            write_result("calibration", result)
            outcomes = [federations.relearned(seed) for seed in range(SEEDS)]
            result[path.name]["relearned"] = {light: relearned([each[light] for each in outcomes]) for light in LIGHTS}
            write_result("calibration", result)


if __name__ == "__main__":
    typer.run(main)
