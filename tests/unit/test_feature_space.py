"""The fingerprint: the same for the same feature space, another one for any other, and an error that says why."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from feddymem.feature_space import FeatureSpace, FingerprintMismatchError

SPACE = FeatureSpace(
    backbone="tf_efficientnet_lite0",
    weights_sha256="ab" * 32,
    layers=(2, 3),
    reductions=(8, 16),
    input_size=224,
    tile_size=224,
    tile_overlap=0,
    mean=(127.0, 127.0, 127.0),
    std=(128.0, 128.0, 128.0),
    pooling=3,
    context_weight=1.25,
    border_weight=0.6875,
    channels=152,
    grid=28,
    preparation=2,
)

OTHER_VALUES: dict[str, Any] = {
    "backbone": "resnet18",
    "weights_sha256": "cd" * 32,
    "layers": (1, 3),
    "reductions": (16, 8),
    "input_size": 256,
    "tile_size": 112,
    "tile_overlap": 32,
    "mean": (127.0, 127.0, 127.00001),
    "std": (128.0, 127.0, 128.0),
    "pooling": 1,
    "context_weight": 1.0,
    "border_weight": 1.0,
    "channels": 153,
    "grid": 32,
    "preparation": 1,
}


def test_the_fingerprint_is_that_of_earlier_versions() -> None:
    """Kept banks and releases carry it: changing how it is made orphans them."""
    assert SPACE.fingerprint == "735f92cafb6cc82cb3039bab2e382d5e1ffe5e56fa5f6bb9834241ab92aca03e"


def test_equal_feature_spaces_have_the_same_fingerprint() -> None:
    assert dataclasses.replace(SPACE).fingerprint == SPACE.fingerprint


def test_every_field_is_tried() -> None:
    assert list(OTHER_VALUES) == [field.name for field in dataclasses.fields(FeatureSpace)]


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_another_value_of_any_field_changes_the_fingerprint(field: str) -> None:
    other = dataclasses.replace(SPACE, **{field: OTHER_VALUES[field]})
    assert other.fingerprint != SPACE.fingerprint


def test_the_same_feature_space_is_accepted() -> None:
    SPACE.require_same(dataclasses.replace(SPACE), "the federation", "site a")


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_a_mismatch_names_both_fingerprints_and_just_what_differs(field: str) -> None:
    other = dataclasses.replace(SPACE, **{field: OTHER_VALUES[field]})
    with pytest.raises(FingerprintMismatchError) as caught:
        SPACE.require_same(other, "the federation", "site a")
    text = str(caught.value)
    assert f"the federation has fingerprint {SPACE.fingerprint}" in text
    assert f"site a has {other.fingerprint}" in text
    assert f"they differ in {field}: {getattr(SPACE, field)} against {OTHER_VALUES[field]}. " in text


def test_a_mismatch_names_everything_that_differs() -> None:
    other = dataclasses.replace(SPACE, input_size=256, grid=32)
    with pytest.raises(FingerprintMismatchError, match="input_size: 224 against 256; grid: 28 against 32"):
        SPACE.require_same(other, "the federation", "site a")


def test_patches_are_those_of_the_whole_grid() -> None:
    assert SPACE.patches == 784
