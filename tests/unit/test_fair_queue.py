"""The queue before the batcher: bounded, and no caller waits for what another has sent before."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.fair_queue import FairQueue

SECONDS = 30
PUTS = st.sampled_from("abc")
"""Who puts an item."""


def filled(size: int, callers: str) -> FairQueue[str]:
    """Items named by their caller and their number: a0, a1, b0 and so on."""
    queue: FairQueue[str] = FairQueue(size)
    seen: Counter[str] = Counter()
    for caller in callers:
        assert queue.put(f"{caller}{seen[caller]}", caller) is None
        seen[caller] += 1
    return queue


def taken(queue: FairQueue[str]) -> list[str]:
    """All that is in a queue, in the order in which it serves them."""
    items = []
    while len(queue):
        item = queue.get()
        assert item is not None
        items.append(item)
    return items


def test_one_caller_is_served_in_order() -> None:
    assert taken(filled(9, "aaaa")) == ["a0", "a1", "a2", "a3"]


def test_callers_are_served_in_turn() -> None:
    assert taken(filled(9, "aaabbc")) == ["a0", "b0", "c0", "a1", "b1", "a2"]


def test_many_waiting_do_not_delay_the_first_of_another_caller() -> None:
    queue = filled(2000, "a" * 1000)
    assert queue.get() == "a0"
    queue.put("b0", "b")
    assert [queue.get(), queue.get(), queue.get()] == ["a1", "b0", "a2"]


def test_who_was_served_and_comes_again_stands_behind_the_others() -> None:
    queue = filled(9, "ab")
    assert queue.get() == "a0"
    queue.put("a1", "a")
    assert taken(queue) == ["b0", "a1"]


def test_a_full_queue_refuses_the_only_caller() -> None:
    queue = filled(3, "aaa")
    assert queue.put("a3", "a") == "a3"
    assert taken(queue) == ["a0", "a1", "a2"]


def test_in_a_full_queue_the_caller_with_the_most_waiting_loses_its_newest() -> None:
    queue = filled(6, "aaabbc")
    assert queue.put("d0", "d") == "a2"
    assert len(queue) == 6
    assert taken(queue) == ["a0", "b0", "c0", "d0", "a1", "b1"]


@pytest.mark.parametrize(("waiting", "caller"), [("abc", "d"), ("aab", "b"), ("aabb", "a"), ("aabb", "b")])
def test_nobody_is_pushed_out_for_who_would_have_as_many(waiting: str, caller: str) -> None:
    queue = filled(len(waiting), waiting)
    assert queue.put("new", caller) == "new"
    assert len(queue) == len(waiting)
    assert "new" not in taken(queue)


@pytest.mark.parametrize(
    ("waiting", "caller", "ahead"),
    [("", "a", 0), ("aaa", "a", 3), ("aaab", "b", 3), ("baaa", "b", 2), ("aaabb", "c", 2), ("aaab", "a", 4)],
)
def test_it_knows_how_many_are_served_before_another_one(waiting: str, caller: str, ahead: int) -> None:
    queue = filled(9, waiting)
    assert queue.ahead(caller) == ahead
    queue.put("new", caller)
    assert taken(queue).index("new") == ahead


def test_a_closed_queue_gives_what_it_has_and_then_nothing() -> None:
    queue = filled(9, "ab")
    queue.close()
    assert [queue.get(), queue.get(), queue.get(), queue.get()] == ["a0", "b0", None, None]


def test_what_is_removed_is_not_served_and_its_place_is_free() -> None:
    queue = filled(4, "aaab")
    for item, caller in (("a1", "a"), ("b0", "b"), ("a9", "a"), ("c0", "c")):
        queue.remove(item, caller)
    assert len(queue) == 2
    assert queue.put("c1", "c") is None
    assert queue.put("c2", "c") is None
    assert taken(queue) == ["a0", "c1", "a2", "c2"]


def test_closing_ends_all_who_wait() -> None:
    queue: FairQueue[str] = FairQueue(3)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(queue.get) for _ in range(3)]
        queue.close()
        assert [future.result(SECONDS) for future in waiting] == [None] * 3


def test_who_waits_is_served_as_soon_as_there_is_something() -> None:
    queue: FairQueue[str] = FairQueue(3)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(queue.get)
        queue.put("a0", "a")
        assert waiting.result(SECONDS) == "a0"


class Model:
    """What the queue does, said in another way: rounds, in each of which every caller has one item."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.callers: list[str] = []
        self.items: dict[str, list[int]] = {}

    def put(self, item: int, caller: str) -> int | None:
        refused = None
        if sum(map(len, self.items.values())) == self.size:
            most = max(len(items) for items in self.items.values())
            if len(self.items.get(caller, [])) + 1 >= most:
                return item
            greediest = next(name for name in self.callers if len(self.items[name]) == most)
            refused = self.items[greediest].pop()
        if caller not in self.callers:
            self.callers.append(caller)
        self.items.setdefault(caller, []).append(item)
        return refused

    def get(self) -> int:
        caller = self.callers.pop(0)
        item = self.items[caller].pop(0)
        if self.items[caller]:
            self.callers.append(caller)
        return item


@given(st.integers(1, 7), st.lists(st.one_of(PUTS, st.none()), max_size=60))
def test_it_does_what_the_model_does(size: int, actions: list[str | None]) -> None:
    """A letter puts an item of that caller, None gets one."""
    queue: FairQueue[int] = FairQueue(size)
    model = Model(size)
    for number, caller in enumerate(actions):
        if caller is not None:
            assert queue.put(number, caller) == model.put(number, caller)
        elif len(queue):
            assert queue.get() == model.get()
        assert len(queue) == sum(map(len, model.items.values())) <= size
    while len(queue):
        assert queue.get() == model.get()


@given(st.integers(1, 7), st.lists(PUTS, max_size=40), PUTS)
def test_what_is_ahead_is_what_is_served_before(size: int, puts: list[str], caller: str) -> None:
    queue: FairQueue[int] = FairQueue(size + 1)
    for number, other in enumerate(puts[:size]):
        queue.put(number, other)
    ahead = queue.ahead(caller)
    queue.put(-1, caller)
    assert [queue.get() for _ in range(ahead + 1)][-1] == -1


def test_threads_lose_nothing_and_get_nothing_twice() -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue(50)
    together = threading.Barrier(8)

    def put(caller: str) -> list[tuple[str, int] | None]:
        together.wait(SECONDS)
        return [queue.put((caller, number), caller) for number in range(500)]

    def get(_number: int) -> list[tuple[str, int]]:
        together.wait(SECONDS)
        items = []
        while (item := queue.get()) is not None:
            items.append(item)
        return items

    with ThreadPoolExecutor(8) as pool:
        getting = [pool.submit(get, number) for number in range(4)]
        refused = [item for items in pool.map(put, "abcd") for item in items if item is not None]
        queue.close()
        got = [item for future in getting for item in future.result(SECONDS)]
    assert sorted(got + refused) == sorted((caller, number) for caller in "abcd" for number in range(500))
    assert len(queue) == 0


@given(st.lists(PUTS, max_size=12), st.integers(1, 6), PUTS)
def test_it_admits_exactly_what_it_would_not_refuse(callers: list[str], size: int, caller: str) -> None:
    queue: FairQueue[object] = FairQueue(size)
    for before in callers:
        queue.put(object(), before)
    admitted, item = queue.admits(caller), object()
    assert admitted is (queue.put(item, caller) is not item)
