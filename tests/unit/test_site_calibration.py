"""What a site tells of a candidate is what the library finds, with the candidate and with what it comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from feddymem.backbone import FeatureExtractor
from feddymem.generator import MemoryGenerator
from feddymem.hold_out import calibrate
from feddymem.memory import MemoryBank
from feddymem.patches import PatchArray
from feddymem.progress import no_progress
from feddymem.scoring import Scorer
from services.edge_client.calibration import calibration_of
from services.runtime.messages import site_calibration_from_message


def memory(extractor: FeatureExtractor, seed: int) -> MemoryBank:
    items = np.random.default_rng(seed).normal(size=(30, extractor.feature_space.channels)).astype(np.float32)
    return MemoryBank(items, np.ones((30, 1), np.float32), np.ones(30, np.float32))


def held_out(extractor: FeatureExtractor, images: int = 6) -> PatchArray:
    space = extractor.feature_space
    return PatchArray(np.random.default_rng(9).normal(size=(images, space.patches, space.channels)).astype(np.float32))


@pytest.mark.parametrize("with_generator", [False, True])
def test_both_memories_are_scored_as_the_library_does(small: FeatureExtractor, with_generator: bool) -> None:
    generator = None
    if with_generator:
        torch.manual_seed(0)
        generator = MemoryGenerator(small.feature_space.channels, small.feature_space.grid, scale=2).eval()
        generator.requires_grad_(False).outer.bias.fill_(0.5)  # a new one is the identity
    candidate, base, images = memory(small, 1), memory(small, 2), held_out(small)
    said = calibration_of(small, candidate, base, generator, images, no_progress)
    found = site_calibration_from_message(said.candidate), site_calibration_from_message(said.base)
    assert found == tuple(calibrate(Scorer(small, each, generator), images) for each in (candidate, base))
    assert (len(found[0].scores), len(found[1].peaks)) == (6, 6)
    assert found[0] != found[1]
    as_without = calibration_of(small, candidate, base, None, images, no_progress)
    assert (said.candidate != as_without.candidate, said.base != as_without.base) == (with_generator,) * 2


@pytest.mark.parametrize("has_base", [False, True])
def test_without_held_out_images_sketches_are_empty_and_there_all_the_same(
    small: FeatureExtractor, has_base: bool
) -> None:
    said = calibration_of(small, memory(small, 1), memory(small, 2) if has_base else None, None, None, no_progress)
    assert (said.HasField("candidate"), said.HasField("base")) == (True, has_base)
    assert len(site_calibration_from_message(said.candidate).scores) == 0


def test_the_service_can_stop_while_images_are_scored(small: FeatureExtractor) -> None:
    def stop(_what: str, _done: int, _total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        calibration_of(small, memory(small, 1), None, None, held_out(small), stop)
