"""The edge client's state on disk: who it is, what came of its last round, and where features and feedback are."""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed

from feddymem.v1.array_pb2 import Array
from feddymem.v1.federation_pb2 import BankHeader
from feddymem.v1.release_pb2 import Release
from services.runtime.array_store import ArrayStore
from services.runtime.errors import Refusal
from services.runtime.files import make_folder, read_record, write_record


@dataclass(frozen=True)
class Outcome:
    """What came of a round at this site.

    Attributes:
        bank: the bank that was made for it; uploaded or not.
        generator: the memory generator that made it.
        round: its number; 0 before the first one. Known, as the next, where the bank itself is damaged.
        held_out: names of the images that were held out of the bank.
    """

    bank: BankHeader | None = None
    generator: Release | None = None
    round: int = 0
    held_out: frozenset[str] = frozenset()


class EdgeState:
    """Small files in one folder, each replaced as a whole, beside content-addressed arrays. `claim` comes first."""

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        self.arrays = ArrayStore(folder / "arrays")
        self.features, self.feedback = folder / "features", folder / "feedback"
        self.arrivals = folder / "arrivals"
        self.instance = ""
        self._owner, self._outcome = folder / "owner", folder / "outcome"

    def claim(self, owner: str) -> None:
        """Makes the folder one federation's, site's and feature space's, and gives this edge client the random name
        `instance`, the same for as long as the folder is kept.

        Raises:
            ValueError: it is another's already.
        """
        content = read_record(self._owner)
        if content is None:
            content = f"{uuid.uuid4().hex}\n{owner}".encode()
            write_record(self._owner, content)
        instance, held = content.decode().split("\n", 1)
        if held != owner:
            raise ValueError(
                f"state_dir: {self._owner.parent} holds the state of {held}, not of {owner}; give another one"
            )
        self.instance = instance

    def last(self) -> Outcome:
        """What came of the last round; without what was damaged since, and without another edge client's."""
        content = read_record(self._outcome)
        if content is None:
            return Outcome()
        file = io.BytesIO(content)
        bank, generator = parse_length_prefixed(BankHeader, file), parse_length_prefixed(Release, file)
        if bank is None or generator is None or bank.instance != self.instance:
            return Outcome()
        return Outcome(
            bank if bank.arrays and self._whole(bank.arrays) else None,
            generator if generator.arrays and self._whole(generator.arrays) else None,
            bank.round,
            frozenset(file.read().decode().split()),
        )

    def put(self, outcome: Outcome, base: Iterable[Array] = ()) -> None:
        """Keeps what came of a round, all of it or nothing; its arrays are in the store already.

        Args:
            outcome: what came of it.
            base: the global memory that the round started from, which is kept to compare its candidate with; of earlier
                rounds nothing is.
        """
        bank, generator = outcome.bank or BankHeader(instance=self.instance), outcome.generator or Release()
        file = io.BytesIO()
        serialize_length_prefixed(bank, file)
        serialize_length_prefixed(generator, file)
        file.write("\n".join(sorted(outcome.held_out)).encode())
        write_record(self._outcome, file.getvalue())
        self.arrays.keep_only({array.sha256 for array in (*bank.arrays, *generator.arrays, *base)}, keep_parts=False)

    def _whole(self, arrays: Iterable[Array]) -> bool:
        try:
            for array in arrays:
                self.arrays.read(array.sha256)
        except Refusal:  # missing, or damaged and in quarantine now
            return False
        return True
