"""A feature space for tests; they change what they are about."""

from __future__ import annotations

from feddymem.feature_space import FeatureSpace

SPACE = FeatureSpace(
    backbone="resnet18",
    weights_sha256="ab" * 32,
    layers=(2, 3),
    reductions=(8, 16),
    input_size=32,
    tile_size=32,
    tile_overlap=0,
    mean=(123.0, 116.5, 103.5),
    std=(58.0, 57.0, 57.5),
    pooling=3,
    context_weight=1.25,
    border_weight=0.6875,
    channels=16,
    grid=4,
    preparation=2,
)
