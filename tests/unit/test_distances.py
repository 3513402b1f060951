"""Distances to items: those of the definition, in blocks of any size."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from feddymem import distances
from feddymem.distances import nearest_items, squared_distances, squared_lengths

Points = NDArray[np.float32]
ROWS = (1, 3, 20, 100)


def points_and_items() -> tuple[Points, Points, NDArray[np.float64]]:
    """Points, items, and the squared distances between them."""
    rng = np.random.default_rng(0)
    points, items = rng.normal(size=(20, 5)).astype(np.float32), rng.normal(size=(7, 5)).astype(np.float32)
    return points, items, ((points[:, None].astype(np.float64) - items[None]) ** 2).sum(-1)


def blocks_of(rows: int, items: Points) -> mock._patch[int]:
    return mock.patch.object(distances, "_DISTANCE_BYTES", 4 * len(items) * rows)


@pytest.mark.parametrize("rows", ROWS)
def test_nearest_items_gives_distance_and_index(rows: int) -> None:
    points, items, squared = points_and_items()
    with blocks_of(rows, items):
        found, indices = nearest_items(torch.from_numpy(points), torch.from_numpy(items))
    assert indices.tolist() == squared.argmin(1).tolist()
    np.testing.assert_allclose(found.numpy(), np.sqrt(squared.min(1)), rtol=1e-4)


def test_distances_of_points_far_from_the_origin_to_themselves_are_never_negative() -> None:
    points = torch.full((4, 3), 1e4) + torch.arange(4)[:, None]
    assert (squared_distances(points, (points * points).sum(1), points) >= 0).all()
    assert (nearest_items(points, points)[0] >= 0).all()


@pytest.mark.parametrize("rows", ROWS)
def test_squared_lengths_are_the_same_in_parts_of_any_size(rows: int) -> None:
    points, _, _ = points_and_items()
    with mock.patch.object(distances, "_ROWS", rows):
        found = squared_lengths(torch.from_numpy(points))
    np.testing.assert_allclose(found.numpy(), (points.astype(np.float64) ** 2).sum(1), rtol=1e-6)


def test_squared_lengths_of_no_points_are_none() -> None:
    assert squared_lengths(torch.zeros(0, 5)).shape == (0,)
