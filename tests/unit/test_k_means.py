"""K-means: cells and distances are those of the centroids, and its arithmetic is that of this processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from feddymem.k_means import k_means


@pytest.mark.parametrize("channels", [6, 152])  # of few faiss does not ask its BLAS
@pytest.mark.parametrize("weighted", [False, True])
def test_each_item_is_in_the_cell_of_the_nearest_centroid_and_each_centroid_is_the_mean_of_its_cell(
    weighted: bool, channels: int
) -> None:
    rng = np.random.default_rng(0)
    items = (rng.normal(size=(300, channels)) + 20 * rng.integers(0, 5, (300, 1))).astype(np.float32)
    weights = rng.integers(1, 9, 300).astype(np.float32) if weighted else None
    found = k_means(items, items[:5], 30, seed=0, weights=weights)
    squared = ((items[:, None] - found.centroids[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(found.cells, squared.argmin(1))
    np.testing.assert_allclose(found.squared, squared.min(1), rtol=1e-4, atol=1e-6 * float((items**2).sum(1).max()))
    for number, centroid in enumerate(found.centroids):
        mine = found.cells == number
        mean = np.average(items[mine], axis=0, weights=None if weights is None else weights[mine])
        np.testing.assert_allclose(centroid, mean, rtol=1e-5, atol=1e-4)


def test_the_same_seed_gives_the_same_clusters_also_where_some_become_empty() -> None:
    rng = np.random.default_rng(1)
    items = rng.normal(size=(40, 3)).astype(np.float32)
    start = np.concatenate([items[:3], np.full((5, 3), 100, np.float32)])
    first, second = (k_means(items, start, 10, seed=7) for _ in range(2))
    np.testing.assert_array_equal(first.centroids, second.centroids)
    assert len(np.unique(first.cells)) > 3


def test_of_a_cluster_of_many_items_all_count() -> None:
    """Faiss by itself takes a sample of 256 items a cluster."""
    items = np.random.default_rng(0).normal(size=(1_500, 3)).astype(np.float32)
    items[::2] += 50
    found = k_means(items, items[:2], 5, seed=0)
    np.testing.assert_allclose(found.centroids, [items[::2].mean(0), items[1::2].mean(0)], rtol=1e-5, atol=1e-5)


def test_faiss_computes_in_as_many_threads_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr("feddymem.k_means.faiss.omp_set_num_threads", told.append)
    items = np.eye(4, dtype=np.float32)
    k_means(items, items[:2], 1, seed=0)
    assert told == [torch.get_num_threads()]


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in {"AVX2", "AVX512"}, reason="another processor")
def test_the_blas_of_faiss_knows_what_this_processor_can_do() -> None:
    """By itself it takes many made since 2021 for a Prescott, of 2004."""
    [blas] = [each for each in threadpool_info() if each["user_api"] == "blas" and "faiss" in each["filepath"]]
    assert blas["architecture"] in {"Haswell", "SkylakeX"}
