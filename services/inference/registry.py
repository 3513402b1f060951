"""Which release and which memory generator score an image: swapped while requests run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc

from feddymem.scoring import Scorer
from feddymem.v1.release_pb2 import RELEASE_KIND_GLOBAL_MEMORY, Release
from services.inference import metrics
from services.inference.active import Active
from services.inference.lines import Lines, Shadow
from services.inference.release_store import Kept, ReleaseStore
from services.inference.scorers import ANY_SITE, Scorers
from services.inference.settings import InferenceSettings
from services.runtime.changes import Changes
from services.runtime.errors import Refusal, as_refusal, invalid, not_found
from services.runtime.logs import get_logger

GENERATORS_KEPT = 11
"""Memory generators of each site, the last that came: for the releases that an aggregator keeps by default, any of
which may be activated again, and for the round that is open."""

_log = get_logger()


class Registry:
    """Takes releases as they come and pairs each global memory with each site's memory generator.

    The pair is the last global memory that came with the site's newest memory generator that is not newer or, where
    all are, with the oldest. A global memory that no generator fits yet waits for one, while the one before scores. A
    swap replaces one reference: requests that have begun finish with what they began with.

    Attributes:
        arrays: where those of a release are to be before it is received.
        changes: notified of whenever what scores has changed.
    """

    def __init__(self, settings: InferenceSettings) -> None:
        self._federations = settings.federations
        self._store = ReleaseStore(settings.state_dir)
        self.arrays = self._store.arrays
        self._scorers = Scorers(settings)
        self._memories: dict[str, Kept] = {}
        self._waiting: dict[str, Kept] = {}
        self._generators: dict[tuple[str, str], list[Kept]] = {}
        self._shadows: dict[str, Kept] = {}
        self._active: dict[tuple[str, str], Active] = {}
        self._swap = asyncio.Lock()
        self.changes = Changes()

    async def load(self) -> None:
        """Takes what an earlier run left on disk, each federation for itself.

        A release that this service has no backbone for is kept: it is good, and the next start may have the right
        checkpoint.
        """
        found = await asyncio.to_thread(self._store.load)
        for kept in found:
            if kept.release.kind == RELEASE_KIND_GLOBAL_MEMORY:
                self._memories[kept.release.federation] = kept
            else:
                self._note_generator(kept)
        await self._forget(kept.release for kept in found)  # what a run that was killed had replaced, but not forgotten
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
        if self._federations and release.federation not in self._federations:
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
        if known is not None and known.release == release and self._scores(release) and await self._on_disk(release):
            if (left := self._waiting.pop(release.federation, None)) is not None:  # rolled back before it could score
                await self._forget([left.release])
            return
        await self._take(await asyncio.to_thread(self._store.open, release))

    async def _receive_generator(self, release: Release) -> None:
        known = self._generators.get((release.federation, release.site), [])
        if not (known and known[-1].release == release and await self._on_disk(release)):
            kept = await asyncio.to_thread(self._store.open, release)
            before = dict(self._generators)
            self._note_generator(kept)
            try:
                await self._activate(release.federation)
            except BaseException:
                self._generators = before
                raise
            await asyncio.to_thread(self._store.write, release)
            await self._forget(each.release for each in known)
        waiting = self._waiting.get(release.federation)
        if waiting is not None:
            await self._take(waiting)

    async def _take(self, memory: Kept) -> None:
        """Activates a global memory; where no memory generator fits it yet and another one scores, it waits for one.

        It is not on disk while it waits: after a restart, too, the other one is to score.
        """
        federation = memory.release.federation
        built = await self._build(memory)
        left = self._waiting.pop(federation, None)
        if built or not self._active_of(federation):
            before = self._memories.get(federation)
            self._memories[federation] = memory
            await self._put_in_place(memory, built)
            await asyncio.to_thread(self._store.write, memory.release)
        else:
            before = None
            self._waiting[federation] = memory
            _log.warning("release_waits_for_generator", federation=federation, release=memory.release.version)
        await self._forget(each.release for each in (left, before) if each is not None)

    def _scores(self, release: Release) -> bool:
        return any(_is_of(each, release) for each in self._active_of(release.federation))

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
        of_lines = {each.lines for each in self._active_of(federation)}
        scorers = await self._build(kept) if kept is not None and of_lines else {}
        for lines in of_lines:
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
        federations = sorted({*known, *self._federations})
        if federation and federation not in federations:
            self._require_not_lost(federation, site)
            raise not_found(f"this service has no federation {federation!r}; check its name")
        federation = federation or _only(federations, "federation")
        memory = self._memories.get(federation)
        if memory is None:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, f"federation {federation!r} has no release yet; try again later")
        if memory.release.needs_generator:
            sites = sorted(self._generators_of(federation))
            if site and site not in sites:
                self._require_not_lost(federation, site)
                raise not_found(f"this service has no site {site!r} in federation {federation!r}; check its name")
            site = site or _only(sites, "site")
        active = self._active.get((federation, site if memory.release.needs_generator else ANY_SITE))
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
        return bool(scoring) and scoring >= set(self._federations)

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

    def _note_generator(self, kept: Kept) -> None:
        key = kept.release.federation, kept.release.site
        others = [each for each in self._generators.get(key, []) if each.release.version != kept.release.version]
        # As they came: where the aggregator has lost its disk, versions begin anew, and the newest is not the highest.
        self._generators[key] = [*others, kept][-GENERATORS_KEPT:]

    def _generators_of(self, federation: str) -> dict[str, list[Kept]]:
        return {site: kept for (name, site), kept in self._generators.items() if name == federation}

    def _active_of(self, federation: str) -> list[Active]:
        return [each for each in self._active.values() if each.federation == federation]

    async def _forget(self, left: Iterable[Release]) -> None:
        """Has the disk forget those releases among some that are not needed any more."""
        memories = [*self._memories.values(), *self._waiting.values()]
        used = [*memories, *(each for generators in self._generators.values() for each in generators)]
        await asyncio.to_thread(self._store.forget, left, [each.release for each in used])

    async def _build(self, memory: Kept) -> dict[str, Scorer]:
        """What scores with a global memory and the memory generators that are here, see `Scorers.build`."""
        return await self._scorers.build(memory, self._generators_of(memory.release.federation))

    async def _activate(self, federation: str) -> None:
        """Builds what scores anew, of the global memory and the memory generators that are here."""
        memory = self._memories.get(federation)
        if memory is not None:
            await self._put_in_place(memory, await self._build(memory))

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
            if name == federation and (site == ANY_SITE) == release.needs_generator:
                del self._active[name, site]
        try:
            await self._cast_shadow(federation)
        except Exception as error:  # noqa: BLE001 - a shadow must not keep a release from the lines
            _log.error("shadow_refused", federation=federation, exc_info=error)
        self.changes.notify()

    def _lines_of(self, memory: Kept) -> Lines:
        """Those of a release: what they know is kept while it is the same, whatever memory generators come."""
        active = self._active_of(memory.release.federation)
        for each in active:
            if _is_of(each, memory.release):
                return each.lines
        for lines in {each.lines for each in active}:
            lines.leave()
        return Lines(memory.release.federation, memory.limits)


def _is_of(active: Active, release: Release) -> bool:
    """Whether a global memory of the same federation is what scores."""
    return (active.release, active.created) == (release.version, release.created.ToNanoseconds())


def _only(names: list[str], what: str) -> str:
    if not names:
        raise Refusal(grpc.StatusCode.UNAVAILABLE, f"no {what} is known here yet; try again later")
    if len(names) > 1:
        raise invalid(f"this service has {len(names)} {what}s; name the {what}")
    return names[0]
