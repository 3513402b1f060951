"""Whoever is killed, and whenever: after its restart all ends bit for bit as if nothing had happened.

This is the part of the matrix that is tried on each change; `python -m tests.chaos.matrix` tries all of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.cells import Cell, all_cells
from tests.chaos.federation import PromiseBrokenError, Trial
from tests.chaos.kill_at import KillPoint
from tests.chaos.matrix import Matrix

BANK_BYTES = 40 * 152
"""Of a bank's items, which are most of it; what else is sent is less."""
CELLS = [cell for cell in all_cells() if cell.short]


@pytest.fixture
def trial(matrix: Matrix, tmp_path: Path) -> Iterator[Trial]:
    """A federation of its own."""
    opened = matrix.trial(tmp_path / "trial")
    yield opened
    opened.close()


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_death_changes_nothing(matrix: Matrix, cell: Cell) -> None:
    matrix.run(cell)


def test_every_process_is_in_the_short_matrix() -> None:
    assert {cell.process for cell in CELLS} == {cell.process for cell in all_cells()}
    assert len(CELLS) >= 20


def test_a_moment_that_never_comes_fails_its_cell(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.chaos.federation.PATIENCE_SECONDS", 6)
    never = KillPoint("services.aggregator.state:State.put_bank", "after", 5)
    with pytest.raises(PromiseBrokenError, match=r"still to die: \['aggregator'\]"):
        trial.run({"aggregator": [never]})


def test_a_function_that_is_not_there_fails_its_cell(trial: Trial) -> None:
    renamed = KillPoint("services.aggregator.state:State.keep_bank", "after", 1)
    with pytest.raises(PromiseBrokenError, match=r"(?s)aggregator ended with 1:.*keep_bank"):
        trial.run({"aggregator": [renamed]})


def test_of_an_accepted_bank_nothing_is_asked_for_again(trial: Trial) -> None:
    """The aggregator dies between writing that a bank counts and saying so: the site asks, and sends no byte of it."""
    dies = KillPoint("services.aggregator.state:State.put_bank", "after", 1)
    trial.run({"aggregator": [dies]})
    sent = [int(str(event["bytes"])) for site in trial.sites for event in trial.events(site, "bank_accepted")]
    # Of four banks nobody was told of the one, and the other site's may have been here in part: it went on then.
    assert sum(count >= BANK_BYTES for count in sent) in {2, 3}
    # That site has asked, unless the round was over before.
    assert sum(count < BANK_BYTES for count in sent) <= 2


@pytest.mark.parametrize(("when", "printed"), [("before", ""), ("after", "feddymem")])
def test_a_process_of_its_own_can_be_had_killed(when: str, printed: str) -> None:
    command = [sys.executable, "-m", "tests.chaos.kill_at", "services.cli.main:app", when, "1", "--", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ})
    assert (run.returncode == -signal.SIGKILL) == (when == "before")
    assert printed in run.stdout
