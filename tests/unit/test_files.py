"""Records: what was written is read, or nothing; what is damaged is kept for whoever looks, and not for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.runtime import files
from services.runtime.files import QUARANTINED_FILES, quarantine, read_record, write_record


def quarantined(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in (folder / "quarantine").iterdir())


@pytest.mark.parametrize("data", [b"", b"x", bytes(100_000)])
def test_a_record_is_read_as_it_was_written(tmp_path: Path, data: bytes) -> None:
    write_record(tmp_path / "record", b"older")
    write_record(tmp_path / "record", data)
    assert read_record(tmp_path / "record") == data
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


def test_there_is_nothing_to_read_where_nothing_was_written(tmp_path: Path) -> None:
    assert read_record(tmp_path / "record") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [0, 31, 32, -1])
def test_a_record_with_one_wrong_bit_is_not_read(tmp_path: Path, place: int) -> None:
    path = tmp_path / "record"
    write_record(path, b"content")
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    before = files.DAMAGED._value.get()
    assert read_record(path) is None
    assert files.DAMAGED._value.get() == before + 1
    assert not path.exists()
    assert quarantined(tmp_path) == ["record"]


@pytest.mark.parametrize("kept_bytes", [0, 10, 38])
def test_a_record_that_was_cut_off_is_not_read(tmp_path: Path, kept_bytes: int) -> None:
    path = tmp_path / "record"
    write_record(path, b"content")
    path.write_bytes(path.read_bytes()[:kept_bytes])
    assert read_record(path) is None
    assert quarantined(tmp_path) == ["record"]


def test_a_quarantine_keeps_the_newest_few(tmp_path: Path) -> None:
    for number in range(QUARANTINED_FILES + 3):
        path = tmp_path / f"{number:02}"
        path.write_bytes(b"damaged")
        quarantine(path)
    assert quarantined(tmp_path) == [f"{number:02}" for number in range(3, QUARANTINED_FILES + 3)]
    quarantine(tmp_path / "taken by another thread")
    assert len(quarantined(tmp_path)) == QUARANTINED_FILES
