"""Which release and which memory generator score an image: swapped while requests run."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import grpc
import torch

from feddymem.backbone import FeatureExtractor, load_extractor, resolve_device
from feddymem.feature_space import FingerprintMismatchError
from feddymem.generator import MemoryGenerator
from feddymem.memory import MemoryBank
from feddymem.scoring import Scorer
from feddymem.v1.release_pb2 import RELEASE_KIND_GLOBAL_MEMORY, Release
from feddymem.verdicts import SiteLimits
from services.inference import metrics
from services.inference.lines import Line, Lines, Shadow
from services.inference.release_store import Kept, ReleaseStore
from services.inference.settings import InferenceSettings
from services.runtime.changes import Changes
from services.runtime.errors import Refusal, as_refusal, invalid, not_found, precondition
from services.runtime.logs import get_logger
from services.runtime.messages import feature_space_from_message

GENERATORS_KEPT = 11
"""Memory generators of each site, the last that came: for the releases that an aggregator keeps by default, any of
which may be activated again, and for the round that is open."""

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
        created: when it was made, in nanoseconds since the epoch; tells it from another one of this version, made by
            an aggregator that has lost its disk.
        scorer: global memory and memory generator, ready to compute.
        lines: who has images scored by it, and what its scores mean to them; one for all sites of the release.
    """

    federation: str
    site: str
    release: int
    created: int
    scorer: Scorer
    lines: Lines

    def limits(self, site: str, rate: float | None = None) -> SiteLimits | None:
        """What tells normal from anomalous; None where the release has no calibration, or no site has held images out.

        Args:
            site: that a request names; may be empty.
            rate: false-alarm rate wanted; None for the federation's.
        """
        return None if self.lines.limits is None else self.lines.limits.of(site or self.site, rate)

    def line(self, site: str) -> Line | None:
        """The line whose image a request is about; None where it is not watched."""
        return self.lines.of(site or self.site, known=bool(self.site))


