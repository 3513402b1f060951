"""Which release and which memory generator score an image: kept on disk, swapped while requests run."""

from __future__ import annotations

import asyncio
import gc
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import grpc
import torch

from feddymem.backbone import FeatureExtractor, load_extractor, resolve_device
from feddymem.feature_space import FingerprintMismatchError
from feddymem.generator import MemoryGenerator
from feddymem.scoring import Scorer
from feddymem.v1.release_pb2 import RELEASE_KIND_GLOBAL_MEMORY, RELEASE_KIND_MEMORY_GENERATOR, Release
from services.inference import metrics
from services.inference.settings import InferenceSettings
from services.runtime.array_store import ArrayStore, write_atomically
from services.runtime.arrays import bank_from_wire
from services.runtime.changes import Changes
from services.runtime.errors import Refusal, as_refusal, invalid, not_found, precondition
from services.runtime.logs import get_logger
from services.runtime.messages import feature_space_from_message, generator_from_wire

_log = get_logger()
_ANY_SITE = ""
_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class Active:
    """What scores the images of one site now.

    Attributes:
        federation: name of the federation.
        site: name of the site; empty where the release needs no memory generator.
        release: version of the release.
        scorer: global memory and memory generator, ready to compute.
    """

    federation: str
    site: str
    release: int
    scorer: Scorer


