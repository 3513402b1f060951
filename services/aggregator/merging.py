"""A round's banks become its release."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import feddymem
from feddymem.federation import MAX_ORIGINS, MEMORY_TYPE, NextMemory, next_memory
from feddymem.memory import MemoryBank
from feddymem.method import Method
from feddymem.v1.federation_pb2 import BankHeader
from feddymem.v1.release_pb2 import RELEASE_KIND_GLOBAL_MEMORY, Provenance, Release
from services.aggregator.releases import Releases
from services.aggregator.uploads import Uploads
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import bank_to_wire, items_of
from services.runtime.errors import Refusal


class DamagedBankError(RuntimeError):
    """A bank that was accepted cannot be read any more.

    Attributes:
        header: the bank's header.
    """

    def __init__(self, header: BankHeader, reason: str) -> None:
        super().__init__(f"the bank of site {header.site!r} cannot be read and must be sent again: {reason}")
        self.header = header


@dataclass(frozen=True)
class Merging:
    """What the release of a round is made from.

    Attributes:
        base: version of the release that the round started from; 0 for none.
        banks: headers of the round's banks whose sites may take part, by site.
        origins: all sites of whose banks the base or the round is made, by their origin.
        banned: origins that are taken out of the base; none where sites share origins.
        trusted: sites whose banks count even if they are outlying.
    """

    base: int
    banks: Mapping[str, BankHeader]
    origins: tuple[str, ...]
    banned: tuple[int, ...]
    trusted: frozenset[str]

    def digest(self, method: Method) -> bytes:
        """SHA-256 of it all, and of the method that merges it."""
        banks = {site: header.SerializeToString(deterministic=True) for site, header in sorted(self.banks.items())}
        inputs = self.base, banks, self.origins, self.banned, sorted(self.trusted), method.model_dump_json()
        return hashlib.sha256(repr(inputs).encode()).digest()

    def next_memory(self, uploads: Uploads, releases: Releases, method: Method) -> NextMemory:
        """Reads and merges it all.

        Raises:
            DamagedBankError: a bank cannot be read.
            DamagedReleaseError: the base cannot be read.
        """
        received = {site: _read(header, uploads) for site, header in self.banks.items()}
        memory = releases.memory(self.base)
        if memory is not None and self.banned:
            memory = memory.without(list(self.banned))
        return next_memory(memory, received, self.origins, method, self.trusted)


def banned_origins(origins: tuple[str, ...], banned: frozenset[str], method: Method) -> tuple[int, ...]:
    """Origins of banned sites; none where sites share origins, or the memory has only one."""
    if not method.origins or len(origins) > MAX_ORIGINS:
        return ()
    return tuple(origin for origin, site in enumerate(origins) if site in banned)


async def make_release(
    merged: NextMemory,
    banks: Mapping[str, BankHeader],
    draft: Release,
    arrays: ArrayStore,
) -> Release:
    """Stores a memory's arrays and describes them.

    Args:
        merged: what became of the banks.
        banks: headers of the banks, by site.
        draft: federation, version, feature space and whether memory generators are needed.
        arrays: store of the releases.
    """
    wire = bank_to_wire(merged.memory, MEMORY_TYPE)
    for array in wire:
        await asyncio.to_thread(arrays.put, array.manifest.sha256, array.data)
    outliers = {outlier.site for outlier in merged.outliers}
    headers = [header for site, header in banks.items() if site not in outliers]
    items = [items_of(header.arrays) for header in headers]
    release = Release(
        kind=RELEASE_KIND_GLOBAL_MEMORY,
        arrays=[array.manifest for array in wire],
        provenance=Provenance(
            sites=len(headers),
            images=sum(header.images for header in headers),
            items=sum(array.shape[0] for array in items),
            banks_sha256=sorted(hashlib.sha256(array.sha256).hexdigest() for array in items),
            program_version=feddymem.__version__,
            quarantined=len(outliers),
        ),
    )
    release.MergeFrom(draft)
    release.created.GetCurrentTime()
    return release


def _read(header: BankHeader, uploads: Uploads) -> MemoryBank:
    try:
        return uploads.bank(header)
    except Refusal as refusal:  # of its values nothing was refused when it was accepted
        raise DamagedBankError(header, refusal.text) from refusal
