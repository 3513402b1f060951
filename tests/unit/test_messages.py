"""The library's values as messages: what goes in comes out, and what does not fit is refused."""

from __future__ import annotations

import dataclasses
import math

import grpc
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from feddymem.calibration import Calibration, SiteCalibration, site_key
from feddymem.generator import MemoryGenerator
from feddymem.hold_out import MOST
from feddymem.method import Method
from feddymem.sketch import MAX_LEVEL, ScoreSketch
from feddymem.v1.calibration_pb2 import CalibratedSite
from services.runtime.arrays import encode
from services.runtime.errors import Refusal
from services.runtime.messages import (
    calibration_from_message,
    calibration_to_message,
    feature_space_from_message,
    feature_space_to_message,
    generator_from_wire,
    generator_to_wire,
    method_from_message,
    method_to_message,
    site_calibration_from_message,
    site_calibration_to_message,
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


def site_calibration(*scores: float) -> SiteCalibration:
    return SiteCalibration(ScoreSketch.of(scores), ScoreSketch.of(2 * score for score in scores))


CALIBRATION = Calibration.of(
    {
        site_key("parts", "north"): site_calibration(1, 1.5, 2),
        site_key("parts", "south"): SiteCalibration(),
    },
    0.02,
)


def test_a_calibration_comes_back_with_the_same_verdicts() -> None:
    got = calibration_from_message(calibration_to_message(CALIBRATION))
    assert got.rate == CALIBRATION.rate
    assert (got.scores.sites, got.peaks.sites) == (CALIBRATION.scores.sites, CALIBRATION.peaks.sites)
    for site in ("north", "south", "unknown"):
        want = CALIBRATION.scores.limit(site_key("parts", site), CALIBRATION.rate)
        limit = got.scores.limit(site_key("parts", site), got.rate)
        assert limit is not None
        assert want is not None
        assert (limit.threshold, limit.rate, limit.basis) == (want.threshold, want.rate, want.basis)


def test_a_calibration_names_no_site() -> None:
    assert b"north" not in calibration_to_message(CALIBRATION).SerializeToString()
    assert site_key("parts", "north") != site_key("part", "snorth")


@pytest.mark.parametrize("rate", [0, 1, -0.1, math.nan, math.inf])
def test_a_calibration_with_a_rate_that_is_none_is_refused(rate: float) -> None:
    message = calibration_to_message(CALIBRATION)
    message.false_alarm_rate = rate
    with pytest.raises(Refusal, match="false_alarm_rate"):
        calibration_from_message(message)


@pytest.mark.parametrize("site", [b"", b"north", bytes.fromhex(site_key("parts", "north"))])
def test_a_calibration_of_a_site_that_is_named_wrongly_or_twice_is_refused(site: bytes) -> None:
    message = calibration_to_message(CALIBRATION)
    message.sites.append(CalibratedSite(site_sha256=site))
    with pytest.raises(Refusal, match="each needs a SHA-256 of its own"):
        calibration_from_message(message)


@pytest.mark.parametrize(
    ("levels", "counts"),
    [([1], []), ([], [1]), ([2, 1], [1, 1]), ([1, 1], [1, 1]), ([MAX_LEVEL + 1], [1]), ([1], [0]), ([1], [MOST + 1])],
)
def test_a_sketch_that_no_scores_make_is_refused(levels: list[int], counts: list[int]) -> None:
    message = site_calibration_to_message(SiteCalibration())
    for sketch in (message.scores, message.peaks):
        sketch.levels.extend(levels)
        sketch.counts.extend(counts)
    with pytest.raises(Refusal, match="calibration: ") as caught:
        site_calibration_from_message(message)
    assert caught.value.status == grpc.StatusCode.INVALID_ARGUMENT


def test_scores_and_peaks_are_of_the_same_images() -> None:
    message = site_calibration_to_message(SiteCalibration(ScoreSketch.of([1, 2]), ScoreSketch.of([1])))
    with pytest.raises(Refusal, match="scores are of 2 images and peaks of 1"):
        site_calibration_from_message(message)
