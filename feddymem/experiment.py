"""An experiment: methods compared on the same sites over several seeds, and the figures of each."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from feddymem.calibration import FALSE_ALARM_RATE, Calibration, Limit, SiteCalibration
from feddymem.comparison import CONTENDERS, Detector
from feddymem.datasets import SiteData, TestImage
from feddymem.evaluation import alarms, detect
from feddymem.feature_cache import CachedPatches, FeatureCache
from feddymem.feature_space import FeatureSpace
from feddymem.hold_out import calibrate
from feddymem.maps import anomaly_map
from feddymem.method import Method
from feddymem.progress import Progress, no_progress
from feddymem.scoring import Inspection, Scorer
from feddymem.verdicts import judge

METRICS = (
    "image_auroc",
    "image_ap",
    "image_f1_max",
    "pixel_auroc",
    "aupro",
    "false_alarm_rate",
    "detection_rate",
    "guaranteed_rate",
    "held_out_images",
    "bytes_per_site_round",
    "seconds",
    "peak_memory_bytes",
)
"""Names of the figures of a run."""

_BATCH_IMAGES = 8

Figures = dict[str, float]
"""A value for each of METRICS; NaN where there is none."""


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    Attributes:
        sites: each site's figures, by name. False-alarm and detection rate are those of the verdicts at
            FALSE_ALARM_RATE; the guaranteed rate is above it where too few images are held out. Bytes are those of the
            site's largest round. The sites of a run share one process, so seconds and peak memory are the run's: wall
            time of training and scoring from features at hand, and the most that the process held meanwhile, libraries
            included.
    """

    sites: dict[str, Figures]

    @property
    def mean(self) -> Figures:
        """Mean over those sites that have a figure."""
        return _over(np.mean, list(self.sites.values()))


@dataclass(frozen=True)
class Result:
    """One method over all seeds.

    Attributes:
        runs: a run for each seed; only one where the seed makes no difference.
    """

    runs: tuple[Run, ...]

    @property
    def sites(self) -> dict[str, Figures]:
        """Each site's figures, mean over the seeds."""
        return {name: _over(np.mean, [run.sites[name] for run in self.runs]) for name in self.runs[0].sites}

    @property
    def mean(self) -> Figures:
        """Mean over sites and seeds."""
        return _over(np.mean, [run.mean for run in self.runs])

    @property
    def std(self) -> Figures:
        """Standard deviation over the seeds of the mean over the sites (of all seeds, not of a sample)."""
        return _over(np.std, [run.mean for run in self.runs])


@dataclass(frozen=True)
class Experiment:
    """Methods compared on one data set.

    Attributes:
        data: the data set, as it was named.
        feature_space: of the patch features.
        method: the default that methods start from; each run has a seed of its own.
        seeds: seeds of the method, and of the choice of images.
        train_images: normal images of each site that were used; None for all.
        results: by the method's name; of those that are done.
    """

    data: str
    feature_space: FeatureSpace
    method: Method
    seeds: tuple[int, ...]
    train_images: int | None
    results: dict[str, Result]


def seeds_run(name: str, seeds: Sequence[int], hold_out_share: float, train_images: int | None) -> Sequence[int]:
    """The seeds that a method runs with: only the first where it does not depend on it.

    Args:
        name: one of CONTENDERS.
        seeds: of the experiment.
        hold_out_share: of the method; where images are held out, every method depends on the seed, which chooses them.
        train_images: see `drawn`; where images are drawn, likewise.
    """
    varied = CONTENDERS[name].seeded or hold_out_share > 0 or train_images is not None
    return seeds if varied else seeds[:1]


def drawn(sites: Sequence[SiteData], count: int | None, seed: int) -> tuple[SiteData, ...]:
    """The sites as if they had fewer normal images: `count` of each site's, drawn at random; None for all."""
    if count is None:
        return tuple(sites)
    rng = np.random.default_rng(seed)
    chosen = [np.sort(rng.permutation(len(site.train))[:count]) for site in sites]
    return tuple(
        dataclasses.replace(site, train=tuple(site.train[number] for number in numbers))
        for site, numbers in zip(sites, chosen, strict=True)
    )


def extract_all(sites: Sequence[SiteData], cache: FeatureCache, progress: Progress = no_progress) -> None:
    """Puts the features of all images into the cache.

    Raises:
        ImageError: a file cannot be read or decoded; the text names it.
    """
    paths = [path for site in sites for path in (*site.train, *(image.path for image in site.test))]
    patches, done = CachedPatches(cache, paths), 0
    for batch in patches.batches(_BATCH_IMAGES):
        done += len(batch)
        progress("features", done, len(paths))


