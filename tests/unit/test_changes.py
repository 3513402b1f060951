"""Waiting for changes: none is missed, none is made up, and a wait ends when its time is up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.runtime.changes import Changes

LONG = 30.0
"""Seconds that no wait of a passing test takes."""


async def turns(count: int) -> None:
    """Lets other tasks run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(changes: Changes, done: Callable[[], bool]) -> None:
    """How every waiter uses it: look, then wait, with no await between."""
    while not done():
        assert await changes.wait(LONG)


async def test_every_waiter_is_woken() -> None:
    changes, woken = Changes(), list[int]()

    async def waiter(number: int) -> None:
        assert await changes.wait(LONG)
        woken.append(number)

    async with asyncio.TaskGroup() as tasks:
        for number in range(5):
            tasks.create_task(waiter(number))
        await turns(3)
        assert woken == []
        changes.notify()
    assert sorted(woken) == list(range(5))


async def test_no_change_is_missed_wherever_it_falls() -> None:
    """The change comes after any number of turns of the loop, and the waiter gets there after any other number."""
    for before_change in range(8):
        for before_look in range(8):
            changes, state = Changes(), list[str]()

            async def change(pause: int, changes: Changes = changes, state: list[str] = state) -> None:
                await turns(pause)
                state.append("changed")
                changes.notify()

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(change(before_change))
                await turns(before_look)
                await until(changes, lambda state=state: bool(state))  # type: ignore[misc]


async def test_no_change_of_many_is_missed() -> None:
    changes, counter, seen = Changes(), [0], list[int]()

    async def count() -> None:
        for number in range(1, 201):
            counter[0] = number
            changes.notify()
            await turns(number % 4)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(count())
        while counter[0] < 200:
            await changes.wait(LONG)
            seen.append(counter[0])
    assert seen[-1] == 200
    assert seen == sorted(seen)


async def test_a_change_of_the_past_wakes_nobody() -> None:
    changes = Changes()
    changes.notify()
    assert not await changes.wait(0.01)


async def test_one_change_wakes_once() -> None:
    changes = Changes()
    waiting = asyncio.create_task(changes.wait(LONG))
    await turns(3)
    changes.notify()
    assert await waiting
    assert not await changes.wait(0.01)


async def test_a_wait_ends_when_its_time_is_up() -> None:
    changes = Changes()
    assert not await changes.wait(0.01)
    assert not await changes.wait(0)


async def test_a_wait_without_end_can_be_cancelled() -> None:
    changes = Changes()
    waiting = asyncio.create_task(changes.wait())
    await turns(3)
    assert not waiting.done()
    waiting.cancel()
    (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
    assert isinstance(outcome, asyncio.CancelledError)
    changes.notify()


async def test_a_waiter_that_gives_up_does_not_disturb_the_others() -> None:
    changes = Changes()
    patient = asyncio.create_task(changes.wait(LONG))
    assert not await changes.wait(0.01)
    assert not patient.done()
    changes.notify()
    assert await patient
