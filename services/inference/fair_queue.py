"""What waits to be inspected: bounded, and fair between callers."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """A bounded queue that serves callers in turn, whatever each of them has waiting.

    When it is full, the caller with the most waiting loses its newest, so that one caller cannot keep the others out.

    Args:
        size: items that may wait, at most.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting: dict[str, deque[Item]] = {}
        self._count = 0
        self._closed = self._woken = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return self._count

    def ahead(self, caller: str) -> int:
        """How many items would be served before another one of a caller."""
        with self._changed:
            ahead = mine = len(self._waiting.get(caller, ()))
            turns = mine + 1
            for name, items in self._waiting.items():
                if name == caller:  # who stands behind it has one turn less
                    turns = mine
                else:
                    ahead += min(len(items), turns)
            return ahead

    def admits(self, caller: str) -> bool:
        """Whether there is, or would be made, room for another item of a caller."""
        with self._changed:
            return self._count < self._size or self._greedier(caller) is not None

    def put(self, item: Item, caller: str) -> Item | None:
        """Adds an item; what is refused for it: the item itself, unless another caller has more waiting even then."""
        with self._changed:
            refused = None
            if self._count >= self._size:
                greedier = self._greedier(caller)
                if greedier is None:
                    return item
                refused = greedier.pop()
                self._count -= 1
            self._waiting.setdefault(caller, deque()).append(item)
            self._count += 1
            self._changed.notify()
            return refused

    def _greedier(self, caller: str) -> deque[Item] | None:
        """What waits of the caller with the most, if that is more than this one would have with another item."""
        greediest = max(self._waiting.values(), key=len)
        return greediest if len(greediest) > len(self._waiting.get(caller, ())) + 1 else None

    @property
    def ended(self) -> bool:
        """Whether it is closed and empty."""
        with self._changed:
            return self._closed and not self._count

    def get(self) -> Item | None:
        """The next caller's oldest item, as soon as there is one; None if it is closed and empty, or on `wake`."""
        with self._changed:
            while not self._count:
                if self._closed or self._woken:
                    self._woken = False
                    return None
                self._changed.wait()
            # Callers stand in the order of the dict; whoever was served goes to its end.
            caller = next(iter(self._waiting))
            items = self._waiting.pop(caller)
            item = items.popleft()
            if items:
                self._waiting[caller] = items
            self._count -= 1
            return item

    def remove(self, item: Item, caller: str) -> None:
        """Takes out an item that nobody waits for any more, if it is still there."""
        with self._changed:
            items = self._waiting.get(caller, deque())
            if item in items:
                items.remove(item)
                self._count -= 1
                if not items:
                    del self._waiting[caller]

    def wake(self) -> None:
        """Lets one thread go on that waits for an item in vain, now or next."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def close(self) -> None:
        """Lets `get` end when everything is taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
