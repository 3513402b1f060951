"""Checks of a release: each one fails for what it is there for, says so in words, and for nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from feddymem.hold_out import LEAST
from feddymem.memory import MemoryBank
from feddymem.release_checks import CHECKS, Check, HeldOut, check_release, most_alarms
from feddymem.sketch import ScoreSketch

NORMAL = tuple(40 + score / 2 for score in range(20))


def memory(typical: float = 10.0) -> MemoryBank:
    return MemoryBank(np.ones((4, 3), np.float32), np.ones((4, 1), np.float32), np.full(4, typical, np.float32))


def checks(
    sites: Mapping[str, Sequence[float]],
    base: Mapping[str, Sequence[float]] | None = None,
    of: MemoryBank | str | None = None,
    margin: float = 0.1,
) -> dict[str, Check]:
    held_out = {
        site: HeldOut(ScoreSketch.of(scores), ScoreSketch.of(() if base is None else base[site]))
        for site, scores in sites.items()
    }
    return {check.name: check for check in check_release(of or memory(), held_out, 0.05, margin)}


def failed(found: dict[str, Check]) -> list[str]:
    return [name for name, check in found.items() if not check.passed]


def times(factor: float, scores: Sequence[float] = NORMAL) -> list[float]:
    return [factor * score for score in scores]


def test_an_ordinary_release_passes_all_checks_in_their_order() -> None:
    sites = {"a": NORMAL, "b": times(1.5), "c": times(0.8)}
    found = checks(sites, base=sites)
    assert tuple(found) == CHECKS
    assert failed(found) == []


@pytest.mark.parametrize("sites", [{}, {"a": ()}, {"a": (1.0,)}, {"a": (0.0,) * 9, "b": (), "c": (7.0,) * 3}])
def test_without_or_with_few_or_with_equal_images_there_is_an_answer(sites: dict[str, Sequence[float]]) -> None:
    assert failed(checks(sites)) == []
    assert failed(checks(sites, base=sites)) == []


def test_a_memory_that_cannot_be_read_fails_and_the_reason_is_told() -> None:
    found = checks({"a": NORMAL}, of="3 values of items are NaN or infinite")
    assert failed(found) == ["finite"]
    assert "3 values of items are NaN" in found["finite"].finding


def test_a_site_that_the_memory_does_not_cover_fails_by_name() -> None:
    found = checks({"a": NORMAL, "b": times(3.2), "c": NORMAL})
    assert failed(found) == ["coverage"]
    assert "of b; expected at most 2 times the median of all sites, 44.84" in found["coverage"].finding


def test_of_two_sites_nobody_can_tell_which_one_is_covered() -> None:
    assert failed(checks({"a": NORMAL, "b": times(9)})) == []
    assert failed(checks({"a": NORMAL, "b": times(9), "few": NORMAL[: LEAST - 1]})) == []


def test_sites_whose_images_are_all_equal_are_no_measure_for_the_others() -> None:
    equal = (0.0,) * 10
    assert failed(checks({"a": equal, "b": equal, "c": (15.0,) * 10})) == []
    found = checks({"a": equal, "b": equal, "c": (25.0,) * 10})
    assert failed(found) == ["coverage"]
    assert found["coverage"].finding.endswith("2 times the distance of patches to their items, 10")


def test_spreads_that_a_minority_sends_move_no_check() -> None:
    """A site that says that its patches are far from their items is no measure for the others, either."""
    weights = np.eye(3, dtype=np.float32)
    weights[2] *= 1000
    boasting = MemoryBank(np.ones((3, 3), np.float32), weights, np.array([10, 10, 500], np.float32))
    sites, base = {"a": NORMAL, "b": times(3), "c": NORMAL}, {"a": NORMAL, "b": times(2), "c": NORMAL}
    assert failed(checks(sites, base, of=boasting)) == ["coverage", "not_worse"]


def test_more_alarms_than_rate_and_chance_make_fail() -> None:
    """A site with few images has the others' limit; where its images scatter more than theirs, it has more alarms."""
    others = dict.fromkeys("bcd", (40.0,) * 100)
    scattered = (10.0, 10.0, 10.0, 10.0, 10.0, 90.0, 90.0, 90.0, 90.0, 90.0)
    found = checks({"a": scattered, **others})
    assert failed(found) == ["alarm_rate"]
    assert found["alarm_rate"].finding == "a: 5 alarms of 10 images, expected at most 4"


def test_alarms_are_held_against_the_rate_that_the_limit_guarantees() -> None:
    """Of 98 images it is 4/99: at that, three alarms of four are no chance; at the 0.05 wanted they could be."""
    found = checks({"a": (10.0, 90.0, 90.0, 90.0), "b": (40.0,) * 47, "c": (40.0,) * 47})
    assert failed(found) == ["alarm_rate"]
    assert found["alarm_rate"].finding == "a: 3 alarms of 4 images, expected at most 2"


def test_limits_made_of_the_very_images_are_not_said_to_be_tested() -> None:
    found = checks({"few": NORMAL[:6], "a": NORMAL, "b": NORMAL})["alarm_rate"]
    assert found.passed
    assert found.finding.startswith("at 1 sites held-out images have no more alarms")
    assert found.finding.endswith("; 2 others have limits made of these very images, which says nothing")


def test_a_site_s_images_may_not_score_much_higher_than_with_the_base() -> None:
    base = {"a": NORMAL, "b": NORMAL}
    assert failed(checks({"a": times(1.08), "b": NORMAL}, base)) == []
    assert failed(checks({"a": times(1.105), "b": NORMAL}, base)) == [
        "not_worse"
    ]  # a rise of less than a tenth of what it is now
    found = checks({"a": times(1.2), "b": NORMAL}, base)
    assert failed(found) == ["not_worse"]
    assert found["not_worse"].finding.startswith("a: the median score of its held-out images rises from 44.")
    assert found["not_worse"].finding.endswith("expected a rise of at most 0.1 of it")
    assert failed(checks({"a": times(1.2), "b": NORMAL}, base, margin=0.3)) == []


def test_where_images_are_all_equal_a_rise_from_nothing_to_next_to_nothing_is_none() -> None:
    equal, nearly = (0.0,) * 10, (0.4,) * 10
    assert failed(checks({"a": nearly}, {"a": equal})) == []
    assert failed(checks({"a": (2.0,) * 10}, {"a": equal})) == ["not_worse"]


def test_the_median_of_few_images_is_chance() -> None:
    few = NORMAL[: LEAST - 1]
    assert failed(checks({"a": times(2, few)}, {"a": few})) == []
    enough = NORMAL[:LEAST]
    assert failed(checks({"a": times(2, enough)}, {"a": enough})) == ["not_worse"]


@pytest.mark.parametrize(
    ("images", "rate"), [(10, 0.05), (200, 0.05), (1000, 0.05), (1000, 0.5), (5, 0.2), (1100, 0.6)]
)
def test_the_band_of_alarms_holds_but_for_the_chance(images: int, rate: float) -> None:
    chance = 1e-3
    most = most_alarms(images, rate, chance)
    drawn = np.random.default_rng(0).binomial(images, rate, 200_000)
    assert (drawn > most).mean() <= 1.3 * chance
    assert most == 0 or (drawn > most - 1).mean() >= 0.7 * chance
