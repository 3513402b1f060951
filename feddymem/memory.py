"""The memory bank: what a site makes of its patches, and what the global memory is too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


class InvalidBankError(ValueError):
    """A memory bank holds values that no honest site would make."""


@dataclass(frozen=True, eq=False)
class MemoryBank:
    """Items in the memory's space, each with its weight and spread.

    A site's reduced bank and the global memory are both of this form.

    Attributes:
        items: (n, channels) float32; points in the feature space.
        weights: (n,) float32; patches behind each item, at least 1.
        spreads: (n,) float32; root mean squared distance of those patches to the item, in units of the items.

    Raises:
        InvalidBankError: shapes that do not belong together, no items, NaN or infinite values, weights below 1 or
            negative spreads.
    """

    items: FloatArray
    weights: FloatArray
    spreads: FloatArray

    def __post_init__(self) -> None:
        if self.items.ndim != 2 or 0 in self.items.shape:
            raise InvalidBankError(f"items have shape {self.items.shape}; expected (n, channels) with n >= 1")
        for name in ("weights", "spreads"):
            if getattr(self, name).shape != (len(self.items),):
                raise InvalidBankError(
                    f"{name} have shape {getattr(self, name).shape}; expected ({len(self.items)},), one per item"
                )
        for name in ("items", "weights", "spreads"):
            bad = int(np.count_nonzero(~np.isfinite(getattr(self, name))))
            if bad:
                raise InvalidBankError(f"{bad} values of {name} are NaN or infinite")
        if self.weights.min() < 1:
            raise InvalidBankError(f"smallest weight is {self.weights.min():g}; every item stands for at least 1 patch")
        if self.spreads.min() < 0:
            raise InvalidBankError(f"smallest spread is {self.spreads.min():g}; spreads are never negative")

    def __len__(self) -> int:
        return len(self.items)

    @property
    def channels(self) -> int:
        """Length of an item."""
        return int(self.items.shape[1])

    @property
    def typical_distance(self) -> float:
        """Root mean squared distance of all patches behind the bank to their item, in units of the items."""
        weights = self.weights.astype(np.float64)
        return float(np.sqrt(np.average(self.spreads.astype(np.float64) ** 2, weights=weights)))

    @staticmethod
    def concatenate(banks: list[MemoryBank]) -> MemoryBank:
        """All items of several banks of the same number of channels, in the order given."""
        return MemoryBank(
            items=np.concatenate([bank.items for bank in banks]),
            weights=np.concatenate([bank.weights for bank in banks]),
            spreads=np.concatenate([bank.spreads for bank in banks]),
        )
