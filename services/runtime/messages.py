"""The library's values as messages, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from feddymem.feature_space import FeatureSpace
from feddymem.generator import MemoryGenerator
from feddymem.method import ItemType, Method
from feddymem.v1 import feature_space_pb2, federation_pb2
from feddymem.v1.array_pb2 import Array
from services.runtime.arrays import ITEM_TYPES, WireArray, decode, encode
from services.runtime.errors import invalid


def feature_space_to_message(space: FeatureSpace) -> feature_space_pb2.FeatureSpace:
    """The message that describes a feature space."""
    return feature_space_pb2.FeatureSpace(fingerprint=space.fingerprint, **dataclasses.asdict(space))


def feature_space_from_message(message: feature_space_pb2.FeatureSpace) -> FeatureSpace:
    """The feature space that a message describes.

    Raises:
        Refusal: INVALID_ARGUMENT where the fingerprint is not that of the fields.
    """
    if len(message.mean) != 3 or len(message.std) != 3:
        raise invalid("feature space: mean and std need three values each, for R, G and B")
    space = FeatureSpace(
        backbone=message.backbone,
        weights_sha256=message.weights_sha256,
        layers=tuple(message.layers),
        reductions=tuple(message.reductions),
        input_size=message.input_size,
        tile_size=message.tile_size,
        tile_overlap=message.tile_overlap,
        mean=(message.mean[0], message.mean[1], message.mean[2]),
        std=(message.std[0], message.std[1], message.std[2]),
        pooling=message.pooling,
        context_weight=message.context_weight,
        border_weight=message.border_weight,
        channels=message.channels,
        grid=message.grid,
        preparation=message.preparation,
    )
    if space.fingerprint != message.fingerprint:
        raise invalid(
            f"feature space: fingerprint {message.fingerprint} is not that of its fields, {space.fingerprint}; "
            "sender and receiver run different versions"
        )
    return space


def method_to_message(method: Method) -> federation_pb2.Method:
    """The message that tells sites the method."""
    return federation_pb2.Method(**{**method.model_dump(), "item_type": ITEM_TYPES[method.item_type]})


def method_from_message(message: federation_pb2.Method) -> Method:
    """The method that a message tells.

    Raises:
        pydantic.ValidationError: a value out of range.
    """
    names: dict[int, ItemType] = {number: name for name, number in ITEM_TYPES.items()}
    values = {name: getattr(message, name) for name in Method.model_fields}
    return Method(**{**values, "item_type": names.get(message.item_type, message.item_type)})


def generator_to_wire(generator: MemoryGenerator) -> list[WireArray]:
    """A memory generator's parameters, one array each, in float32."""
    return [
        encode(name, value.reshape(value.shape or (1,)).cpu().numpy()) for name, value in generator.state_dict().items()
    ]


def generator_from_wire(space: FeatureSpace, arrays: Iterable[tuple[Array, bytes]]) -> MemoryGenerator:
    """A memory generator from its arrays.

    Raises:
        Refusal: INVALID_ARGUMENT for parameters that do not fit the feature space or are not finite.
    """
    generator = MemoryGenerator(space.channels, space.grid)
    expected = generator.state_dict()
    state = {}
    for manifest, data in arrays:
        value = torch.from_numpy(decode(manifest, data))
        want = expected.get(manifest.name)
        if want is None or value.numel() != want.numel() or not bool(value.isfinite().all()):
            raise invalid(f"memory generator: parameter {manifest.name!r} of shape {list(manifest.shape)} does not fit")
        state[manifest.name] = value.reshape(want.shape)
    if state.keys() != expected.keys():
        raise invalid(f"memory generator: parameters {sorted(expected.keys() - state.keys())} are missing")
    generator.load_state_dict(state)
    return generator.eval().requires_grad_(False)
