"""In which order images came to a site."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.edge_client.arrivals import Arrivals


def test_images_are_numbered_as_they_come(tmp_path: Path) -> None:
    arrivals = Arrivals(tmp_path / "arrivals")
    assert arrivals.number(["b", "c", "b"]) == {"b": 0, "c": 1}
    assert arrivals.number(["a", "b", "c", "d"]) == {"b": 0, "c": 1, "a": 2, "d": 3}


def test_the_numbers_of_others_do_not_change_when_images_go(tmp_path: Path) -> None:
    arrivals = Arrivals(tmp_path / "arrivals")
    arrivals.number(["a", "b", "c"])
    assert arrivals.number(["b", "c"]) == {"b": 1, "c": 2}
    assert arrivals.number(["a", "b", "c"]) == {"b": 1, "c": 2, "a": 3}  # it has come again
    assert arrivals.number([]) == {}


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