class Registry:
    """Takes releases as they come and pairs each global memory with each site's memory generator.

    The pair is the newest global memory with the site's newest memory generator that is not newer. A swap replaces one
    reference: requests that have begun finish with what they began with.
    """

    def __init__(self, settings: InferenceSettings) -> None:
        self._settings = settings
        self._folder = settings.state_dir / "releases"
        self._folder.mkdir(parents=True, exist_ok=True)
        self.arrays = ArrayStore(settings.state_dir / "arrays")
        self._memories: dict[str, Release] = {}
        self._generators: dict[tuple[str, str], list[Release]] = {}
        self._active: dict[tuple[str, str], Active] = {}
        self._device = resolve_device(settings.device)
        self._extractors: dict[str, FeatureExtractor] = {}
        self._swap = asyncio.Lock()
        self.changes = Changes()

    async def load(self) -> None:
        """Takes what an earlier run left on disk, and removes what is of no use any more.

        A release that is damaged is discarded; it is fetched again when its publisher is there. One that this
        service has no backbone for is kept: the release is good, and the next start may have the right checkpoint.
        """
        replaced = []
        for path in sorted(self._folder.glob("*.binpb")):
            replaced += self._note(Release.FromString(path.read_bytes()))
        self._forget(replaced)
        for federation in sorted(self._memories):
            try:
                await self._activate(federation)
            except Exception as error:
                refusal = as_refusal(error)
                if refusal is None:
                    raise
                _log.error("release_on_disk_refused", federation=federation, reason=refusal.text)
                if refusal.status is not grpc.StatusCode.FAILED_PRECONDITION:
                    self._drop(federation)

    async def receive(self, release: Release) -> None:
        """Takes a release whose arrays are in the store, and activates it.

        It is written only then: on disk is what this service can score with, and a publisher sends it again.

        Raises:
            Refusal: the release does not fit this service; what is active stays, on disk too.
        """
        if release.kind not in (RELEASE_KIND_GLOBAL_MEMORY, RELEASE_KIND_MEMORY_GENERATOR):
            raise invalid(
                f"release of {release.federation!r} has kind {release.kind}, which this version does not know"
            )
        if self._settings.federations and release.federation not in self._settings.federations:
            return
        async with self._swap:
            before = dict(self._memories), dict(self._generators)
            replaced = self._note(release)
            try:
                await self._activate(release.federation)
            except BaseException:
                self._memories, self._generators = before
                raise
            await asyncio.to_thread(
                write_atomically, self._path(release), release.SerializeToString(deterministic=True)
            )
            await asyncio.to_thread(self._forget, replaced)

    def find(self, federation: str, site: str) -> Active:
        """What scores images of a site; both names may be empty where there is only one.

        Raises:
            Refusal: NOT_FOUND for an unknown federation or site, INVALID_ARGUMENT for an empty name of several,
                UNAVAILABLE where nothing can score yet.
        """
        federations = sorted({*self._memories, *self._settings.federations})
        if federation and federation not in federations:
            raise not_found(f"this service has no federation {federation!r}; check its name")
        federation = federation or self._only(federations, "federation")
        memory = self._memories.get(federation)
        if memory is None:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, f"federation {federation!r} has no release yet; try again later")
        sites = sorted(name for fed, name in self._generators if fed == federation)
        if memory.needs_generator:
            if site and site not in sites:
                raise not_found(f"this service has no site {site!r} in federation {federation!r}; check its name")
            site = site or self._only(sites, "site")
        active = self._active.get((federation, site if memory.needs_generator else _ANY_SITE))
        if active is None:
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE,
                f"federation {federation!r} has no release ready for site {site!r} yet; try again later",
            )
        return active

    @property
    def ready(self) -> bool:
        """Whether every federation of the settings can score (or any, where none is named) for at least one site."""
        scoring = {federation for federation, _site in self._active}
        return bool(scoring) and scoring >= set(self._settings.federations)

    def active(self) -> list[Active]:
        """All that can score now."""
        return list(self._active.values())

    def _only(self, names: list[str], what: str) -> str:
        if not names:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, f"no {what} is known here yet; try again later")
        if len(names) > 1:
            raise invalid(f"this service has {len(names)} {what}s; name the {what}")
        return names[0]

    def _note(self, release: Release) -> list[Release]:
        """Remembers a release; the ones that it takes the place of.

        Of a site's generators the newest two are kept: one may wait for its global memory while the other one scores.
        """
        if release.kind == RELEASE_KIND_GLOBAL_MEMORY:
            before = self._memories.get(release.federation)
            self._memories[release.federation] = release
            return [] if before is None else [before]
        key = (release.federation, release.site)
        others = [g for g in self._generators.get(key, []) if g.version != release.version]
        same = [g for g in self._generators.get(key, []) if g.version == release.version]
        kept = sorted([*others, release], key=lambda g: g.version)
        self._generators[key] = kept[-2:]
        return [*same, *kept[:-2]]

    async def _activate(self, federation: str) -> None:
        memory = self._memories.get(federation)
        if memory is None:
            return
        built = await _in_own_thread(partial(self._build, memory))
        for active in built:
            before = self._active.get((federation, active.site))
            self._active[federation, active.site] = active
            if before is None or before.release != active.release:
                metrics.SWAPS.labels(federation).inc()
                metrics.RELEASE.labels(federation).set(active.release)
                _log.info("release_active", federation=federation, site=active.site, release=active.release)
        self.changes.notify()

    def _build(self, memory: Release) -> list[Active]:
        extractor = self._extractor(memory)
        bank = bank_from_wire((a, self.arrays.read(a.sha256)) for a in memory.arrays)
        size = extractor.feature_space.input_size
        built = []
        for site, generator in self._pairs(memory):
            try:
                network = None if generator is None else self._network(memory, generator)
            except (FingerprintMismatchError, Refusal) as error:  # the other sites go on
                _log.error("generator_refused", federation=memory.federation, site=site, reason=str(error))
                continue
            scorer = Scorer(extractor, bank, network)
            for images in {1, self._settings.batch}:  # warm: the first requests must not pay for it
                scorer.inspect(torch.zeros(images, 3, size, size))
            built.append(Active(memory.federation, site, memory.version, scorer))
        # What is loaded stays. With it, each full garbage collection goes through 400,000 objects and stops all threads
        # for 0.2 s, and comes so rarely that errors and the images in their frames pile up meanwhile.
        gc.collect()
        gc.freeze()
        return built

    def _network(self, memory: Release, generator: Release) -> MemoryGenerator:
        space = feature_space_from_message(generator.feature_space)
        feature_space_from_message(memory.feature_space).require_same(
            space,
            f"the release of federation {memory.federation!r}",
            f"the memory generator of site {generator.site!r}",
        )
        return generator_from_wire(space, ((a, self.arrays.read(a.sha256)) for a in generator.arrays))

    def _pairs(self, memory: Release) -> Iterator[tuple[str, Release | None]]:
        if not memory.needs_generator:
            yield _ANY_SITE, None
            return
        for (federation, site), generators in sorted(self._generators.items()):
            fitting = [g for g in generators if g.version <= memory.version]
            if federation == memory.federation and fitting:
                yield site, max(fitting, key=lambda g: g.version)

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

    def _drop(self, federation: str) -> None:
        """Discards all that is known of a federation."""
        dropped = [self._memories.pop(federation)]
        for key in [key for key in self._generators if key[0] == federation]:
            dropped += self._generators.pop(key)
        self._forget(dropped)

    def _forget(self, replaced: list[Release]) -> None:
        """Removes from disk what only replaced releases used."""
        kept = [*self._memories.values(), *(g for generators in self._generators.values() for g in generators)]
        paths = {self._path(release) for release in kept}
        used = {array.sha256 for release in kept for array in release.arrays}
        for release in replaced:
            if self._path(release) not in paths:
                self._path(release).unlink(missing_ok=True)
            for array in release.arrays:
                if array.sha256 not in used:
                    self.arrays.discard(array.sha256)

    def _path(self, release: Release) -> Path:
        # Hashed, because names come from other processes and must not become paths.
        name = hashlib.sha256(f"{release.federation}\0{release.site}".encode()).hexdigest()[:32]
        return self._folder / f"{name}-{release.kind}-{release.version:010}.binpb"


async def _in_own_thread(work: Callable[[], _Result]) -> _Result:
    """Computes in a thread that ends then, and with it OpenMP's team for it, see `feddymem.threads`."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="build")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, work)
    finally:
        pool.shutdown(wait=False)
