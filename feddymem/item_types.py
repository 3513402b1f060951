"""What becomes of a bank's items on the wire: half floats, or 8 bits for each channel (ours)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feddymem.memory import FloatArray, MemoryBank
from feddymem.method import ItemType


@dataclass(frozen=True, eq=False)
class Quantised:
    """Values in 8 bits; each channel in 255 even steps from its smallest to its largest value.

    Attributes:
        steps: (..., channels) uint8.
        scale: (channels,) float32, value of a step; >= 0.
        offset: (channels,) float32, value of step 0.
    """

    steps: NDArray[np.uint8]
    scale: FloatArray
    offset: FloatArray

    @property
    def values(self) -> FloatArray:
        """(..., channels) float32; within half a step of the values quantised."""
        with np.errstate(over="ignore"):  # too large becomes infinite, which whoever takes the values refuses
            return np.asarray(self.steps.astype(np.float32) * self.scale + self.offset, np.float32)


def quantise(values: FloatArray) -> Quantised:
    """(..., channels) float32 in 8 bits."""
    flat = values.reshape(-1, values.shape[-1])
    offset = flat.min(0)
    scale = (flat.max(0) - offset) / 255
    steps = np.divide(flat - offset, scale, out=np.zeros_like(flat), where=scale > 0)
    return Quantised(np.clip(np.rint(steps), 0, 255).astype(np.uint8).reshape(values.shape), scale, offset)


def as_received(bank: MemoryBank, item_type: ItemType) -> MemoryBank:
    """A bank as it arrives: its items rounded to the type that they are sent in.

    Raises:
        InvalidBankError: a value does not fit into float16.
    """
    if item_type == "uint8":
        return dataclasses.replace(bank, items=quantise(bank.items).values)
    with np.errstate(over="ignore"):  # too large becomes infinite, which a bank refuses
        return dataclasses.replace(bank, items=bank.items.astype(np.float16).astype(np.float32))
