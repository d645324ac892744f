"""Memory of the server: who waits for it gets it in order, and nobody waits for those who wait."""

import asyncio

import pytest

from diffalign.serving.room import FullError, Room


def in_order(taken, asked):
    """Names of requests in the order in which they got what they asked for, each by its size and whether it holds some already."""

    async def run():
        room, got = Room(10, 9), []

        async def ask(name, size, more):
            await (room.until_more if more else room.until)(size, 5.0)
            with room.hold(size):
                got.append(name)
                await asyncio.sleep(0.001)

        with room.hold(taken):
            tasks = []
            for name, (size, more) in asked.items():
                tasks.append(asyncio.create_task(ask(name, size, more)))
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert room.taken == (0, 0)
        return got

    return asyncio.run(run())


def test_a_small_request_does_not_pass_a_large_one_for_ever():
    assert in_order(8, {"large": (9, False), "small": (2, False), "smaller": (1, False)}) == ["large", "small", "smaller"]


def test_what_holds_some_memory_already_comes_before_what_holds_none():
    assert in_order(8, {"outside": (10, False), "inside": (2, True), "later": (3, True)}) == ["inside", "later", "outside"]


def test_who_has_waited_long_enough_is_refused():
    async def run():
        room = Room(10, 9)
        with room.hold(8):
            await room.until(3, 0.01)
            with pytest.raises(FullError, match="8 bytes of 10 are taken"), room.hold(3):
                pass
        await room.until(3, 0.01)
        with room.hold(3):
            return room.taken

    assert asyncio.run(run()) == (3, 0)
