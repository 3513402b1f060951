"""Anomaly maps: smooth, and in colours."""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest

from feddymem import maps
from feddymem.images import decode
from feddymem.maps import HeatScale, anomaly_map, coloured, heatmap_png


def test_a_map_is_smoothed_by_a_gaussian_of_three_quarters_of_a_patch() -> None:
    impulse = np.zeros((9, 9), np.float32)
    impulse[4, 4] = 1
    kernel = np.exp(-0.5 * (np.arange(-4, 5) / 0.75) ** 2)
    kernel /= kernel.sum()
    np.testing.assert_allclose(anomaly_map(impulse, (9, 9)), np.outer(kernel, kernel), atol=2e-3)


def test_beyond_a_map_s_border_its_outermost_patches_go_on() -> None:
    distances = np.random.default_rng(0).uniform(0, 5, (9, 9)).astype(np.float32)
    larger = anomaly_map(np.pad(distances, 4, mode="edge"), (17, 17))
    np.testing.assert_allclose(anomaly_map(distances, (9, 9)), larger[4:-4, 4:-4], rtol=1e-5)


def test_colours_are_turbo_from_zero_to_the_full_scale() -> None:
    turbo = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[None], cv2.COLORMAP_TURBO)[0, :, ::-1]
    distances = np.array([[-1, 0, 2.5, 4.999, 5, 50, np.inf]], np.float32)
    colours = coloured(distances, HeatScale(0, 5))
    assert colours.dtype == np.uint8
    np.testing.assert_array_equal(colours[0], turbo[[0, 0, 127, 254, 255, 255, 255]])


def test_the_colours_of_a_scale_that_starts_above_zero_are_spread_from_its_first_to_its_last() -> None:
    turbo = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[None], cv2.COLORMAP_TURBO)[0, :, ::-1]
    distances = np.array([[0, 3, 4, 5, 9]], np.float32)
    np.testing.assert_array_equal(decode(heatmap_png(distances, HeatScale(3, 5)))[0], turbo[[0, 0, 127, 255, 255]])


@pytest.mark.parametrize("typical", [0.5, 3.0])
def test_a_heatmap_has_the_colours_of_its_scale(typical: float) -> None:
    distances = np.random.default_rng(0).uniform(0, 15, (6, 9)).astype(np.float32)
    scale = HeatScale.of_memory(typical)
    assert scale == HeatScale(0, 4 * typical)
    np.testing.assert_array_equal(decode(heatmap_png(distances, scale)), coloured(distances, scale))


@pytest.mark.parametrize("band", [1, 20, 27, 53, 54, 1000])
def test_a_heatmap_is_the_same_in_bands(monkeypatch: pytest.MonkeyPatch, band: int) -> None:
    distances = np.random.default_rng(0).uniform(0, 5, (6, 9)).astype(np.float32)
    monkeypatch.setattr(maps, "_BAND_PIXELS", band)
    np.testing.assert_array_equal(decode(heatmap_png(distances, HeatScale(0, 4))), coloured(distances, HeatScale(0, 4)))


def test_a_large_heatmap_takes_less_memory_than_its_map() -> None:
    distances = np.zeros((4000, 4000), np.float32)
    tracemalloc.start()
    try:
        heatmap_png(distances, HeatScale(0, 4))
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < distances.nbytes / 2
