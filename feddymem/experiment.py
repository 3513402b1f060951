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

from feddymem.comparison import CONTENDERS, Detector
from feddymem.datasets import SiteData, TestImage
from feddymem.evaluation import Detection, detect
from feddymem.feature_cache import CachedPatches, FeatureCache
from feddymem.feature_space import FeatureSpace
from feddymem.maps import anomaly_map
from feddymem.memory_reduce import Progress, no_progress
from feddymem.method import Method
from feddymem.scoring import Inspection, Scorer

METRICS = (
    "image_auroc",
    "image_ap",
    "image_f1_max",
    "pixel_auroc",
    "aupro",
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
        sites: each site's figures, by name. Bytes are those of the site's largest round. The sites of a run share one
            process, so seconds and peak memory are the run's: wall time of training and scoring from features at hand,
            and the most that the process held meanwhile, libraries included.
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


def seeds_run(name: str, seeds: Sequence[int], train_images: int | None = None) -> Sequence[int]:
    """The seeds that a method runs with: only the first where it does not depend on it.

    Args:
        name: one of CONTENDERS.
        seeds: of the experiment.
        train_images: see `drawn`; where images are drawn, every method depends on the seed.
    """
    return seeds if CONTENDERS[name].seeded or train_images is not None else seeds[:1]


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
    sources = {site.name: CachedPatches(cache, site.train) for site in sites}
    detectors = CONTENDERS[name].detectors(sources, method, progress, str(cache.extractor.device))
    detections = {site.name: score(site.test, detectors[site.name], cache, progress) for site in sites}
    cost = {"seconds": time.perf_counter() - started, "peak_memory_bytes": float(peak_memory())}
    sent = {site: {"bytes_per_site_round": float(max(d.bytes_sent, default=0))} for site, d in detectors.items()}
    return Run({site: {**asdict(figures), **sent[site], **cost} for site, figures in detections.items()})


def score(
    images: Sequence[TestImage], detector: Detector, cache: FeatureCache, progress: Progress = no_progress
) -> Detection:
    """Detection figures of one site's test images, scored batch by batch.

    Only patch distances and, for the pixel figures, the maps of input_size squared are held, not the features.
    """
    scorer = Scorer(cache.extractor, detector.memory, detector.generator)
    inspections: list[Inspection] = []
    patches = CachedPatches(cache, [image.path for image in images])
    for batch in patches.batches(_BATCH_IMAGES):
        inspections += scorer.inspect_features(batch.to(cache.extractor.device))
        progress("scores", len(inspections), len(images))
    side = cache.extractor.feature_space.input_size
    return detect(
        np.array([image.defect for image in images], bool),
        np.array([inspection.score for inspection in inspections]),
        [_mask(image, side) for image in images],
        [anomaly_map(inspection.distances, (side, side)) for inspection in inspections],
    )


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