class Registry:
    """Takes releases as they come and pairs each global memory with each site's memory generator.

    The pair is the last global memory that came with the site's newest memory generator that is not newer or, where
    all are, with the oldest. A global memory that no generator fits yet waits for one, while the one before scores. A
    swap replaces one reference: requests that have begun finish with what they began with.
    """

    def __init__(self, settings: InferenceSettings) -> None:
        self._settings = settings
        self._store = ReleaseStore(settings.state_dir)
        self.arrays = self._store.arrays
        self._memories: dict[str, Kept] = {}
        self._waiting: dict[str, Kept] = {}
        self._generators: dict[tuple[str, str], list[Kept]] = {}
        self._active: dict[tuple[str, str], Active] = {}
        self._shadows: dict[str, Kept] = {}
        self._device = resolve_device(settings.device)
        self._extractors: dict[str, FeatureExtractor] = {}
        self._swap = asyncio.Lock()
        self.changes = Changes()

    async def load(self) -> None:
        """Takes what an earlier run left on disk, each federation for itself.

        A release that this service has no backbone for is kept: it is good, and the next start may have the right
        checkpoint.
        """
        found = await asyncio.to_thread(self._store.load)
        # Also what a run that was killed had replaced, but not forgotten yet.
        await self._forget([replaced.release for kept in found for replaced in self._note(kept)])
        for federation in sorted(self._memories):
            try:
                await self._activate(federation)
            except Exception as error:
                refusal = as_refusal(error)
                if refusal is None:
                    raise
                _log.error("release_on_disk_refused", federation=federation, reason=refusal.text)

    async def receive(self, release: Release) -> None:
        """Takes a release whose arrays are in the store, and activates it.

        It is written only then: on disk is what this service can score with, and a publisher sends it again. One that
        is said again, as after each watch that breaks, costs nothing.

        Raises:
            Refusal, InvalidBankError: the release does not fit this service; what is active stays, on disk too.
        """
        if self._settings.federations and release.federation not in self._settings.federations:
            return
        async with self._swap:
            if release.shadow:
                await self._receive_shadow(release)
            elif release.kind == RELEASE_KIND_GLOBAL_MEMORY:
                await self._receive_memory(release)
            else:
                await self._receive_generator(release)

    async def _receive_memory(self, release: Release) -> None:
        known, waiting = self._memories.get(release.federation), self._waiting.get(release.federation)
        if waiting is not None and waiting.release == release:
            return
        if known is not None and known.release == release and self._scores(known) and await self._on_disk(release):
            if (left := self._waiting.pop(release.federation, None)) is not None:  # rolled back before it could score
                await self._forget([left.release])
            return
        await self._take(await asyncio.to_thread(self._store.open, release))

    async def _receive_generator(self, release: Release) -> None:
        known = self._generators.get((release.federation, release.site), [])
        if not (known and known[-1].release == release and await self._on_disk(release)):
            kept = await asyncio.to_thread(self._store.open, release)
            before = dict(self._generators)
            replaced = self._note_generator(kept)
            try:
                await self._activate(release.federation)
            except BaseException:
                self._generators = before
                raise
            await asyncio.to_thread(self._store.write, release)
            await self._forget([each.release for each in replaced])
        waiting = self._waiting.get(release.federation)
        if waiting is not None:
            await self._take(waiting)

    async def _take(self, memory: Kept) -> None:
        """Activates a global memory; where no memory generator fits it yet and another one scores, it waits for one.

        It is not on disk while it waits: after a restart, too, the other one is to score.
        """
        federation = memory.release.federation
        built = await _in_own_thread(partial(self._build, memory))
        left = self._waiting.pop(federation, None)
        if built or not any(each.federation == federation for each in self._active.values()):
            before = self._memories.get(federation)
            self._memories[federation] = memory
            await self._put_in_place(memory, built)
            await asyncio.to_thread(self._store.write, memory.release)
        else:
            before = None
            self._waiting[federation] = memory
            _log.warning("release_waits_for_generator", federation=federation, release=memory.release.version)
        await self._forget([each.release for each in (left, before) if each is not None])

    def _scores(self, memory: Kept) -> bool:
        release = memory.release
        named = release.federation, release.version, release.created.ToNanoseconds()
        return any((each.federation, each.release, each.created) == named for each in self._active.values())

    async def _on_disk(self, release: Release) -> bool:
        return await asyncio.to_thread(self._store.has, release)

    async def _receive_shadow(self, release: Release) -> None:
        """Takes a release that is to be counted beside the active one; its publisher sends it again after a restart, so
        that it is not kept on disk.

        Raises:
            Refusal, InvalidBankError: it does not fit this service; the shadow before it has ended all the same.
        """
        known = self._shadows.get(release.federation)
        if known is not None and known.release == release:
            await self._forget([release])
            return
        self._shadows.pop(release.federation, None)
        await self._cast_shadow(release.federation)
        try:
            if release.version:
                self._shadows[release.federation] = await asyncio.to_thread(self._store.open, release)
            await self._cast_shadow(release.federation)
        except BaseException:
            self._shadows.pop(release.federation, None)
            raise
        finally:
            await self._forget([release])

    async def _cast_shadow(self, federation: str) -> None:
        """Puts the federation's shadow beside what is active, if there are both."""
        kept = self._shadows.get(federation)
        of_lines = {id(each.lines): each.lines for each in self._active.values() if each.federation == federation}
        scorers = await _in_own_thread(partial(self._build, kept)) if kept is not None and of_lines else {}
        for lines in of_lines.values():
            if kept is None:
                lines.shadow = None
            elif lines.shadow is not None:  # the same one: another one has come only when this one had ended
                lines.shadow.scorers = scorers
            else:
                lines.shadow = Shadow(federation, kept.release.version, scorers, kept.limits)
                _log.info("release_in_shadow", federation=federation, release=kept.release.version)

    def find(self, federation: str, site: str) -> Active:
        """What scores images of a site; both names may be empty where there is only one.

        Raises:
            Refusal: NOT_FOUND for an unknown federation or site, INVALID_ARGUMENT for an empty name of several,
                UNAVAILABLE where nothing can score yet.
        """
        known = {*self._memories, *(federation for federation, _site in self._generators)}
        federations = sorted({*known, *self._settings.federations})
        if federation and federation not in federations:
            self._require_not_lost(federation, site)
            raise not_found(f"this service has no federation {federation!r}; check its name")
        federation = federation or self._only(federations, "federation")
        memory = self._memories.get(federation)
        if memory is None:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, f"federation {federation!r} has no release yet; try again later")
        sites = sorted(name for fed, name in self._generators if fed == federation)
        if memory.release.needs_generator:
            if site and site not in sites:
                self._require_not_lost(federation, site)
                raise not_found(f"this service has no site {site!r} in federation {federation!r}; check its name")
            site = site or self._only(sites, "site")
        active = self._active.get((federation, site if memory.release.needs_generator else _ANY_SITE))
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

    def _require_not_lost(self, federation: str, site: str) -> None:
        if self._store.lost(federation, site):
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE,
                f"a release of federation {federation!r} was damaged on the disk of this service, and is fetched again "
                "when its publisher is there; try again later",
            )

    def _only(self, names: list[str], what: str) -> str:
        if not names:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, f"no {what} is known here yet; try again later")
        if len(names) > 1:
            raise invalid(f"this service has {len(names)} {what}s; name the {what}")
        return names[0]

    def _note(self, kept: Kept) -> list[Kept]:
        """Remembers a release; the ones that it takes the place of."""
        if kept.release.kind != RELEASE_KIND_GLOBAL_MEMORY:
            return self._note_generator(kept)
        before = self._memories.get(kept.release.federation)
        self._memories[kept.release.federation] = kept
        return [] if before is None else [before]

    def _note_generator(self, kept: Kept) -> list[Kept]:
        release = kept.release
        known = self._generators.get((release.federation, release.site), [])
        same = [g for g in known if g.release.version == release.version]
        # As they came: where the aggregator has lost its disk, versions begin anew, and the newest is not the highest.
        came = [*(g for g in known if g.release.version != release.version), kept]
        self._generators[release.federation, release.site] = came[-GENERATORS_KEPT:]
        return [*same, *came[:-GENERATORS_KEPT]]

    async def _forget(self, replaced: list[Release]) -> None:
        memories = [*self._memories.values(), *self._waiting.values()]
        used = [*memories, *(g for generators in self._generators.values() for g in generators)]
        await asyncio.to_thread(self._store.forget, replaced, [u.release for u in used])

    async def _activate(self, federation: str) -> None:
        """Builds what scores anew, of the global memory and the memory generators that are here."""
        memory = self._memories.get(federation)
        if memory is not None:
            await self._put_in_place(memory, await _in_own_thread(partial(self._build, memory)))

    async def _put_in_place(self, memory: Kept, built: dict[str, Scorer]) -> None:
        """Has scored by what was built of a global memory; where that is nothing, all stays as it is."""
        if not built:
            return
        release, federation = memory.release, memory.release.federation
        lines = self._lines_of(memory)
        for site, scorer in built.items():
            before = self._active.get((federation, site))
            active = Active(federation, site, release.version, release.created.ToNanoseconds(), scorer, lines)
            self._active[federation, site] = active
            if before is None or before.lines is not lines:
                metrics.SWAPS.inc()
                metrics.RELEASE.labels(federation).set(active.release)
                metrics.RELEASE_CREATED.labels(federation).set(release.created.ToMilliseconds() / 1000)
                _log.info("release_active", federation=federation, site=active.site, release=active.release)
        for name, site in list(self._active):  # those of a release with memory generators, after one without, and back
            if name == federation and (site == _ANY_SITE) == release.needs_generator:
                del self._active[name, site]
        try:
            await self._cast_shadow(federation)
        except Exception as error:  # noqa: BLE001 - a shadow must not keep a release from the lines
            _log.error("shadow_refused", federation=federation, exc_info=error)
        self.changes.notify()

    def _lines_of(self, memory: Kept) -> Lines:
        """Those of a release: what they know is kept while it is the same, whatever memory generators come."""
        release = memory.release
        federation, created = release.federation, release.created.ToNanoseconds()
        found = {id(each.lines): each for each in self._active.values() if each.federation == federation}
        for each in found.values():
            if (each.release, each.created) == (release.version, created):
                return each.lines
        for each in found.values():
            each.lines.leave()
        return Lines(federation, memory.limits)

    def _build(self, memory: Kept) -> dict[str, Scorer]:
        """What scores each site's images with a global memory; by the empty name where it needs no generators."""
        assert isinstance(memory.content, MemoryBank)
        release = memory.release
        extractor = self._extractor(release)
        size = extractor.feature_space.input_size
        built = {}
        for site, generator in self._pairs(release):
            try:
                network = None if generator is None else _network(release, generator)
            except FingerprintMismatchError as error:  # the other sites go on
                _log.error("generator_refused", federation=release.federation, site=site, reason=str(error))
                continue
            scorer = Scorer(extractor, memory.content, network)
            for images in {1, self._settings.batch}:  # warm: the first requests must not pay for it
                scorer.inspect(torch.zeros(images, 3, size, size))
            built[site] = scorer
        if built:
            # What is loaded stays. With it, each full garbage collection goes through 400,000 objects and stops all
            # threads for 0.2 s, and comes so rarely that errors and the images in their frames pile up meanwhile.
            gc.collect()
            gc.freeze()
        return built

    def _pairs(self, memory: Release) -> Iterator[tuple[str, Kept | None]]:
        if not memory.needs_generator:
            yield _ANY_SITE, None
            return
        for (federation, site), generators in sorted(self._generators.items()):
            if federation != memory.federation:
                continue
            oldest, *later = sorted(generators, key=_version)
            if oldest.release.version > memory.version:  # near enough, and better than a line without scores
                _log.warning(
                    "generator_newer_than_memory",
                    federation=federation,
                    site=site,
                    release=memory.version,
                    generator=oldest.release.version,
                )
            yield site, max((g for g in later if g.release.version <= memory.version), key=_version, default=oldest)

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


def _version(kept: Kept) -> int:
    return kept.release.version


async def _in_own_thread(work: Callable[[], _Result]) -> _Result:
    """Computes in a thread that ends then, and with it OpenMP's team for it, see `feddymem.threads`."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="build")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, work)
    finally:
        pool.shutdown(wait=False)
