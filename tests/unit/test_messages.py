"""The library's values as messages: what goes in comes out, and what does not fit is refused."""

from __future__ import annotations

import dataclasses
import math

import grpc
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from feddymem.generator import MemoryGenerator
from feddymem.method import Method
from services.runtime.arrays import encode
from services.runtime.errors import Refusal
from services.runtime.messages import (
    feature_space_from_message,
    feature_space_to_message,
    generator_from_wire,
    generator_to_wire,
    method_from_message,
    method_to_message,
)
from tests import feature_spaces

SPACE = dataclasses.replace(
    feature_spaces.SPACE,
    mean=(123.0, 116.5, float(np.float32(0.406 * 255))),
    std=(58.0, 57.0, float(np.float32(0.225 * 255))),
    channels=6,
)


def trained() -> MemoryGenerator:
    rng = torch.Generator().manual_seed(0)
    generator = MemoryGenerator(SPACE.channels, SPACE.grid, scale=0.3).requires_grad_(False)
    for parameter in generator.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=rng))
    return generator


def test_a_feature_space_comes_back_with_its_fingerprint() -> None:
    got = feature_space_from_message(feature_space_to_message(SPACE))
    assert got == SPACE
    assert got.fingerprint == SPACE.fingerprint


@pytest.mark.parametrize(
    ("field", "value"), [("backbone", "resnet50"), ("input_size", 96), ("grid", 5), ("fingerprint", "00" * 32)]
)
def test_a_feature_space_whose_fingerprint_is_not_its_own_is_refused(field: str, value: object) -> None:
    message = feature_space_to_message(SPACE)
    setattr(message, field, value)
    with pytest.raises(Refusal, match="is not that of its fields") as caught:
        feature_space_from_message(message)
    assert caught.value.status == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("field", ["mean", "std"])
def test_a_feature_space_without_three_colours_is_refused(field: str) -> None:
    message = feature_space_to_message(SPACE)
    getattr(message, field).pop()
    with pytest.raises(Refusal, match="three values each"):
        feature_space_from_message(message)


@pytest.mark.parametrize(
    "method",
    [
        Method(),
        Method(generator=True, metric_loss=False, memory_reduce=False, item_type="float16"),
        Method(bank_items=1, memory_items=1_048_576, rounds=1_000, seed=2**63 - 1),
    ],
)
def test_a_method_comes_back(method: Method) -> None:
    assert method_from_message(method_to_message(method)) == method


@pytest.mark.parametrize(("field", "value"), [("rounds", 0), ("bank_items", 2**31), ("item_type", 0), ("item_type", 2)])
def test_a_method_out_of_range_is_refused(field: str, value: int) -> None:
    message = method_to_message(Method())
    setattr(message, field, value)
    with pytest.raises(ValidationError, match=field):
        method_from_message(message)


def test_a_generator_comes_back() -> None:
    sent = trained()
    got = generator_from_wire(SPACE, ((wire.manifest, wire.data) for wire in generator_to_wire(sent)))
    torch.testing.assert_close(got.state_dict(), sent.state_dict(), rtol=0, atol=0)
    features = torch.randn(2, SPACE.patches, SPACE.channels, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(got(features), sent(features), rtol=0, atol=0)
    assert not got.training
    assert not any(parameter.requires_grad for parameter in got.parameters())


@pytest.mark.parametrize("name", sorted(trained().state_dict()))
def test_a_generator_with_a_parameter_missing_is_refused(name: str) -> None:
    wires = [wire for wire in generator_to_wire(trained()) if wire.manifest.name != name]
    with pytest.raises(Refusal, match=rf"parameters \['{name}'\] are missing") as caught:
        generator_from_wire(SPACE, ((wire.manifest, wire.data) for wire in wires))
    assert caught.value.status == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("name", ["outer.bias", "optimizer.step"])
@pytest.mark.parametrize("size", [5, 7])
def test_a_generator_with_a_parameter_that_does_not_fit_is_refused(name: str, size: int) -> None:
    wires = {wire.manifest.name: wire for wire in generator_to_wire(trained())}
    wires[name] = encode(name, np.ones(size, np.float32))
    with pytest.raises(Refusal, match=rf"'{name}' of shape \[{size}\] does not fit"):
        generator_from_wire(SPACE, ((wire.manifest, wire.data) for wire in wires.values()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_generator_that_is_not_finite_is_not_sent(value: float) -> None:
    generator = trained()
    generator.outer.bias[0] = value
    with pytest.raises(ValueError, match=r"outer\.bias"):
        generator_to_wire(generator)
