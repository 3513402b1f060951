"""Figures of detection quality."""

from __future__ import annotations

import math

import numpy as np
import pytest

from feddymem.evaluation import auroc, mean

LABELS = np.array([False, False, False, True, True])


def test_perfect_scores_give_one() -> None:
    assert auroc(LABELS, np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == 1


def test_scores_the_wrong_way_round_give_zero() -> None:
    assert auroc(LABELS, np.array([5.0, 4.0, 3.0, 2.0, 1.0])) == 0


def test_scores_that_say_nothing_give_a_half() -> None:
    assert auroc(LABELS, np.zeros(5)) == 0.5


def test_it_is_the_share_of_pairs_in_the_right_order_with_ties_counted_half() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.random(60) < 0.4, rng.integers(0, 12, 60).astype(np.float32)
    good, defect = scores[~labels][:, None], scores[labels][None]
    pairs = (defect > good).mean() + 0.5 * (defect == good).mean()
    assert auroc(labels, scores) == pytest.approx(pairs)


@pytest.mark.parametrize("label", [True, False])
def test_one_kind_of_image_alone_gives_nan(label: bool) -> None:
    assert math.isnan(auroc(np.full(4, label), np.arange(4.0)))


def test_the_mean_over_sites() -> None:
    assert mean([0.5, 1.0, 0.75]) == pytest.approx(0.75)


def test_the_mean_is_nan_where_a_site_has_none() -> None:
    assert math.isnan(mean([0.5, math.nan]))
