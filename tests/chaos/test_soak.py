"""The soak, for seconds: nothing fails while releases are swapped and images come and go. Memory takes longer to tell:
`python -m tests.chaos.soak` does."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from tests.chaos.soak import Soak

SECONDS = 15


def test_no_inspection_fails_while_releases_are_swapped(tmp_path: Path) -> None:
    soaked = Soak(tmp_path).run(SECONDS, Console())
    assert soaked.failures == []
    assert soaked.inspections > 0
    assert soaked.rounds > 1
    assert soaked.swaps > len(soaked.memory)
    assert soaked.new_images > 0
