"""The memory generator: the identity until it is trained, then a map of each patch on its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feddymem.generator import MemoryGenerator

CHANNELS, GRID = 6, 4


def features(images: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(images, GRID * GRID, CHANNELS, generator=torch.Generator().manual_seed(seed))


def trained(seed: int = 0) -> MemoryGenerator:
    """As if trained: the outer layer is no longer zero."""
    rng = torch.Generator().manual_seed(seed)
    generator = MemoryGenerator(CHANNELS, GRID, scale=0.7).requires_grad_(False)
    for parameter in generator.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=rng))
    return generator


@given(st.floats(1e-3, 1e3), st.integers(0, 10))
def test_an_untrained_generator_is_exactly_the_identity(scale: float, seed: int) -> None:
    patches = features(seed=seed)
    torch.testing.assert_close(MemoryGenerator(CHANNELS, GRID, scale)(patches), patches, rtol=0, atol=0)


def test_a_trained_generator_is_not_the_identity() -> None:
    assert not torch.allclose(trained()(features()), features(), atol=0.1)


def test_a_patch_is_mapped_on_its_own() -> None:
    generator, patches = trained(), features()
    changed = patches.clone()
    changed[1, 5] += 1
    moved = (generator(changed) - generator(patches)).abs().sum(-1) > 0
    assert moved.nonzero().tolist() == [[1, 5]]


def test_the_same_feature_is_mapped_by_its_place_in_the_image() -> None:
    same = torch.ones(1, GRID * GRID, CHANNELS)
    mapped = trained()(same)[0]
    assert len(torch.unique(mapped, dim=0)) == GRID * GRID


def test_scaled_features_are_mapped_alike() -> None:
    """The network sees features in units of the scale."""
    small, large = trained(), trained()
    large.scale.mul_(100)
    torch.testing.assert_close(large(100 * features()), 100 * small(features()), rtol=1e-4, atol=1e-3)


def test_its_state_holds_what_was_trained_and_the_scale() -> None:
    generator, other = trained(), MemoryGenerator(CHANNELS, GRID)
    other.load_state_dict(generator.state_dict())
    torch.testing.assert_close(other(features()), generator(features()), rtol=0, atol=0)
    assert sorted(generator.state_dict()) == ["inner.bias", "inner.weight", "outer.bias", "outer.weight", "scale"]


def test_gradients_reach_every_parameter_once_the_outer_layer_has_moved() -> None:
    generator = trained().requires_grad_(True)
    parameters = dict(generator.named_parameters())
    gradients = torch.autograd.grad(generator(features()).square().sum(), list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        assert bool(gradient.isfinite().all()), name
        assert bool(gradient.any()), name


@pytest.mark.parametrize("images", [1, 3])
def test_the_shape_is_kept(images: int) -> None:
    assert trained()(features(images)).shape == (images, GRID * GRID, CHANNELS)
