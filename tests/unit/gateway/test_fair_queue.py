"""Places for few: clients in turn, bounded, nothing lost when somebody gives up."""

import asyncio
import contextlib

import pytest

from afd.errors import UnavailableError
from afd.gateway.intake.fair_queue import FairQueue
from tests.fakes.async_test import async_test


class Crowd:
    """Clients that ask for a place, hold it until told, and note who had one."""

    def __init__(self, num_places=1, patience_s=30.0):
        self.queue = FairQueue(num_places, patience_s)
        self.served = []
        self._leave = asyncio.Semaphore(0)

    async def ask(self, name):
        task = asyncio.create_task(self._visit(name))
        await settle()
        return task

    async def leave(self):
        self._leave.release()
        await settle()

    async def _visit(self, name):
        async with self.queue.place(name[0]):
            self.served.append(name)
            await self._leave.acquire()


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
    assert crowd.queue.num_waiting == 0


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
    queue = FairQueue(1, 0.01)
    async with queue.place("a"):
        with pytest.raises(UnavailableError, match="retry later"):
            async with queue.place("b"):
                pass
    async with queue.place("b"):
        assert queue.num_waiting == 0
