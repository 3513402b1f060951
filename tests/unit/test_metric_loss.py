"""The metric loss: nothing where all is well, else a pull to the nearest items and a push from the next ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from feddymem.metric_loss import ATTRACTED, MARGIN, REPELLED, metric_loss

FAR = 100.0


def items_at(*places: float) -> Tensor:
    """Items on a line in the plane."""
    return torch.tensor([[place, 0.0] for place in places])


def patch_at(place: float) -> Tensor:
    return torch.tensor([[place, 0.0]], requires_grad=True)


def pull(patch: Tensor, items: Tensor, radius: float) -> float:
    """Where one step down the gradient moves a patch on the line."""
    (gradient,) = torch.autograd.grad(metric_loss(patch, items, radius), patch)
    return -float(gradient[0, 0])


@pytest.mark.parametrize("place", [0.0, 0.5, -0.99])
def test_it_is_zero_inside_the_radius_with_the_other_items_far(place: float) -> None:
    items = items_at(0, 0, 0, FAR, FAR, FAR)
    assert metric_loss(patch_at(place), items, radius=1.0).item() == 0


def test_a_patch_outside_the_radius_is_pulled_to_its_nearest_items() -> None:
    items = items_at(0, 0, 0, -FAR, -FAR, -FAR)
    assert metric_loss(patch_at(3.0), items, radius=1.0).item() == pytest.approx(3**2 - 1)
    assert pull(patch_at(3.0), items, radius=1.0) < 0
    assert pull(patch_at(-3.0), items, radius=1.0) > 0


def test_a_patch_is_pushed_from_the_next_items_within_the_radius() -> None:
    items = items_at(0, 0, 0, 1, 1, 1)
    assert metric_loss(patch_at(0.2), items, radius=1.0).item() == pytest.approx(1 + MARGIN - 0.8**2, rel=1e-5)
    assert pull(patch_at(0.2), items, radius=1.0) < 0


def test_the_next_items_need_not_be_farther_than_the_margin() -> None:
    edge = (1 + MARGIN) ** 0.5
    assert metric_loss(patch_at(0.0), items_at(0, 0, 0, edge + 0.01, FAR, FAR), radius=1.0).item() == 0
    assert metric_loss(patch_at(0.0), items_at(0, 0, 0, edge - 0.01, FAR, FAR), radius=1.0).item() > 0


def test_items_beyond_attracted_and_repelled_ones_do_not_matter() -> None:
    near = items_at(*[0.5] * ATTRACTED, *[0.9] * REPELLED)
    with_more = torch.cat([near, items_at(1.0, 5.0, FAR)])
    torch.testing.assert_close(metric_loss(patch_at(0), with_more, 0.3), metric_loss(patch_at(0), near, 0.3))


def test_it_is_the_mean_over_patches() -> None:
    items, places = items_at(0, 0, 0, -FAR, -FAR, -FAR), (0.5, 2.0, 3.0)
    one_by_one = [metric_loss(patch_at(place), items, 1.0).item() for place in places]
    together = metric_loss(torch.cat([patch_at(place) for place in places]), items, 1.0)
    assert together.item() == pytest.approx(np.mean(one_by_one))


@pytest.mark.parametrize("count", [ATTRACTED + 1, ATTRACTED + REPELLED - 1])
def test_fewer_items_than_it_looks_at_are_enough(count: int) -> None:
    patch = patch_at(5.0)
    assert np.isfinite(pull(patch, items_at(*range(count)), radius=1.0))


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(0.1, 10))
def test_it_is_in_units_of_the_radius(seed: int, scale: float, radius: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    patches, items = torch.randn(5, 3, generator=rng), torch.randn(9, 3, generator=rng)
    torch.testing.assert_close(
        metric_loss(scale * patches, scale * items, scale * radius),
        metric_loss(patches, items, radius),
        rtol=1e-2,
        atol=1e-3,
    )


@given(st.integers(0, 1000), st.floats(1e-3, 1e3), st.integers(ATTRACTED + 1, 12))
def test_loss_and_gradients_are_finite_and_the_loss_is_never_negative(seed: int, radius: float, count: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    items = torch.randn(count, 4, generator=rng)
    patches = torch.cat([items, torch.randn(6, 4, generator=rng)]).requires_grad_(True)
    loss = metric_loss(patches, items, radius)
    (gradient,) = torch.autograd.grad(loss, patches)
    assert loss.item() >= 0
    assert bool(gradient.isfinite().all())


def test_it_is_that_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    patches, items, radius = rng.normal(size=(7, 4)), rng.normal(size=(20, 4)), 0.9
    squared = np.sort(((patches[:, None] - items[None]) ** 2).sum(-1), axis=1) / radius**2
    attract = np.maximum(squared[:, :ATTRACTED] - 1, 0).mean()
    repel = np.maximum(1 + MARGIN - squared[:, ATTRACTED : ATTRACTED + REPELLED], 0).mean()
    loss = metric_loss(torch.from_numpy(patches).float(), torch.from_numpy(items).float(), radius)
    assert loss.item() == pytest.approx(attract + repel, rel=1e-4)