def run(
    sites: Sequence[SiteData], name: str, method: Method, cache: FeatureCache, progress: Progress = no_progress
) -> Run:
    """One run: trains and scores all sites.

    Args:
        sites: the data set.
        name: one of CONTENDERS.
        method: of the federation; its seed is the run's.
        cache: gives patch features; after `extract_all`, seconds of runs are comparable.
        progress: told what is being done.
    """
    reset_peak_memory()
    started = time.perf_counter()
    device = str(cache.extractor.device)
    split = {site.name: CachedPatches(cache, site.train).split(method.hold_out_share, method.seed) for site in sites}
    contender = CONTENDERS[name]
    detectors = contender.detectors({site: bank for site, (bank, _) in split.items()}, method, progress, device)
    scored = {site.name: score(site.test, split[site.name][1], detectors[site.name], cache, progress) for site in sites}
    own = {site: each.calibration for site, each in scored.items()}
    figures = {}
    for site in sites:
        calibrations = own if contender.together else {site.name: own[site.name]}
        limit = Calibration.of(calibrations, FALSE_ALARM_RATE).scores.limit(site.name, FALSE_ALARM_RATE)
        figures[site.name] = {
            **_detection(site.test, scored[site.name].inspections, limit, cache.extractor.feature_space.input_size),
            "held_out_images": float(len(own[site.name].scores)),
            "bytes_per_site_round": float(max(detectors[site.name].bytes_sent, default=0)),
        }
    cost = {"seconds": time.perf_counter() - started, "peak_memory_bytes": float(peak_memory())}
    return Run({site: {**each, **cost} for site, each in figures.items()})


@dataclass(frozen=True, eq=False)
class Scored:
    """One site's images, scored by its detector.

    Attributes:
        calibration: of those held out.
        inspections: of the test images.
    """

    calibration: SiteCalibration
    inspections: list[Inspection]


def score(
    images: Sequence[TestImage],
    held_out: CachedPatches | None,
    detector: Detector,
    cache: FeatureCache,
    progress: Progress = no_progress,
) -> Scored:
    """Scores one site's test images and those it holds out, batch by batch: only patch distances are held."""
    scorer = Scorer(cache.extractor, detector.memory, detector.generator)
    inspections: list[Inspection] = []
    patches = CachedPatches(cache, [image.path for image in images])
    for batch in patches.batches(_BATCH_IMAGES):
        inspections += scorer.inspect_features(batch.to(cache.extractor.device))
        progress("scores", len(inspections), len(images))
    return Scored(calibrate(scorer, held_out, progress), inspections)


def _detection(
    images: Sequence[TestImage], inspections: Sequence[Inspection], limit: Limit | None, side: int
) -> Figures:
    """Figures of one site's test images; the maps of `side` squared pixels are held at once."""
    labels = np.array([image.defect for image in images], bool)
    scores = np.array([inspection.score for inspection in inspections])
    masks = [_mask(image, side) for image in images]
    maps = [anomaly_map(inspection.distances, (side, side)) for inspection in inspections]
    detection = asdict(detect(labels, scores, masks, maps))
    if limit is None:
        return {**detection, **dict.fromkeys(("false_alarm_rate", "detection_rate", "guaranteed_rate"), math.nan)}
    judgements = [judge(inspection.score, limit) for inspection in inspections]
    anomalous = np.array([judgement is not None and judgement.anomalous for judgement in judgements], bool)
    return {**detection, **asdict(alarms(labels, anomalous)), "guaranteed_rate": limit.rate}


def _mask(image: TestImage, side: int) -> NDArray[np.bool_] | None:
    return None if image.mask is None else image.read_mask((side, side))


def _over(statistic: Callable[[Sequence[float]], np.floating], figures: Sequence[Mapping[str, float]]) -> Figures:
    """A statistic of each figure over those that are known; NaN where none is."""
    known = {key: [f[key] for f in figures if not math.isnan(f[key])] for key in METRICS}
    return {key: float(statistic(values)) if values else math.nan for key, values in known.items()}


def reset_peak_memory() -> None:
    """Lets the kernel count the peak anew; elsewhere than on Linux the peak is that of the whole process so far.

    What earlier runs freed is given back first, so that it does not count for this one.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory() -> int:
    """Most memory that the process held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak if sys.platform == "darwin" else peak * 1024
