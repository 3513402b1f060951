"""Configuration of the method: which components run, and their sizes."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

ItemType = Literal["float16", "uint8"]


class Method(BaseModel):
    """How every site of a federation runs the method.

    Each component can be switched off. The memory generator is off until switched on: it did not improve detection.
    The components are the paper's (arXiv 2502.21012); sizes and defaults are ours, see docs/method.md.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    generator: bool = Field(
        default=False, description="pass patch features through a memory generator, trained at the site"
    )
    metric_loss: bool = Field(
        default=True, description="train the memory generator, if there is one; without it, it stays the identity"
    )
    memory_reduce: bool = Field(
        default=True, description="reduce the bank by weighted averages; without it, sample patches"
    )
    bank_items: int = Field(default=1568, ge=1, le=65_536, description="items of a site's reduced bank, at most")
    memory_items: int = Field(default=12_288, ge=1, le=1_048_576, description="items of the global memory, at most")
    origins: bool = Field(
        default=True, description="keep which sites' patches are behind an item; an image is scored as one site's"
    )
    rounds: int = Field(default=2, ge=1, le=100_000, description="rounds until the federation is done; 1 is one shot")
    weighted: bool = Field(default=False, description="weight items by their patches in k-means aggregation")
    item_type: ItemType = Field(default="uint8", description="element type of bank items on the wire")
    hold_out_share: float = Field(
        default=0.2,
        ge=0,
        le=0.5,
        description="share of a site's normal images that it holds out of its bank, to calibrate releases; 0 for none",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of every random choice at sites and aggregator")

    def bank_bytes(self, items: int, channels: int) -> int:
        """Bytes of a bank on the wire: its items in `item_type`, weight and spread of each in float32.

        Manifests and framing are left out; a test holds this to what the services send.
        """
        return items * (channels * np.dtype(self.item_type).itemsize + 2 * np.dtype(np.float32).itemsize)
