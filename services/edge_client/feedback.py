"""What people at the site say of verdicts: images with an opinion each, in a folder of bounded size.

An image is a file named by its SHA-256, with a small record beside it. The image is written first, each of them whole,
and nothing counts without its record: whoever is told that an image is kept will find it after any kill.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import grpc

from feddymem.extraction import Stamp, stamp_of
from feddymem.v1.feedback_pb2 import (
    DECISION_ACCEPTED,
    DECISION_REJECTED,
    DECISION_UNSPECIFIED,
    OPINION_BAD_PART,
    OPINION_FALSE_ALARM,
    Decision,
    Feedback,
    Opinion,
)
from services.edge_client import metrics
from services.runtime.errors import Refusal, invalid, not_found, precondition
from services.runtime.files import make_folder, quarantine, read_record, write_atomically, write_record
from services.runtime.logs import get_logger

MAX_IMAGES = 1_000
"""Images that are kept, at most: nobody looks at more, and all of them fit into one answer."""
_IMAGE, _RECORD = ".image", ".record"
_BEGINNING = re.compile(r"[0-9a-f]{6,64}")

_log = get_logger()


class FeedbackStore:
    """Images with what was said of them; may be used by several threads.

    Args:
        folder: where they are; made if missing.
        max_bytes: of all images together.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._lock = threading.Lock()
        self._kept: dict[str, Feedback] = {}
        self._found_whole: dict[str, Stamp] = {}
        make_folder(folder)
        self._load()

    def keep(self, data: bytes, opinion: Opinion.ValueType, note: str) -> str:
        """Keeps an image; on disk when this returns. The last opinion counts, and another one undoes a decision.

        Returns:
            SHA-256 of the image, in hex.

        Raises:
            Refusal: RESOURCE_EXHAUSTED where there is no room, even without those that were rejected.
            OSError: it cannot be written.
        """
        name = hashlib.sha256(data).hexdigest()
        with self._lock:
            before = self._kept.get(name)
            feedback = Feedback(image=name, opinion=opinion, note=note, size_bytes=len(data))
            if before is not None and before.opinion == opinion:
                feedback.decision = before.decision
                feedback.received.CopyFrom(before.received)
            else:
                feedback.received.GetCurrentTime()
            if before is None:
                self._make_room(len(data))
            if not self._whole(name):
                write_atomically(self._image(name), data)
            if feedback != before:
                self._write(feedback)
        return name

    def kept(self, undecided: bool = False) -> list[Feedback]:
        """What is kept, the newest first.

        Args:
            undecided: whether only false alarms that nobody has decided about.
        """
        with self._lock:
            found = [each for each in self._kept.values() if not undecided or _state(each) == "undecided"]
        return sorted(found, key=_age, reverse=True)

    def decide(self, beginning: str, decision: Decision.ValueType) -> str:
        """Decides about an image; on disk when this returns.

        Args:
            beginning: of its SHA-256 in hex, at least 6 characters.
            decision: accepted or rejected.

        Returns:
            SHA-256 of the image, in hex.

        Raises:
            Refusal: NOT_FOUND for no such image, INVALID_ARGUMENT for several or no decision, FAILED_PRECONDITION where
                a part that was said to be bad is to be accepted.
            OSError: it cannot be written.
        """
        if decision not in (DECISION_ACCEPTED, DECISION_REJECTED):
            raise invalid(f"decision is {decision}; expected ACCEPTED (1) or REJECTED (2)")
        with self._lock:
            before = self._find(beginning)
            if decision == DECISION_ACCEPTED and before.opinion != OPINION_FALSE_ALARM:
                raise precondition(f"image {before.image} was said to be bad; only a false alarm can enter a bank")
            if before.decision != decision:
                feedback = Feedback()
                feedback.CopyFrom(before)
                feedback.decision = decision
                self._write(feedback)
            return before.image

    def accepted(self) -> tuple[Path, ...]:
        """Files of the false alarms that are to enter the bank, in the order of their names. Each is read once, and
        again when it has changed; one that was damaged is left out and in quarantine.

        Raises:
            OSError: the folder cannot be read or written.
        """
        with self._lock:
            names = sorted(name for name, each in self._kept.items() if _state(each) == "accepted")
            damaged = {name for name in names if not (self._unchanged(name) or self._whole(name))}
            for name in damaged:
                self._discard(name)
            return tuple(self._image(name) for name in names if name not in damaged)

    def _find(self, beginning: str) -> Feedback:
        if not _BEGINNING.fullmatch(beginning):
            raise invalid("image must be a SHA-256 in hex, or the first 6 or more of its characters")
        found = [each for name, each in self._kept.items() if name.startswith(beginning)]
        if not found:
            raise not_found(f"no image {beginning} is kept here; list what is")
        if len(found) > 1:
            raise invalid(f"{len(found)} images begin with {beginning}; give more characters")
        return found[0]

    def _make_room(self, size: int) -> None:
        """Removes what was rejected, the oldest first, until there is room for one more image."""
        rejected = sorted((each for each in self._kept.values() if each.decision == DECISION_REJECTED), key=_age)
        room = self._max_bytes - _bytes_of(self._kept.values())
        free = MAX_IMAGES - len(self._kept)
        going = []
        while (size > room or free < 1) and rejected:
            going.append(rejected.pop(0))
            room, free = room + going[-1].size_bytes, free + 1
        if size > room or free < 1:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"no room for an image of {size} bytes: {len(self._kept)} images of {_bytes_of(self._kept.values())} "
                f"bytes are kept, of at most {MAX_IMAGES} and {self._max_bytes}; have an operator of the site reject "
                "some (`feddymem feedback reject`), or raise max_feedback_bytes",
            )
        for feedback in going:
            _log.info("feedback_removed", image=feedback.image)
            self._remove(feedback.image)

    def _write(self, feedback: Feedback) -> None:
        write_record(self._record(feedback.image), feedback.SerializeToString())
        self._kept[feedback.image] = feedback
        self._show()

    def _whole(self, name: str) -> bool:
        """Whether an image is on disk, as it came."""
        try:
            with self._image(name).open("rb") as file:
                stamp = stamp_of(os.fstat(file.fileno()))
                whole = hashlib.file_digest(file, "sha256").hexdigest() == name
        except FileNotFoundError:
            return False
        if whole:
            self._found_whole[name] = stamp
        return whole

    def _unchanged(self, name: str) -> bool:
        """Whether an image is, by its size and time, what it was when it was found whole."""
        try:
            return self._found_whole.get(name) == stamp_of(self._image(name).stat())
        except FileNotFoundError:
            return False

    def _load(self) -> None:
        """Finds what is on disk; what a killed process has left of anything else goes."""
        for path in self._folder.glob(f"*{_RECORD}"):
            content = read_record(path)
            feedback = None if content is None else Feedback.FromString(content)
            if feedback is not None and self._image(feedback.image).is_file():
                self._kept[feedback.image] = feedback
            else:
                self._discard(path.stem)
        belonging = {path for name in self._kept for path in (self._image(name), self._record(name))}
        for path in set(self._folder.iterdir()) - belonging:
            if path.is_file():
                path.unlink()
        self._show()

    def _discard(self, name: str) -> None:
        """Puts a damaged image, or one whose record was damaged, in quarantine."""
        _log.error("feedback_damaged", image=name, action="report it again")
        if self._image(name).is_file():
            quarantine(self._image(name))
        self._remove(name)

    def _remove(self, name: str) -> None:
        """The record first: an image without one goes at the next start."""
        self._kept.pop(name, None)
        self._found_whole.pop(name, None)
        self._record(name).unlink(missing_ok=True)
        self._image(name).unlink(missing_ok=True)
        self._show()

    def _image(self, name: str) -> Path:
        return self._folder / f"{name}{_IMAGE}"

    def _record(self, name: str) -> Path:
        return self._folder / f"{name}{_RECORD}"

    def _show(self) -> None:
        states = Counter(map(_state, self._kept.values()))
        for state in ("undecided", "accepted", "rejected", "bad_part"):
            metrics.FEEDBACK_IMAGES.labels(state).set(states[state])
        metrics.FEEDBACK_BYTES.set(_bytes_of(self._kept.values()))


def _state(feedback: Feedback) -> str:
    """What is to become of an image, as the metric has it."""
    if feedback.decision == DECISION_REJECTED:
        return "rejected"
    if feedback.opinion == OPINION_BAD_PART:
        return "bad_part"
    return "undecided" if feedback.decision == DECISION_UNSPECIFIED else "accepted"


def _age(feedback: Feedback) -> tuple[int, str]:
    return feedback.received.ToNanoseconds(), feedback.image


def _bytes_of(some: Iterable[Feedback]) -> int:
    return sum(each.size_bytes for each in some)
