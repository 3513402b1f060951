"""The banks of one federation on their way and at rest: each site has a store of its own, so that nobody can refer to
what another site has sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from feddymem.memory import InvalidBankError, MemoryBank
from feddymem.v1.array_pb2 import Array
from feddymem.v1.federation_pb2 import ArrayOffset, BankHeader, ResumeOffsets, UploadBankRequest
from services.runtime.array_store import ArrayStore
from services.runtime.arrays import bank_from_wire
from services.runtime.errors import Refusal, invalid

_RESUMABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS, grpc.StatusCode.DEADLINE_EXCEEDED)
"""Ends of an upload after which what has arrived is kept, because the caller goes on."""


class Uploads:
    """Receives banks array by array.

    Args:
        folder: where they are kept.
        accepted: tells whether a bank of a site is accepted for a round.
    """

    def __init__(self, folder: Path, accepted: Callable[[str, int], bool]) -> None:
        self._folder, self._accepted = folder, accepted
        self._stores: dict[str, ArrayStore] = {}
        self._under_way: dict[str, list[BankHeader]] = {}
        self._received: dict[str, tuple[int, int]] = {}

    def bank(self, header: BankHeader) -> MemoryBank:
        """A bank that has arrived.

        Raises:
            Refusal, InvalidBankError: as `bank_from_wire`.
        """
        store = self._store(header.site)
        return bank_from_wire((manifest, store.read(manifest.sha256)) for manifest in header.arrays)

    @contextmanager
    def receiving(self, header: BankHeader) -> Iterator[None]:
        """Room for one bank of a site inside the block; nothing is kept of one that is refused there.

        What the site has left of another one, broken off, goes. The same bank may come on several streams: the server
        hears late of one that broke. What one of them brings is refused without harm to the others.

        Raises:
            Refusal: UNAVAILABLE where another bank of the site is on its way.
        """
        under_way = self._under_way.setdefault(header.site, [])
        if any(list(other.arrays) != list(header.arrays) for other in under_way):
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE,
                f"another upload of site {header.site!r} is under way; try again when it has ended",
            )
        self._store(header.site).keep_only((array.sha256 for array in header.arrays), keep_parts=False)
        under_way.append(header)
        try:
            yield
        except (Refusal, InvalidBankError) as error:
            resumable = isinstance(error, Refusal) and error.status in _RESUMABLE
            if not resumable and len(under_way) == 1 and not self._accepted(header.site, header.round):
                self.discard(header)
            raise
        finally:
            under_way.remove(header)

    def offsets(self, header: BankHeader) -> ResumeOffsets:
        """How much of each array of a bank is here."""
        store = self._store(header.site)
        return ResumeOffsets(
            offsets=[ArrayOffset(sha256=array.sha256, offset=store.held_bytes(array)) for array in header.arrays]
        )

    async def receive(self, header: BankHeader, requests: AsyncIterator[UploadBankRequest]) -> None:
        """Keeps chunks until all arrays of the header are whole.

        Raises:
            Refusal: UNAVAILABLE where the stream ends before; as `ArrayStore.append`.
        """
        store = self._store(header.site)
        manifests: dict[bytes, Array] = {manifest.sha256: manifest for manifest in header.arrays}
        async for request in requests:
            self.count(header, request)
            manifest = manifests.get(request.chunk.sha256)
            if manifest is None:
                named = request.chunk.sha256[:32].hex() or "without a sha256"
                raise invalid(f"chunk of array {named}, which is not in the header")
            await asyncio.to_thread(store.append, manifest, request.chunk)
        missing = [manifest.name for sha256, manifest in manifests.items() if sha256 not in store]
        if missing:
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE,
                f"the stream ended before all of {', '.join(missing)} had arrived; upload again to resume",
            )

    def count(self, header: BankHeader, request: UploadBankRequest) -> None:
        """Counts the bytes of a message for the bank of a round."""
        self._received[header.site] = header.round, self.received_bytes(header) + request.ByteSize()

    def received_bytes(self, header: BankHeader) -> int:
        """Bytes of all messages of a bank since the start of this process."""
        number, received = self._received.get(header.site, (header.round, 0))
        return received if number == header.round else 0

    def discard(self, header: BankHeader) -> None:
        """Keeps nothing of a bank."""
        for manifest in header.arrays:
            self._store(header.site).discard(manifest.sha256)

    def keep_only(self, headers: Iterable[BankHeader]) -> None:
        """Removes whole arrays of all other banks; what has arrived of banks on their way stays."""
        wanted: dict[str, set[bytes]] = {}
        for header in [*headers, *(header for under_way in self._under_way.values() for header in under_way)]:
            wanted.setdefault(header.site, set()).update(array.sha256 for array in header.arrays)
        for folder in self._folder.iterdir() if self._folder.exists() else ():
            self._store(folder.name).keep_only(wanted.get(folder.name, ()))

    def _store(self, site: str) -> ArrayStore:
        """Names of sites are those of members, so they are fit for a folder's name."""
        if site not in self._stores:
            self._stores[site] = ArrayStore(self._folder / site)
        return self._stores[site]
