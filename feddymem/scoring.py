"""Scoring: an image's distance to the global memory, as one score and of each patch.

The one code path that library, edge client and inference service share; a parity test holds them to the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feddymem.backbone import FeatureExtractor
from feddymem.generator import MemoryGenerator
from feddymem.memory import MemoryBank
from feddymem.search import NearestItems
from feddymem.threads import team

_TOP_PATCHES = 5
"""The image score is the mean of this many largest patch distances (ours): one patch alone is noisy."""
_EVIDENCE_SHARE = 0.3
"""How badly an origin explains an image is told by this share of the patches, those farthest from its items (ours)."""
_ALLOWANCE = 1.5
"""An origin may be worse than the best by this much of what all origins together gain over the best (ours)."""
_PRICE = 8.0
"""An origin that is worse still is farther by this much of the excess (ours)."""


@dataclass(frozen=True, eq=False)
class Inspection:
    """Result for one image.

    Attributes:
        score: mean of the largest patch distances, in units of the feature space; >= 0.
        distances: (grid, grid) float32, distance of each patch to the memory, see `of_one_origin`.
    """

    score: float
    distances: NDArray[np.float32]


class Scorer:
    """Scores patch features against a global memory, through a site's memory generator if there is one."""

    def __init__(self, extractor: FeatureExtractor, memory: MemoryBank, generator: MemoryGenerator | None) -> None:
        if memory.channels != extractor.feature_space.channels:
            raise ValueError(
                f"the memory's items have {memory.channels} channels, "
                f"the feature space has {extractor.feature_space.channels}"
            )
        self.extractor = extractor
        self.typical_distance = memory.typical_distance
        self._nearest = NearestItems(
            torch.from_numpy(memory.items).to(extractor.device), torch.from_numpy(memory.weights > 0), extractor.screen
        )
        self._generator = None if generator is None else generator.to(extractor.device)

    def inspect(self, images: Tensor) -> list[Inspection]:
        """Scores prepared images: (n, 3, input_size, input_size) float32, from `FeatureExtractor.prepare`."""
        return self.inspect_features(self.extractor(images))

    @torch.inference_mode()
    def inspect_features(self, features: Tensor) -> list[Inspection]:
        """Scores patch features: (n, grid * grid, channels) float32."""
        with team(1):  # what the screen does not do is too little for more, which would be in its way
            mapped = features if self._generator is None else self._generator(features)
            squared = self._nearest(mapped.flatten(0, 1)).view(-1, *mapped.shape[:2])
            nearest = of_one_origin(squared).cpu().numpy()
        distances = np.sqrt(nearest)  # torch's square root is MKL's, which has threads of its own
        top = min(_TOP_PATCHES, distances.shape[1])
        scores = np.partition(distances, -top, 1)[:, -top:].mean(1)
        grids = distances.reshape(-1, *[self.extractor.feature_space.grid] * 2)
        return [Inspection(score=float(score), distances=grid) for score, grid in zip(scores, grids, strict=True)]


def of_one_origin(squared: Tensor) -> Tensor:
    """Distances of images that each come from one site, whichever it is (ours).

    With `d_o` the distance of a patch to the nearest item of origin `o`, `E_o` the mean of an image's largest 30 % of
    `d_o²`, `E` the least of them and `U` the same mean of `min_o d_o²`, an origin has the price
    `8 max(0, E_o - E - 1.5 (E - U))`, and a patch the squared distance `min_o (d_o² + price_o)`. So an item of another
    site does not hide a defect in an image that is nothing like that site's; and where sites are alike, so that an
    image needs several of them (`E - U` is large), all their items count.

    Args:
        squared: (origins, images, patches) float32, d_o².

    Returns:
        (images, patches) float32.
    """
    evidence = _evidence(squared)
    best, together = evidence.amin(0), _evidence(squared.amin(0))
    price = _PRICE * (evidence - best - _ALLOWANCE * (best - together)).clamp_min(0)
    return (squared + price[:, :, None]).amin(0)


def _evidence(squared: Tensor) -> Tensor:
    count = math.ceil(_EVIDENCE_SHARE * squared.shape[-1])
    return squared.topk(count, dim=-1).values.mean(-1)
