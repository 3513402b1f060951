"""What a site makes in a round: its bank, the memory generator behind it, and the calibration of what comes of it."""

from __future__ import annotations

from feddymem.feature_cache import CachedPatches
from feddymem.generator import MemoryGenerator
from feddymem.local_update import LocalUpdate, local_update, new_generator
from feddymem.memory import MemoryBank
from feddymem.method import Method
from feddymem.v1.array_pb2 import Array
from feddymem.v1.federation_pb2 import BankHeader, CalibrateRequest, WatchRoundsResponse
from feddymem.v1.release_pb2 import RELEASE_KIND_MEMORY_GENERATOR, Release
from services.edge_client import metrics
from services.edge_client.calibration import calibration_of
from services.edge_client.computing import Computing
from services.edge_client.images import SiteImages
from services.edge_client.settings import EdgeClientSettings
from services.edge_client.state import EdgeState, Outcome
from services.runtime import tracing
from services.runtime.arrays import WireArray, bank_to_wire
from services.runtime.logs import get_logger
from services.runtime.messages import (
    candidate_items,
    feature_space_to_message,
    generator_from_wire,
    generator_to_wire,
)
from services.runtime.publisher import Publisher

_log = get_logger()

_NO_ROUND = 0
"""Version of a memory generator that no round has made: older than all others."""


class RoundWork:
    """Makes a site's part of a round, of its images and of what the aggregator has said, whom it does not know.

    Banks and memory generators are on disk before anybody sees them. The generator is published: the one that is there,
    and each later one.

    Args:
        settings: of the edge client.
        images: what the feature space is of.
        device: that the generator is trained on.
        state: has what came of the last round.
        publisher: serves the site's inference services.
        computing: for long work.
    """

    def __init__(
        self,
        settings: EdgeClientSettings,
        images: SiteImages,
        device: str,
        state: EdgeState,
        publisher: Publisher,
        computing: Computing,
    ) -> None:
        self._images, self._device = images, device
        self._state, self._publisher, self._computing = state, publisher, computing
        self._federation, self._site = settings.federation, settings.site
        generator = state.last().generator
        if generator is not None:
            publisher.publish(generator)

    async def make_bank(
        self, event: WatchRoundsResponse, method: Method, present: CachedPatches, memory: MemoryBank | None
    ) -> BankHeader:
        """The bank of a round that is open.

        Args:
            event: what was said of the round.
            method: of the federation.
            present: the images that are there.
            memory: the global memory that the round starts from; None where the federation begins, or begins anew with
                an aggregator that has lost its disk.
        """
        patches, held_out = await self._computing.run(present.split, method.hold_out_share, method.seed)
        metrics.HELD_OUT.set(0 if held_out is None else held_out.images)
        generator = self._load_generator() if method.generator and memory is not None else None
        progress = self._computing.progress
        with tracing.span("local update") as local, metrics.UPDATE_SECONDS.time():
            update = await self._computing.run(
                local_update, patches, memory, generator, method, event.round, progress, self._device
            )
            tracing.note(local, items=len(update.bank))
        self._tell(update, event.round, patches)
        outcome = await self._computing.run(self._keep, update, event, method, patches, held_out)
        if outcome.generator is not None:
            self._publisher.publish(outcome.generator)
        assert outcome.bank is not None
        return outcome.bank

    async def make_calibration(
        self,
        event: WatchRoundsResponse,
        method: Method,
        present: CachedPatches,
        candidate: MemoryBank,
        base: MemoryBank | None,
    ) -> CalibrateRequest:
        """How a round's candidate scores the images that were held out of the round's bank. Nothing of it is kept.

        Args:
            event: what was said of the round.
            method: of the federation.
            present: the images that are there.
            candidate: the global memory that the round has made.
            base: the one that it started from; None for none.
        """
        held_out = await self._computing.run(self._held_out, present, event.round)
        generator = self._load_generator() if method.generator else None
        if method.generator and generator is None:
            _log.warning("generator_missing", reason="the memory generator of this round is lost; nothing is scored")
            held_out = None
        with metrics.CALIBRATION_SECONDS.time():
            said = await self._computing.run(
                calibration_of, self._images.extractor, candidate, base, generator, held_out, self._computing.progress
            )
        said.federation, said.site, said.instance = self._federation, self._site, self._state.instance
        said.round, said.items_sha256 = event.round, candidate_items(event)
        return said

    async def publish_untrained(self, method: Method, present: CachedPatches) -> None:
        """A site that comes when all rounds are over, or whose generator was damaged, uses the global memory through an
        untrained one, the identity. It is of no round: a trained one that an inference service has is not replaced."""
        _log.warning("generator_untrained", reason="there is no memory generator of a round here, and no more rounds")
        generator = await self._computing.run(new_generator, present, method.seed)
        release = await self._computing.run(self._keep_untrained, generator)
        self._publisher.publish(release)

    def _tell(self, update: LocalUpdate, round_number: int, patches: CachedPatches) -> None:
        items = len(update.bank)
        _log.info("bank_made", round=round_number, images=patches.images, items=items, loss=update.loss)
        metrics.BANK_ITEMS.set(items)
        metrics.REDUCE_RATIO.set(items / (patches.images * self._images.feature_space.patches))
        if update.loss is not None:
            metrics.LOSS.set(update.loss)

    def _held_out(self, present: CachedPatches, round_number: int) -> CachedPatches | None:
        """Those that were held out of the round's bank, as far as they are still there; none that has come since, which
        would move images of the bank to their side."""
        outcome = self._state.last()
        if outcome.round != round_number:
            _log.warning("held_out_unknown", reason="which images were held out of the bank is lost; nothing is scored")
            return None
        return present.only(outcome.held_out)

    def _keep(
        self,
        update: LocalUpdate,
        event: WatchRoundsResponse,
        method: Method,
        patches: CachedPatches,
        held_out: CachedPatches | None,
    ) -> Outcome:
        """Writes a round's outcome to disk."""
        bank = BankHeader(
            federation=self._federation,
            site=self._site,
            instance=self._state.instance,
            round=event.round,
            fingerprint=self._images.feature_space.fingerprint,
            images=patches.images,
            arrays=self._store(bank_to_wire(update.bank, method.item_type)),
        )
        generator = self._release(update.generator, event.round) if update.generator is not None else None
        names = frozenset() if held_out is None else frozenset(held_out.names.values())
        outcome = Outcome(bank, generator, event.round, names)
        self._state.put(outcome, event.memory.arrays)
        return outcome

    def _keep_untrained(self, generator: MemoryGenerator) -> Release:
        release = self._release(generator, _NO_ROUND)
        self._state.put(Outcome(generator=release))
        return release

    def _load_generator(self) -> MemoryGenerator | None:
        release = self._state.last().generator
        if release is None:
            return None
        arrays = ((array, self._state.arrays.read(array.sha256)) for array in release.arrays)
        return generator_from_wire(self._images.feature_space, arrays)

    def _release(self, generator: MemoryGenerator, round_number: int) -> Release:
        release = Release(
            federation=self._federation,
            version=round_number,
            kind=RELEASE_KIND_MEMORY_GENERATOR,
            site=self._site,
            feature_space=feature_space_to_message(self._images.feature_space),
            arrays=self._store(generator_to_wire(generator)),
        )
        release.created.GetCurrentTime()
        return release

    def _store(self, arrays: list[WireArray]) -> list[Array]:
        for array in arrays:
            self._state.arrays.put(array.manifest.sha256, array.data)
        return [array.manifest for array in arrays]
