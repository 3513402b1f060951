"""The memory bank: what a site makes of its patches, and what the global memory is too."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


class InvalidBankError(ValueError):
    """A memory bank holds values that no honest site would make."""


@dataclass(frozen=True, eq=False)
class MemoryBank:
    """Items in the memory's space, each with its weights and spread.

    A site's reduced bank, which has one origin, and the global memory are both of this form.

    Attributes:
        items: (n, channels) float32; points in the feature space.
        weights: (n, origins) float32; patches of each origin that were averaged into each item, 0 or at least 1, not
            all of them 0. An origin is a site (ours).
        spreads: (n,) float32; root mean squared distance of those patches to the item, in units of the items.

    Raises:
        InvalidBankError: shapes that do not belong together, no items, NaN or infinite values, weights between 0 and 1
            or negative, an item without weight, or negative spreads.
    """

    items: FloatArray
    weights: FloatArray
    spreads: FloatArray

    def __post_init__(self) -> None:
        if self.items.ndim != 2 or 0 in self.items.shape:
            raise InvalidBankError(f"items have shape {self.items.shape}; expected (n, channels) with n >= 1")
        if self.weights.ndim != 2 or len(self.weights) != len(self.items) or 0 in self.weights.shape:
            raise InvalidBankError(
                f"weights have shape {self.weights.shape}; expected ({len(self.items)}, origins), a row for each item"
            )
        if self.spreads.shape != (len(self.items),):
            raise InvalidBankError(
                f"spreads have shape {self.spreads.shape}; expected ({len(self.items)},), one for each item"
            )
        for name in ("items", "weights", "spreads"):
            bad = int(np.count_nonzero(~np.isfinite(getattr(self, name))))
            if bad:
                raise InvalidBankError(f"{bad} values of {name} are NaN or infinite")
        self._check_weights()
        if self.spreads.min() < 0:
            raise InvalidBankError(f"smallest spread is {self.spreads.min():g}; spreads are never negative")

    def _check_weights(self) -> None:
        off = self.weights[(self.weights < 1) & (self.weights != 0)]
        if off.size:
            raise InvalidBankError(f"smallest weight is {off.min():g}; a weight is 0 or at least 1 patch")
        empty = int(np.count_nonzero(~self.weights.any(1)))
        if empty:
            raise InvalidBankError(
                f"{empty} of {len(self)} items have no weight; every item stands for at least 1 patch"
            )

    def __len__(self) -> int:
        return len(self.items)

    @property
    def channels(self) -> int:
        """Length of an item."""
        return int(self.items.shape[1])

    @property
    def origins(self) -> int:
        """Number of origins."""
        return int(self.weights.shape[1])

    @property
    def patches(self) -> NDArray[np.float64]:
        """(n,) float64: patches behind each item, of all origins."""
        return np.asarray(self.weights.sum(1, dtype=np.float64))

    @property
    def typical_distance(self) -> float:
        """Root mean squared distance of all patches behind the bank to their item, in units of the items."""
        return float(np.sqrt(np.average(self.spreads.astype(np.float64) ** 2, weights=self.patches)))

    def placed(self, first: int, origins: int) -> MemoryBank:
        """The same items, with this bank's origins as those from `first` on of `origins` in all."""
        weights = np.zeros((len(self), origins), np.float32)
        weights[:, first : first + self.origins] = self.weights
        return dataclasses.replace(self, weights=weights)

    def only(self, chosen: NDArray[np.bool_]) -> MemoryBank:
        """Some of the items, at least one: (n,) bool."""
        return MemoryBank(self.items[chosen], self.weights[chosen], self.spreads[chosen])

    def without(self, origins: Collection[int]) -> MemoryBank | None:
        """What is left when the patches of some origins are taken away; None if nothing is.

        An item that other origins' patches are behind, too, stays where it is.
        """
        weights = self.weights.copy()
        weights[:, [origin for origin in origins if origin < self.origins]] = 0
        left = weights.any(1)
        return MemoryBank(self.items[left], weights[left], self.spreads[left]) if left.any() else None

    @staticmethod
    def concatenate(banks: list[MemoryBank]) -> MemoryBank:
        """All items of several banks of the same channels and origins, in the order given."""
        return MemoryBank(
            items=np.concatenate([bank.items for bank in banks]),
            weights=np.concatenate([bank.weights for bank in banks]),
            spreads=np.concatenate([bank.spreads for bank in banks]),
        )
