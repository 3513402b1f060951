"""The library's values as messages, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from feddymem.calibration import Calibration, SiteCalibration, site_key
from feddymem.feature_space import FeatureSpace
from feddymem.generator import MemoryGenerator
from feddymem.hold_out import MOST
from feddymem.method import ItemType, Method
from feddymem.sketch import InvalidSketchError, ScoreSketch
from feddymem.v1 import calibration_pb2, feature_space_pb2, federation_pb2
from feddymem.v1.array_pb2 import Array
from services.runtime.arrays import ITEM_TYPES, WireArray, decode, encode, items_of
from services.runtime.errors import invalid

_SITE_KEY_DIGITS = len(site_key("", ""))


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


def candidate_items(state: federation_pb2.WatchRoundsResponse) -> bytes:
    """What tells the candidate of a round from another one of it: SHA-256 of its items; empty for none."""
    return items_of(state.candidate.arrays).sha256


def site_calibration_to_message(calibration: SiteCalibration) -> calibration_pb2.SiteCalibration:
    """The message that tells how a site's held-out images are scored."""
    return calibration_pb2.SiteCalibration(
        scores=_sketch_to_message(calibration.scores), peaks=_sketch_to_message(calibration.peaks)
    )


def site_calibration_from_message(message: calibration_pb2.SiteCalibration) -> SiteCalibration:
    """How a site's held-out images are scored, from its message.

    Raises:
        Refusal: INVALID_ARGUMENT for sketches that no images make, or of different numbers of images, or of too many.
    """
    scores, peaks = _sketch_from_message(message.scores), _sketch_from_message(message.peaks)
    if len(scores) != len(peaks) or len(scores) > MOST:
        raise invalid(
            f"calibration: scores are of {len(scores)} images and peaks of {len(peaks)}; expected as many of both, "
            f"{MOST} at most"
        )
    return SiteCalibration(scores, peaks)


def calibration_to_message(calibration: Calibration) -> calibration_pb2.Calibration:
    """The message that carries a calibration; its sites are by `site_key`."""
    peaks = calibration.peaks.sites
    return calibration_pb2.Calibration(
        false_alarm_rate=calibration.rate,
        sites=[
            calibration_pb2.CalibratedSite(
                site_sha256=bytes.fromhex(key),
                calibration=site_calibration_to_message(SiteCalibration(scores, peaks[key])),
            )
            for key, scores in sorted(calibration.scores.sites.items())
        ],
    )


def calibration_from_message(message: calibration_pb2.Calibration) -> Calibration:
    """A calibration from its message; its sites are by `site_key`.

    Raises:
        Refusal: INVALID_ARGUMENT as above, or for a rate that is none, or a site that is named wrongly or twice.
    """
    if not 0 < message.false_alarm_rate < 1:
        raise invalid(f"calibration: false_alarm_rate is {message.false_alarm_rate}; expected above 0 and below 1")
    sites = {each.site_sha256.hex(): site_calibration_from_message(each.calibration) for each in message.sites}
    if len(sites) < len(message.sites) or any(len(key) != _SITE_KEY_DIGITS for key in sites):
        raise invalid(
            f"calibration: {len(message.sites)} sites are named by {sorted(sites)}; each needs a SHA-256 of its own"
        )
    return Calibration.of(sites, message.false_alarm_rate)


def _sketch_to_message(sketch: ScoreSketch) -> calibration_pb2.ScoreSketch:
    return calibration_pb2.ScoreSketch(levels=sketch.levels, counts=sketch.counts)


def _sketch_from_message(message: calibration_pb2.ScoreSketch) -> ScoreSketch:
    try:
        return ScoreSketch(tuple(message.levels), tuple(message.counts))
    except InvalidSketchError as error:
        raise invalid(f"calibration: {error}") from error
