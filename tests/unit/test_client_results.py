from __future__ import annotations

import dataclasses
import io

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from feddymem.client import InspectionResult, Region, Verdict
from feddymem.client.results import from_response
from feddymem.images import ImageError
from feddymem.maps import HeatScale, heatmap_png
from feddymem.v1 import inspection_pb2
from feddymem.v1.inspection_pb2 import AnomalyMap, InspectResponse

PICTURE = np.full((40, 60, 3), 100, np.uint8)


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def result(**changes: object) -> InspectionResult:
    plain = from_response(InspectResponse(score=1.5, federation="bricks", site="a", release=2))
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_a_plain_response_has_no_verdict_map_or_regions() -> None:
    plain = result()
    assert (plain.score, plain.federation, plain.site, plain.release) == (1.5, "bricks", "a", 2)
    assert (plain.verdict, plain.regions, plain.anomaly_map, plain.heatmap) == (None, (), None, None)


def test_verdict_regions_and_seconds_are_taken_over() -> None:
    region = inspection_pb2.Region(top=1, left=2, height=3, width=4, area=5, peak=0.5)
    taken = from_response(
        InspectResponse(
            verdict=inspection_pb2.VERDICT_ANOMALOUS, regions=[region], queue_seconds=0.25, compute_seconds=0.5
        )
    )
    assert taken.verdict is Verdict.ANOMALOUS
    assert taken.regions == (Region(top=1, left=2, height=3, width=4, area=5, peak=0.5),)
    assert (taken.queue_seconds, taken.compute_seconds) == (0.25, 0.5)
    normal = from_response(InspectResponse(verdict=inspection_pb2.VERDICT_NORMAL))
    assert normal.verdict is Verdict.NORMAL


def test_a_result_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        result().score = 3.0  # type: ignore[misc]


def test_an_anomaly_map_is_an_array() -> None:
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    answer = AnomalyMap(format=inspection_pb2.MAP_FORMAT_FLOAT32, height=2, width=3, data=values.tobytes())
    taken = from_response(InspectResponse(map=answer)).anomaly_map
    assert taken is not None
    assert taken.dtype == np.float32
    np.testing.assert_array_equal(taken, values)


def test_a_heatmap_is_decoded_to_colours() -> None:
    answer = AnomalyMap(format=inspection_pb2.MAP_FORMAT_PNG, height=40, width=60, data=png(PICTURE))
    taken = from_response(InspectResponse(map=answer))
    assert taken.anomaly_map is None
    assert taken.heatmap is not None
    np.testing.assert_array_equal(taken.heatmap, PICTURE)


def test_an_overlay_is_a_mixture_of_image_and_heatmap() -> None:
    heat = np.zeros_like(PICTURE)
    heat[10:20, 5:50, 0] = 200
    drawn = result(heatmap_png=png(heat)).overlay(PICTURE)
    assert drawn.dtype == np.uint8
    assert drawn.shape == PICTURE.shape
    assert tuple(drawn[0, 0]) == (60, 60, 60)
    assert tuple(drawn[15, 10]) == (140, 60, 60)
    assert (PICTURE == 100).all()


@given(
    top=st.integers(0, 39), left=st.integers(0, 59), height=st.integers(1, 40), width=st.integers(1, 60), data=st.data()
)
def test_regions_are_framed_where_they_are(top: int, left: int, height: int, width: int, data: st.DataObject) -> None:
    height, width = min(height, 40 - top), min(width, 60 - left)
    drawn = result(regions=(Region(top, left, height, width, area=1, peak=1.0),)).overlay(PICTURE)
    changed = (drawn != PICTURE).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max()) == (top, top + height - 1)
    assert (columns.min(), columns.max()) == (left, left + width - 1)


def test_an_overlay_takes_whatever_can_be_inspected() -> None:
    region = (Region(0, 0, 5, 5, 25, 1.0),)
    expected = result(regions=region).overlay(PICTURE)
    for image in (png(PICTURE), PIL.Image.fromarray(PICTURE), PICTURE[:, :, 0], PICTURE.astype(np.uint16) * 257):
        np.testing.assert_array_equal(result(regions=region).overlay(image), expected)
    with pytest.raises(ImageError):
        result().overlay(b"no image")


def test_a_heatmap_of_another_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(40, 60\).*\(20, 30\)"):
        result(heatmap_png=png(PICTURE)).overlay(PICTURE[:20, :30])


def test_an_anomaly_map_is_drawn_on_the_scale_given_never_its_own() -> None:
    distances = np.zeros((8, 8), np.float32)
    distances[:, 4:] = 2.0
    mapped = result(anomaly_map=distances)
    far, near = mapped.overlay(PICTURE, full_scale=2.0), mapped.overlay(PICTURE, full_scale=20.0)
    assert far.shape == PICTURE.shape
    np.testing.assert_array_equal(far[:, 0], near[:, 0])
    assert (far[:, -1] != near[:, -1]).any()
    for scale in (None, 0.0, -1.0):
        with pytest.raises(ValueError, match="full_scale"):
            mapped.overlay(PICTURE, full_scale=scale)


def test_heat_of_distances_has_the_colours_of_the_services_heatmaps() -> None:
    distances = np.linspace(0, 8, PICTURE.shape[0] * PICTURE.shape[1], dtype=np.float32).reshape(PICTURE.shape[:2])
    of_floats = result(anomaly_map=distances).overlay(PICTURE, full_scale=8.0)
    of_png = result(heatmap_png=heatmap_png(distances, HeatScale.of_memory(2.0))).overlay(PICTURE)
    np.testing.assert_array_equal(of_floats, of_png)
