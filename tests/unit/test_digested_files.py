"""Files with their digest before them: as they were written, or not at all, and never half of two."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feddymem import digested_files
from feddymem.digested_files import DIGEST_BYTES


def content_of(path: Path) -> bytes | None:
    found = digested_files.read(path)
    return None if found is None else bytes(found)


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=3))
def test_what_was_written_last_is_read(contents: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "entry.bin"
        for content in contents:
            digested_files.write(path, content)
        assert content_of(path) == contents[-1]
        assert list(Path(folder).iterdir()) == [path]


@given(st.binary(max_size=40), st.data())
def test_with_a_wrong_bit_or_another_end_it_is_not_read(content: bytes, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "entry.bin"
        digested_files.write(path, content)
        stored = bytearray(path.read_bytes())
        bit = data.draw(st.integers(0, 8 * len(stored) - 1))
        stored[bit // 8] ^= 1 << bit % 8
        path.write_bytes(stored)
        assert digested_files.read(path) is None
        stored[bit // 8] ^= 1 << bit % 8
        cut = data.draw(st.integers(0, len(stored) - 1))
        for damaged in (stored[:cut], stored + b"\0"):
            path.write_bytes(damaged)
            assert digested_files.read(path) is None


class KilledError(BaseException):
    """As `SystemExit`: nothing that a caller would catch."""


@pytest.mark.parametrize("error", [OSError("no space left on device"), KilledError()])
def test_what_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "entry.bin"
    digested_files.write(path, b"old")

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)):
        digested_files.write(path, b"new")
    assert content_of(path) == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_others_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace = tmp_path / "entry.bin", os.replace
    digested_files.write(path, b"old")
    seen = list[tuple[str, int, bool]]()

    def watched(part: Path, target: Path) -> None:
        old = content_of(target) == b"old"
        seen.append((Path(part).suffix, Path(part).stat().st_size, old))
        replace(part, target)

    monkeypatch.setattr(os, "replace", watched)
    digested_files.write(path, b"content")
    assert seen == [(".part", DIGEST_BYTES + len(b"content"), True)]
    assert content_of(path) == b"content"
