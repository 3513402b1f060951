"""In which order images came to a site; kept on disk, because folders do not tell."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from services.runtime.files import read_record, write_record

MAX_ABSENT = 100_000
"""Images that are not there and keep their numbers; those with the least numbers go first."""


class Arrivals:
    """Numbers images as they come. What is held out is chosen by these numbers, so that they must not change.

    Args:
        path: of the file; without one, or with a damaged one, all images are new.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        content = read_record(path) or b""
        self._numbers = {name: int(number) for number, name in map(str.split, content.decode().splitlines())}

    def number(self, images: Iterable[str]) -> dict[str, int]:
        """The numbers of the images that are there now; on disk when this returns.

        Args:
            images: names of all of them; those that are new get the next numbers, in this order.

        Raises:
            OSError: the file cannot be written.
        """
        present = dict.fromkeys(images)
        new = [name for name in present if name not in self._numbers]
        if new:
            begin = max(self._numbers.values(), default=-1) + 1
            absent = sorted(self._numbers.keys() - present.keys(), key=self._numbers.__getitem__)
            forgotten = set(absent[:-MAX_ABSENT])
            numbers = {name: number for name, number in self._numbers.items() if name not in forgotten}
            numbers |= {name: number for number, name in enumerate(new, begin)}
            write_record(self._path, "".join(f"{number} {name}\n" for name, number in numbers.items()).encode())
            self._numbers = numbers
        return {name: self._numbers[name] for name in present}
