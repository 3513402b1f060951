"""The computation of a batch, whose images may be of several releases and sites."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from feddymem.scoring import Inspection, Scorer


def inspect_batch(scorers: Sequence[Scorer], pixels: Sequence[Tensor]) -> list[tuple[Inspection, Tensor] | Exception]:
    """Scores images: features once for all images of a backbone, distances by scorer.

    Args:
        scorers: what scores each image.
        pixels: (3, input_size, input_size) float32 of each image, from `FeatureExtractor.read`.

    Returns:
        Of each image its inspection and its features, (1, patches, channels) float32; or what its backbone or scorer
        raised, which is the result of their own images only, and handed to their callers, who log it.
    """
    results: dict[int, tuple[Inspection, Tensor] | Exception] = {}
    for extractor in {scorer.extractor for scorer in scorers}:
        rows = [i for i, scorer in enumerate(scorers) if scorer.extractor is extractor]
        try:
            features = extractor(torch.stack([pixels[i] for i in rows]))
        except Exception as error:  # noqa: BLE001 - see above
            results.update(dict.fromkeys(rows, error))
            continue
        for scorer in {scorers[i] for i in rows}:
            mine = [position for position, i in enumerate(rows) if scorers[i] is scorer]
            try:
                for position, inspection in zip(mine, scorer.inspect_features(features[mine]), strict=True):
                    results[rows[position]] = inspection, features[position : position + 1]
            except Exception as error:  # noqa: BLE001 - see above
                results.update(dict.fromkeys([rows[position] for position in mine], error))
    return [results[i] for i in range(len(scorers))]
