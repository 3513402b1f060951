"""The edge client's state on disk: who it is, its last bank and its memory generator."""

from __future__ import annotations

import uuid
from pathlib import Path

from feddymem.v1.federation_pb2 import BankHeader
from feddymem.v1.release_pb2 import Release
from services.runtime.array_store import ArrayStore, write_atomically


class EdgeState:
    """Small files in one folder, each replaced as a whole, beside content-addressed arrays."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.arrays = ArrayStore(folder / "arrays")
        self.patches = folder / "patches.f16"
        self._instance, self._owner = folder / "instance", folder / "owner"
        self._bank, self._generator = folder / "bank.binpb", folder / "generator.binpb"

    @property
    def instance(self) -> str:
        """Random name of this edge client, the same for as long as the folder is kept."""
        if not self._instance.exists():
            write_atomically(self._instance, uuid.uuid4().hex.encode())
        return self._instance.read_text()

    def claim(self, owner: str) -> None:
        """Makes the folder one federation's, site's and feature space's.

        Raises:
            ValueError: it is another's already.
        """
        if not self._owner.exists():
            write_atomically(self._owner, owner.encode())
        held = self._owner.read_text()
        if held != owner:
            raise ValueError(
                f"state_dir: {self._owner.parent} holds the state of {held}, not of {owner}; give another one"
            )

    def bank(self) -> BankHeader | None:
        """The last bank that was made; uploaded or not."""
        return BankHeader.FromString(self._bank.read_bytes()) if self._bank.exists() else None

    def generator(self) -> Release | None:
        """The memory generator that made the last bank."""
        return Release.FromString(self._generator.read_bytes()) if self._generator.exists() else None

    def put(self, bank: BankHeader, generator: Release | None) -> None:
        """Keeps a round's outcome; its arrays are in the store already.

        The generator goes last: after a crash between the two, it is that of the round before, from which the same bank
        is made again.
        """
        write_atomically(self._bank, bank.SerializeToString(deterministic=True))
        used = {array.sha256 for array in bank.arrays}
        if generator is not None:
            self.put_generator(generator)
            used |= {array.sha256 for array in generator.arrays}
        self.arrays.keep_only(used)

    def put_generator(self, generator: Release) -> None:
        """Keeps a memory generator."""
        write_atomically(self._generator, generator.SerializeToString(deterministic=True))
