"""What a bank must be like to be received, and to be counted."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from feddymem.feature_space import FeatureSpace
from feddymem.memory import MemoryBank
from feddymem.method import Method
from feddymem.v1.array_pb2 import DATA_TYPE_FLOAT32, Array, DataType
from services.runtime.arrays import BANK_ARRAYS, ITEM_TYPES, check_manifest
from services.runtime.errors import invalid
from services.runtime.publisher import MAX_ARRAY_BYTES

_MAX_VALUE = 60_000.0
"""Largest absolute value of items and spreads: releases travel as float16, whose largest is 65,504."""


def check_manifests(manifests: Iterable[Array], method: Method, space: FeatureSpace) -> None:
    """Checks the manifests of a bank before any of its bytes are received.

    Raises:
        Refusal: INVALID_ARGUMENT that says what this federation takes.
    """
    by_name = {manifest.name: manifest for manifest in manifests}
    if sorted(manifest.name for manifest in manifests) != sorted(BANK_ARRAYS):
        raise invalid(f"a memory bank has the arrays {', '.join(BANK_ARRAYS)}; got {', '.join(by_name) or 'none'}")
    items = by_name["items"]
    count = items.shape[0] if items.shape else 0
    if count > method.bank_items:
        raise invalid(f"items has {count} rows; a bank of this federation has at most {method.bank_items}")
    expected = {
        "items": ([count, space.channels], ITEM_TYPES[method.item_type]),
        "weights": ([count, 1], DATA_TYPE_FLOAT32),
        "spreads": ([count], DATA_TYPE_FLOAT32),
    }
    for name, (shape, data_type) in expected.items():
        manifest = by_name[name]
        check_manifest(manifest, MAX_ARRAY_BYTES)
        if (list(manifest.shape), manifest.data_type) != (shape, data_type):
            raise invalid(
                f"{name} are {DataType.Name(manifest.data_type)} of shape {list(manifest.shape)}; "
                f"this federation takes {DataType.Name(data_type)} of shape {shape}"
            )
    sizes = {(manifest.sha256, manifest.size_bytes) for manifest in manifests}
    if len({sha256 for sha256, _ in sizes}) < len(sizes):
        raise invalid("two arrays have the same sha256 and not the same size_bytes; send each with that of its bytes")


def check_values(bank: MemoryBank, images: int, space: FeatureSpace) -> None:
    """Checks a bank's values against the images that it is said to be made from.

    Raises:
        Refusal: INVALID_ARGUMENT for values that no honest site would send.
    """
    largest = float(np.abs(bank.items).max())
    if largest > _MAX_VALUE or float(bank.spreads.max()) > _MAX_VALUE:
        raise invalid(
            f"items or spreads are larger than {_MAX_VALUE:g} (items up to {largest:g}); they must fit float16"
        )
    patches = images * space.patches
    total = math.fsum(bank.weights[:, 0])
    if total > patches * (1 + len(bank) * np.finfo(np.float32).eps):  # weights are rounded, each by itself
        raise invalid(f"weights add up to {total:g}; {images} images have {patches} patches")
