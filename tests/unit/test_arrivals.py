"""In which order images came to a site."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.edge_client.arrivals import Arrivals


def test_images_are_numbered_as_they_come(tmp_path: Path) -> None:
    arrivals = Arrivals(tmp_path / "arrivals")
    assert arrivals.number(["b", "c", "b"]) == {"b": 0, "c": 1}
    assert arrivals.number(["a", "b", "c", "d"]) == {"b": 0, "c": 1, "a": 2, "d": 3}


def test_no_number_changes_when_images_go_or_come_back(tmp_path: Path) -> None:
    arrivals = Arrivals(tmp_path / "arrivals")
    arrivals.number(["a", "b", "c"])
    assert arrivals.number(["b", "c"]) == {"b": 1, "c": 2}
    assert arrivals.number([]) == {}
    assert arrivals.number(["d", "a", "b", "c"]) == {"d": 3, "a": 0, "b": 1, "c": 2}


def test_of_those_that_have_gone_the_oldest_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.edge_client.arrivals.MAX_ABSENT", 2)
    arrivals = Arrivals(tmp_path / "arrivals")
    arrivals.number("abcd")
    arrivals.number("de")
    assert Arrivals(tmp_path / "arrivals").number("abcde") == {"a": 5, "b": 1, "c": 2, "d": 3, "e": 4}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from("abcdef")), max_size=5))
def test_a_restart_changes_nothing(tmp_path: Path, looks: list[list[str]]) -> None:
    path = tmp_path / "arrivals"
    path.unlink(missing_ok=True)
    kept = Arrivals(path)
    for images in looks:
        numbers = kept.number(images)
        assert Arrivals(path).number(images) == numbers
        assert sorted(numbers) == sorted(set(images))
        assert len(set(numbers.values())) == len(numbers)


def test_with_a_damaged_file_all_images_are_new(tmp_path: Path) -> None:
    path = tmp_path / "arrivals"
    Arrivals(path).number(["b", "a"])
    path.write_bytes(path.read_bytes()[:-2])
    assert Arrivals(path).number(["a", "b"]) == {"a": 0, "b": 1}
    assert [file.name.split("-")[1] for file in (tmp_path / "quarantine").iterdir()] == ["arrivals"]
