"""What is said of verdicts is kept whole or not at all, within bounds, and only an accepted false alarm is learned."""

from __future__ import annotations

import hashlib
import os
from io import BufferedReader
from pathlib import Path

import grpc
import pytest

from feddymem.v1.feedback_pb2 import (
    DECISION_ACCEPTED,
    DECISION_REJECTED,
    DECISION_UNSPECIFIED,
    OPINION_BAD_PART,
    OPINION_FALSE_ALARM,
)
from services.edge_client import feedback as module
from services.edge_client.feedback import FeedbackStore
from services.runtime.errors import Refusal
from tests.samples import sample
from tests.unit.test_edge_state import flip

BYTES = 100
MOST = 10 * BYTES


def image(number: int) -> bytes:
    """The store does not look into images."""
    return number.to_bytes(2, "big") * (BYTES // 2)


def name(number: int) -> str:
    return hashlib.sha256(image(number)).hexdigest()


def opened(folder: Path, max_bytes: int = MOST) -> FeedbackStore:
    return FeedbackStore(folder / "feedback", max_bytes)


def damage(path: Path) -> None:
    """So that it can be seen, however soon after the last look."""
    flip(path)
    os.utime(path, ns=(1, 1))


def learned(store: FeedbackStore) -> list[str]:
    return [path.stem for path in store.accepted()]


def refused(call: object) -> tuple[grpc.StatusCode, str]:
    assert callable(call)
    with pytest.raises(Refusal) as caught:
        call()
    return caught.value.status, caught.value.text


def test_what_is_kept_is_there_after_a_restart(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert store.keep(image(1), OPINION_FALSE_ALARM, "a shadow") == name(1)
    store.keep(image(2), OPINION_BAD_PART, "")
    store.decide(name(1)[:6], DECISION_ACCEPTED)
    again = opened(tmp_path)
    assert again.kept() == store.kept()
    newest, oldest = again.kept()
    assert (newest.image, newest.opinion, oldest.note, oldest.size_bytes) == (
        name(2),
        OPINION_BAD_PART,
        "a shadow",
        BYTES,
    )
    assert learned(again) == [name(1)]
    assert again.accepted()[0].read_bytes() == image(1)


def test_an_undecided_a_rejected_and_a_bad_part_are_not_learned(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.keep(image(1), OPINION_FALSE_ALARM, "")
    store.keep(image(2), OPINION_FALSE_ALARM, "")
    store.keep(image(3), OPINION_BAD_PART, "")
    store.decide(name(2), DECISION_REJECTED)
    assert refused(lambda: store.decide(name(3), DECISION_ACCEPTED)) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        f"image {name(3)} was said to be bad; only a false alarm can enter a bank",
    )
    assert learned(store) == []
    assert [each.image for each in store.kept(undecided=True)] == [name(1)]


def test_an_accepted_image_that_is_said_to_be_bad_later_is_not_learned_any_more(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.keep(image(1), OPINION_FALSE_ALARM, "")
    store.decide(name(1), DECISION_ACCEPTED)
    store.keep(image(1), OPINION_BAD_PART, "")
    assert learned(store) == []
    store.keep(image(1), OPINION_FALSE_ALARM, "")  # and has to be decided about anew
    assert learned(opened(tmp_path)) == []
    assert [each.decision for each in store.kept()] == [DECISION_UNSPECIFIED]


def test_the_same_feedback_twice_is_as_once_and_undoes_no_decision(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.keep(image(1), OPINION_FALSE_ALARM, "a shadow")
    store.decide(name(1), DECISION_ACCEPTED)
    before = store.kept()
    store.keep(image(1), OPINION_FALSE_ALARM, "a shadow")
    assert store.kept() == before
    store.keep(image(1), OPINION_FALSE_ALARM, "the gripper's shadow")
    assert [(each.note, each.decision) for each in store.kept()] == [("the gripper's shadow", DECISION_ACCEPTED)]


@pytest.mark.parametrize("by", ["bytes", "number"])
def test_when_it_is_full_the_oldest_rejected_go_first_and_then_nothing_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    if by == "number":
        monkeypatch.setattr(module, "MAX_IMAGES", 3)
    store = opened(tmp_path, 3 * BYTES if by == "bytes" else MOST)
    for number in (1, 2, 3):
        store.keep(image(number), OPINION_FALSE_ALARM if number < 3 else OPINION_BAD_PART, "")
    status, text = refused(lambda: store.keep(image(4), OPINION_FALSE_ALARM, ""))
    assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "3 images of 300 bytes are kept" in text
    assert not list((tmp_path / "feedback").glob(f"{name(4)}*"))
    store.keep(image(1), OPINION_BAD_PART, "")  # of one that is here, more can be said
    store.decide(name(3), DECISION_REJECTED)
    store.decide(name(2), DECISION_REJECTED)
    store.keep(image(4), OPINION_FALSE_ALARM, "")
    assert {each.image for each in store.kept()} == {name(1), name(3), name(4)}
    assert opened(tmp_path).kept() == store.kept()
    assert len(list((tmp_path / "feedback").iterdir())) == 6


def test_nothing_is_removed_for_an_image_that_there_would_be_no_room_for(tmp_path: Path) -> None:
    store = opened(tmp_path, 2 * BYTES)
    store.keep(image(1), OPINION_FALSE_ALARM, "")
    store.decide(name(1), DECISION_REJECTED)
    assert refused(lambda: store.keep(b"x" * 3 * BYTES, OPINION_FALSE_ALARM, ""))[0] is (
        grpc.StatusCode.RESOURCE_EXHAUSTED
    )
    assert [each.image for each in store.kept()] == [name(1)]


def test_a_damaged_image_is_not_learned_and_may_be_reported_again(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.keep(image(1), OPINION_FALSE_ALARM, "")
    store.decide(name(1), DECISION_ACCEPTED)
    damage(store.accepted()[0])
    assert learned(store) == []
    assert [path.suffix for path in (tmp_path / "feedback" / "quarantine").iterdir()] == [".image"]
    assert store.kept() == opened(tmp_path).kept() == []
    store.keep(image(1), OPINION_FALSE_ALARM, "")
    store.decide(name(1), DECISION_ACCEPTED)
    assert learned(store) == [name(1)]


def test_an_accepted_image_is_read_once_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    for number in (1, 2):
        store.keep(image(number), OPINION_FALSE_ALARM, "")
        store.decide(name(number), DECISION_ACCEPTED)
    read, file_digest = [], hashlib.file_digest

    def counted(file: BufferedReader, digest: str) -> object:
        read.append(Path(file.name).stem)
        return file_digest(file, digest)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    for _look in range(3):
        assert learned(store) == sorted([name(1), name(2)])
    assert sorted(read) == sorted([name(1), name(2)])
    os.utime(tmp_path / "feedback" / f"{name(1)}.image", ns=(1, 1))
    assert learned(store) == sorted([name(1), name(2)])
    assert read[2:] == [name(1)]


def test_a_report_mends_a_damaged_image(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.keep(image(1), OPINION_FALSE_ALARM, "")
    store.decide(name(1), DECISION_ACCEPTED)
    damage(store.accepted()[0])
    store.keep(image(1), OPINION_FALSE_ALARM, "")
    assert learned(store) == [name(1)]


def test_a_damaged_record_is_quarantined_with_its_image_and_the_others_stay(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.keep(image(1), OPINION_FALSE_ALARM, "")
    store.keep(image(2), OPINION_FALSE_ALARM, "")
    flip(tmp_path / "feedback" / f"{name(1)}.record")
    assert [each.image for each in opened(tmp_path).kept()] == [name(2)]
    quarantined = (tmp_path / "feedback" / "quarantine").iterdir()
    assert sorted(path.suffix for path in quarantined) == [".image", ".record"]


def test_what_a_killed_process_has_left_goes(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.keep(image(1), OPINION_FALSE_ALARM, "")
    for left in (f"{name(2)}.image", f"{name(3)}.image.part", f"{name(1)}.record.part"):
        (tmp_path / "feedback" / left).write_bytes(image(2))
    assert opened(tmp_path).kept() == store.kept()
    assert {path.name for path in (tmp_path / "feedback").iterdir()} == {f"{name(1)}.image", f"{name(1)}.record"}


@pytest.mark.parametrize("beginning", ["", "abc", "xyzxyz", "A" * 64, "a" * 65])
def test_what_is_no_beginning_of_a_name_is_refused(tmp_path: Path, beginning: str) -> None:
    store = opened(tmp_path)
    assert refused(lambda: store.decide(beginning, DECISION_ACCEPTED))[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_an_image_is_named_by_a_beginning_that_no_other_has(tmp_path: Path) -> None:
    store = opened(tmp_path, 10**9)
    store._kept = {start + "0" * 57: store._kept.get("") for start in ("abcdef1", "abcdef2")}  # type: ignore[misc]
    assert refused(lambda: store.decide("abcdef", DECISION_REJECTED)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "2 images begin with abcdef; give more characters",
    )
    assert refused(lambda: store.decide("abcdef3", DECISION_REJECTED))[0] is grpc.StatusCode.NOT_FOUND


def test_no_decision_is_refused(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.keep(image(1), OPINION_FALSE_ALARM, "")
    status, text = refused(lambda: store.decide(name(1), DECISION_UNSPECIFIED))
    assert (status, text) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "decision is 0; expected ACCEPTED (1) or REJECTED (2)",
    )


def test_what_is_kept_is_shown(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for number in range(4):
        store.keep(image(number), OPINION_BAD_PART if number == 3 else OPINION_FALSE_ALARM, "")
    store.decide(name(0), DECISION_ACCEPTED)
    store.decide(name(1), DECISION_REJECTED)
    states = ("undecided", "accepted", "rejected", "bad_part")
    assert [sample("edge_feedback_images", state=state) for state in states] == [1, 1, 1, 1]
    assert sample("edge_feedback_bytes") == 4 * BYTES
