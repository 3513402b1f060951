"""What an edge client keeps of its last round: all of it, or what is whole of it, and never another one's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from feddymem.v1.array_pb2 import Array
from feddymem.v1.federation_pb2 import BankHeader
from feddymem.v1.release_pb2 import Release
from services.edge_client.state import EdgeState, Outcome
from services.runtime.arrays import bank_to_wire, chunks
from tests.integration.fake_site import make_bank


def claimed(folder: Path, owner: str = "federation parts, site a") -> EdgeState:
    state = EdgeState(folder)
    state.claim(owner)
    return state


def arrays(state: EdgeState, seed: int) -> list[Array]:
    """Arrays that are in the store."""
    found = bank_to_wire(make_bank(seed), "float16")
    for array in found:
        state.arrays.put(array.manifest.sha256, array.data)
    return [array.manifest for array in found]


def outcome(state: EdgeState, round_number: int = 1) -> Outcome:
    return Outcome(
        BankHeader(instance=state.instance, round=round_number, arrays=arrays(state, 2 * round_number)),
        Release(version=round_number, arrays=arrays(state, 2 * round_number + 1)),
        round_number,
        frozenset({"a" * 64, f"{round_number}" * 64}),
    )


def flip(path: Path) -> None:
    """One bit of a file, as a failing disk does."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def array_of(folder: Path, manifests: list[Array]) -> Path:
    return folder / "arrays" / manifests[0].sha256.hex()


def test_an_outcome_is_the_same_after_a_restart(tmp_path: Path) -> None:
    state = claimed(tmp_path)
    assert state.last() == Outcome()
    kept = outcome(state)
    state.put(kept)
    again = claimed(tmp_path)
    assert (again.last(), again.instance) == (kept, state.instance)
    assert len(again.instance) == 32


def test_a_folder_is_one_owner_s(tmp_path: Path) -> None:
    claimed(tmp_path)
    with pytest.raises(ValueError, match="site a, not of federation parts, site b; give another one"):
        claimed(tmp_path, "federation parts, site b")


def test_the_next_outcome_takes_the_place_of_the_last_and_of_all_that_it_used(tmp_path: Path) -> None:
    state = claimed(tmp_path)
    state.put(outcome(state))
    [abandoned, *_] = bank_to_wire(make_bank(99), "float16")
    state.arrays.append(abandoned.manifest, next(chunks(abandoned.manifest.sha256, abandoned.data[:10])))
    second = outcome(state, 2)
    state.put(second)
    assert second.bank is not None
    assert second.generator is not None
    used = {array.sha256.hex() for array in (*second.bank.arrays, *second.generator.arrays)}
    assert {path.name for path in (tmp_path / "arrays").iterdir()} == used
    assert claimed(tmp_path).last() == second


@pytest.mark.parametrize("damaged", ["bank", "generator"])
def test_what_is_damaged_of_an_outcome_does_not_take_the_rest_along(tmp_path: Path, damaged: str) -> None:
    state = claimed(tmp_path)
    kept = outcome(state)
    assert kept.bank is not None
    assert kept.generator is not None
    state.put(kept)
    flip(array_of(tmp_path, list(kept.bank.arrays if damaged == "bank" else kept.generator.arrays)))
    with capture_logs() as logs:
        found = claimed(tmp_path).last()
    left = Outcome(None, kept.generator) if damaged == "bank" else Outcome(kept.bank, None)
    assert found == dataclasses.replace(left, round=kept.round, held_out=kept.held_out)
    assert [entry["event"] for entry in logs] == ["file_damaged"]
    assert len(list((tmp_path / "arrays" / "quarantine").iterdir())) == 1


def test_of_a_damaged_record_the_file_is_kept_and_the_log_tells(tmp_path: Path) -> None:
    state = claimed(tmp_path)
    state.put(outcome(state))
    flip(tmp_path / "outcome")
    with capture_logs() as logs:
        assert claimed(tmp_path).last() == Outcome()
    assert [(entry["event"], Path(entry["path"]).name) for entry in logs] == [("file_damaged", "outcome")]
    [damaged] = (tmp_path / "quarantine").iterdir()
    assert damaged.name.endswith("-outcome")


def test_a_damaged_owner_makes_it_a_new_edge_client_that_uses_nothing_of_the_old_one(tmp_path: Path) -> None:
    """The aggregator refuses a second bank of a round, but from a new instance it could not tell that it is one."""
    state = claimed(tmp_path)
    state.put(outcome(state))
    flip(tmp_path / "owner")
    again = claimed(tmp_path)
    assert again.instance != state.instance
    assert again.last() == Outcome()


def test_an_outcome_without_a_bank_is_the_edge_client_s_own_too(tmp_path: Path) -> None:
    state = claimed(tmp_path)
    untrained = Outcome(generator=Release(arrays=arrays(state, 1)))
    state.put(untrained)
    assert claimed(tmp_path).last() == untrained


def test_the_memory_that_a_round_started_from_is_kept_until_the_next_one(tmp_path: Path) -> None:
    state = claimed(tmp_path)
    base, candidate = arrays(state, 50), arrays(state, 51)
    state.put(outcome(state), base)
    assert all(array.sha256 in state.arrays for array in base)
    assert not any(array.sha256 in state.arrays for array in candidate)
    candidate = arrays(state, 51)
    state.put(outcome(state, 2), candidate)
    assert all(array.sha256 in state.arrays for array in candidate)
    assert not any(array.sha256 in state.arrays for array in base)
