"""How long images would wait is told from how fast batches are done."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.pace import Pace

SECONDS = st.floats(0, 1000, allow_subnormal=False)


def paced(batches: Sequence[tuple[float, float, int]], max_delay: float = 0.0) -> Pace:
    """The pace of batches, each from when to when and of how many images."""
    pace = Pace(max_delay)
    for started, done, images in batches:
        pace.note(started, done, images)
    return pace


def test_under_load_it_comes_to_what_an_image_takes() -> None:
    pace = paced([(number, number + 1, 4) for number in range(100)])
    assert pace.seconds(8) == pytest.approx(2, rel=1e-3)


def test_what_passes_between_batches_is_nobodys_time_but_for_the_delay_that_they_wait() -> None:
    seldom = [(1000.0 * number, 1000.0 * number + 1, 1) for number in range(1, 100)]
    assert paced(seldom).seconds(1) == pytest.approx(1, rel=1e-3)
    assert paced(seldom, max_delay=0.5).seconds(1) == pytest.approx(1.5, rel=1e-3)


@given(st.lists(st.tuples(SECONDS, SECONDS, st.integers(1, 8)), max_size=20))
def test_batches_that_are_noted_in_any_order_never_take_less_than_no_time(
    batches: list[tuple[float, float, int]],
) -> None:
    pace = paced([(min(one, other), max(one, other), images) for one, other, images in batches])
    assert pace.seconds(1) >= 0
