"""Who waits for room is told of it one by one, and what one of them does not use is left to the next."""

from __future__ import annotations

import asyncio

from services.inference.room import Room

SECONDS = 30


async def waiting(room: Room, count: int) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(room.wait(None)) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def test_who_waits_the_longest_is_told_first() -> None:
    room = Room(3)
    first, second = await waiting(room, 2)
    room.notify()
    await asyncio.wait_for(first, SECONDS)
    assert not second.done()
    room.notify()
    await asyncio.wait_for(second, SECONDS)


async def test_no_more_wait_than_may_and_who_has_left_does_not_count() -> None:
    room = Room(2)
    crowded = [room.crowded]
    first, second = await waiting(room, 2)
    crowded.append(room.crowded)
    first.cancel()
    await asyncio.wait([first], timeout=SECONDS)
    crowded.append(room.crowded)
    assert crowded == [False, True, False]
    room.notify()
    await asyncio.wait_for(second, SECONDS)


async def test_who_is_told_of_room_and_leaves_leaves_it_to_the_next() -> None:
    room = Room(2)
    first, second = await waiting(room, 2)
    room.notify()
    first.cancel()
    await asyncio.wait_for(second, SECONDS)
    assert first.cancelled()


async def test_nobody_waits_longer_than_asked() -> None:
    room = Room(1)
    await asyncio.wait_for(room.wait(0.001), SECONDS)
    assert not room.crowded
