"""What scores with a global memory: a scorer for each site that has a memory generator for it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from feddymem.backbone import FeatureExtractor, load_extractor, resolve_device
from feddymem.feature_space import FingerprintMismatchError
from feddymem.generator import MemoryGenerator
from feddymem.memory import MemoryBank
from feddymem.scoring import Scorer
from feddymem.v1.release_pb2 import Release
from services.inference.release_store import Kept
from services.inference.settings import InferenceSettings
from services.runtime.errors import precondition
from services.runtime.logs import get_logger
from services.runtime.messages import feature_space_from_message

ANY_SITE = ""
"""The name that a scorer goes by whose global memory needs no memory generators."""

_log = get_logger()


class Scorers:
    """Builds scorers, with one backbone for all of a feature space.

    Raises:
        ValueError: the device of the settings is not there.
    """

    def __init__(self, settings: InferenceSettings) -> None:
        self._settings = settings
        self._device = resolve_device(settings.device)
        self._extractors: dict[str, FeatureExtractor] = {}

    async def build(self, memory: Kept, generators: Mapping[str, Sequence[Kept]]) -> dict[str, Scorer]:
        """What scores each site's images with a global memory; by `ANY_SITE` where it needs no generators.

        Args:
            memory: the global memory.
            generators: memory generators of each site, at least one; one of another feature space scores nothing.

        Raises:
            Refusal: FAILED_PRECONDITION where this service has no backbone for the global memory.
            FingerprintMismatchError: its backbone is another one.
        """
        # The thread ends with the work, and with it OpenMP's team for it, see `feddymem.threads`.
        pool = ThreadPoolExecutor(1, thread_name_prefix="build")
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, self._build, memory, generators)
        finally:
            pool.shutdown(wait=False)

    def _build(self, memory: Kept, generators: Mapping[str, Sequence[Kept]]) -> dict[str, Scorer]:
        assert isinstance(memory.content, MemoryBank)
        release = memory.release
        extractor = self._extractor(release)
        built = {}
        if not release.needs_generator:
            built[ANY_SITE] = self._warm(Scorer(extractor, memory.content, None))
        else:
            for site, kept in sorted(generators.items()):
                try:
                    network = _network(release, _choose(release, kept))
                except FingerprintMismatchError as error:  # the other sites go on
                    _log.error("generator_refused", federation=release.federation, site=site, reason=str(error))
                    continue
                built[site] = self._warm(Scorer(extractor, memory.content, network))
        if built:
            # What is loaded stays. With it, each full garbage collection goes through 400,000 objects and stops all
            # threads for 0.2 s, and comes so rarely that errors and the images in their frames pile up meanwhile.
            gc.collect()
            gc.freeze()
        return built

    def _warm(self, scorer: Scorer) -> Scorer:
        """Has it score once: the first requests must not pay for it."""
        size = scorer.extractor.feature_space.input_size
        for images in {1, self._settings.batch}:
            scorer.inspect(torch.zeros(images, 3, size, size))
        return scorer

    def _extractor(self, memory: Release) -> FeatureExtractor:
        space = feature_space_from_message(memory.feature_space)
        if space.fingerprint not in self._extractors:
            try:
                extractor = load_extractor(
                    space.backbone,
                    self._settings.checkpoint,
                    space.input_size,
                    space.tile_size,
                    space.tile_overlap,
                    self._device,
                    self._settings.runtime,
                    self._settings.precision,
                )
            except (ValueError, FileNotFoundError) as error:
                raise precondition(
                    f"the release of federation {memory.federation!r} needs a backbone: {error}"
                ) from error
            extractor.feature_space.require_same(
                space, "this service's backbone", f"the release of federation {memory.federation!r}"
            )
            self._extractors[space.fingerprint] = extractor
        return self._extractors[space.fingerprint]


def _choose(memory: Release, generators: Sequence[Kept]) -> Kept:
    """Of a site's memory generators the newest that is not newer than a global memory or, where all are, the oldest."""
    oldest, *later = sorted(generators, key=_version)
    if oldest.release.version > memory.version:  # near enough, and better than a line without scores
        _log.warning(
            "generator_newer_than_memory",
            federation=memory.federation,
            site=oldest.release.site,
            release=memory.version,
            generator=oldest.release.version,
        )
    return max((each for each in later if each.release.version <= memory.version), key=_version, default=oldest)


def _version(kept: Kept) -> int:
    return kept.release.version


def _network(memory: Release, generator: Kept) -> MemoryGenerator:
    """The memory generator for a global memory.

    Raises:
        FingerprintMismatchError: it is of another feature space.
    """
    assert isinstance(generator.content, MemoryGenerator)
    feature_space_from_message(memory.feature_space).require_same(
        feature_space_from_message(generator.release.feature_space),
        f"the release of federation {memory.federation!r}",
        f"the memory generator of site {generator.release.site!r}",
    )
    return generator.content
