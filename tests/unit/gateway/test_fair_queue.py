"""Places for few: clients in turn, bounded, nothing lost when somebody gives up."""

import asyncio
import contextlib

import pytest

from afd.errors import UnavailableError
from afd.gateway.intake.fair_queue import FairQueue
from tests.fakes.async_test import async_test


class Crowd:
    """Clients that ask for a place, hold it until told, and note who had one."""

    def __init__(self, num_places=1, max_size=100, patience_s=30.0):
        self.queue = FairQueue(num_places, max_size, patience_s)
        self.served, self.refused = [], []
        self._leave = asyncio.Semaphore(0)

    async def ask(self, name, size=1):
        task = asyncio.create_task(self._visit(name, size))
        await settle()
        return task

    async def leave(self):
        self._leave.release()
        await settle()

    async def _visit(self, name, size):
        try:
            async with self.queue.place(name[0], size):
                self.served.append(name)
                await self._leave.acquire()
        except UnavailableError:
            self.refused.append(name)


async def settle():
    for _ in range(8):
        await asyncio.sleep(0)


@async_test
async def test_clients_take_turns():
    crowd = Crowd()
    tasks = [await crowd.ask(name) for name in ("a1", "a2", "a3", "a4", "b1", "c1", "b2")]
    for _ in tasks:
        await crowd.leave()
    assert crowd.served == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]
    await asyncio.gather(*tasks)
    assert crowd.queue.waiting_size == 0


@async_test
async def test_who_has_most_waiting_makes_room_for_others():
    crowd = Crowd(max_size=3)
    tasks = [await crowd.ask(name) for name in ("a0", "a1", "a2", "a3", "b1", "a4")]
    assert crowd.refused == ["a3", "a4"]
    for _ in range(4):
        await crowd.leave()
    assert crowd.served == ["a0", "a1", "b1", "a2"]
    await asyncio.gather(*tasks)


@async_test
async def test_it_is_sizes_that_count():
    crowd = Crowd(max_size=100)
    tasks = [await crowd.ask("a0")]
    for name, size in (("a1", 40), ("a2", 30), ("a3", 30), ("b1", 50), ("c1", 61)):
        tasks.append(await crowd.ask(name, size))
    assert crowd.refused == ["a3", "a2", "c1"]
    tasks += [await crowd.ask(f"d{i}", 1) for i in range(10)]
    for _ in range(13):
        await crowd.leave()
    assert crowd.served == ["a0", "a1", "b1", *(f"d{i}" for i in range(10))]
    await asyncio.gather(*tasks)
    assert crowd.queue.waiting_size == 0


@async_test
async def test_places_of_those_who_give_up_come_back():
    crowd = Crowd(num_places=2)
    tasks = [await crowd.ask(name) for name in ("a1", "a2", "b1", "c1", "b2")]
    for task in (tasks[2], tasks[0]):  # one that waits, one that has a place
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await settle()
    assert crowd.served == ["a1", "a2", "b2"]
    for _ in range(3):
        await crowd.leave()
    assert crowd.served == ["a1", "a2", "b2", "c1"]
    await asyncio.gather(*tasks, return_exceptions=True)


@async_test
async def test_nobody_waits_for_ever():
    queue = FairQueue(1, 10, 0.01)
    async with queue.place("a", 1):
        with pytest.raises(UnavailableError, match="retry later"):
            async with queue.place("b", 1):
                pass
    async with queue.place("b", 1):
        assert queue.waiting_size == 0
