"""The images that a site learns: those in its folder and the false alarms that were accepted, and their features."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from feddymem.backbone import FeatureExtractor
from feddymem.datasets import list_images
from feddymem.feature_cache import CachedPatches, FeatureCache
from feddymem.progress import Progress
from services.edge_client import metrics
from services.edge_client.arrivals import Arrivals
from services.edge_client.settings import EdgeClientSettings
from services.runtime.files import quarantine
from services.runtime.logs import get_logger

_log = get_logger()


class SiteImages:
    """Looks at the images as often as it is asked to, and extracts what is new among them.

    Args:
        settings: of the edge client.
        extractor: the feature space's backbone.
        folder: for the features.
        progress: is told how far an extraction is.
        accepted: the false alarms that an operator has accepted, see `FeedbackStore.accepted`.
        arrivals: numbers the images.
    """

    def __init__(
        self,
        settings: EdgeClientSettings,
        extractor: FeatureExtractor,
        folder: Path,
        progress: Progress,
        accepted: Callable[[], Sequence[Path]],
        arrivals: Arrivals,
    ) -> None:
        self.extractor, self.feature_space = extractor, extractor.feature_space
        self._data, self._progress, self._accepted = settings.data, progress, accepted
        self._arrivals = arrivals
        self._cache = FeatureCache(
            folder, extractor, None, settings.batch_size, settings.max_pixels, discard=quarantine
        )
        self._skipped: frozenset[str] = frozenset()
        self._images = 0

    def look(self) -> CachedPatches:
        """Patch features of the images that are in the folder now, in the order of their paths, then of those that were
        accepted, which are never held out: they were chosen by their score. Of no others are any kept.

        Raises:
            DatasetError: no folder, no image in it, or none that can be read.
            OSError: the state folder cannot be written; what was extracted until then stays.
        """
        started = time.perf_counter()
        accepted = self._accepted()
        found = self._cache.extract([*list_images(self._data), *accepted], self._progress)
        seconds = time.perf_counter() - started
        self._cache.keep_only(found.patches.paths)
        for reason in set(found.skipped) - self._skipped:
            _log.warning("image_skipped", reason=reason)
        if found.extracted or found.patches.images != self._images:
            _log.info(
                "features_extracted",
                images=found.patches.images,
                extracted=found.extracted,
                skipped=len(found.skipped),
                seconds=round(seconds, 3),
                fingerprint=self.feature_space.fingerprint,
            )
        self._skipped, self._images = frozenset(found.skipped), found.patches.images
        metrics.EXTRACTED.inc(found.extracted)
        if found.extracted:
            metrics.FEATURES.inc(found.extracted * self.feature_space.patches)
            metrics.FEATURE_SECONDS.inc(seconds)
        metrics.IMAGES.labels("read").set(found.patches.images)
        metrics.IMAGES.labels("skipped").set(len(found.skipped))
        return self._numbered(found.patches, accepted)

    def _numbered(self, patches: CachedPatches, accepted: Sequence[Path]) -> CachedPatches:
        names = patches.names
        never_held_out = {names.get(path) for path in accepted}
        numbers = self._arrivals.number(name for name in names.values() if name not in never_held_out)
        return CachedPatches(self._cache, patches.paths, numbers)
