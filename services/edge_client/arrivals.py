"""In which order images came to a site; kept on disk, because folders do not tell."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from services.runtime.files import read_record, write_record


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
        known = dict.fromkeys(images)
        numbers = {name: number for name, number in self._numbers.items() if name in known}
        begin = max(numbers.values(), default=-1) + 1
        new = [name for name in known if name not in numbers]
        numbers.update({name: number for number, name in enumerate(new, begin)})
        if numbers != self._numbers:
            write_record(self._path, "".join(f"{number} {name}\n" for name, number in numbers.items()).encode())
            self._numbers = numbers
        return numbers
