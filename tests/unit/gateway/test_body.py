"""Room for bodies: all together bounded, and it is the one who has most that makes room."""

import asyncio
import contextlib

import pytest

from afd.errors import RequestError, UnavailableError
from afd.gateway.body import BodyRoom, read_body
from tests.fakes.async_test import async_test

MAX_BODY_BYTES = 60


class Sender:
    """One request whose body comes as the test says."""

    def __init__(self, room, client):
        self.headers = {}
        self.outcome = None
        self._room, self._client = room, client
        self._chunks = asyncio.Queue()
        self._may_leave = asyncio.Event()
        self.task = asyncio.create_task(self._receive())

    async def stream(self):
        while chunk := await self._chunks.get():
            yield chunk

    async def send(self, num_bytes, *, end=False):
        self._chunks.put_nowait(b"x" * num_bytes)
        if end:
            self._chunks.put_nowait(b"")
        for _ in range(10):
            await asyncio.sleep(0)

    async def go_on(self):
        self._may_leave.set()
        await self.task

    async def _receive(self):
        try:
            async with self._room.receive(self._client) as receipt:
                body = await read_body(self, MAX_BODY_BYTES, receipt)
                await self._may_leave.wait()
                receipt.leave()
                self.outcome = len(body)
        except (RequestError, UnavailableError) as error:
            self.outcome = error


@contextlib.asynccontextmanager
async def room_of(max_bytes):
    room, senders = BodyRoom(max_bytes), []

    def begin(client):
        senders.append(Sender(room, client))
        return senders[-1]

    yield room, begin
    for sender in senders:
        sender.task.cancel()
    await asyncio.gather(*(sender.task for sender in senders), return_exceptions=True)
    assert room.num_bytes == 0


def refused(sender):
    return isinstance(sender.outcome, UnavailableError) and "max_waiting_bytes" in str(sender.outcome)


@async_test
async def test_the_client_with_most_bytes_loses_the_body_that_is_on_its_way_longest():
    async with room_of(100) as (room, begin):
        slow, whole, newest, other = begin("a"), begin("a"), begin("a"), begin("b")
        await slow.send(10)
        await whole.send(40, end=True)
        await newest.send(20)
        await other.send(30)
        assert room.num_bytes == 100 and not any(sender.outcome for sender in (slow, whole, newest, other))
        await other.send(5)
        assert refused(slow) and room.num_bytes == 95
        await other.send(20)
        assert refused(newest) and room.num_bytes == 95
        await other.send(0)  # the end
        await other.go_on()
        await whole.go_on()
        assert (whole.outcome, other.outcome) == (40, 55)


@async_test
async def test_of_whole_bodies_the_newest_goes():
    async with room_of(100) as (room, begin):
        first, second, third = (begin("a") for _ in range(3))
        for sender in (first, second):
            await sender.send(50, end=True)
        other = begin("b")
        await other.send(1, end=True)
        assert refused(second) and first.outcome is None and room.num_bytes == 51
        await third.send(60)  # it has most itself, and is the only one on its way
        assert refused(third)
        await first.go_on()
        await other.go_on()
        assert (first.outcome, other.outcome) == (50, 1)


@async_test
async def test_who_only_holds_a_place_loses_nothing():
    async with room_of(10) as (_, begin):
        waiting, small = begin("a"), begin("a")
        await small.send(10)
        await small.send(1)
        assert refused(small) and waiting.outcome is None


@async_test
async def test_a_body_that_is_being_read_makes_room_for_nobody():
    async with room_of(100) as (room, begin):
        mine = begin("a")
        await mine.send(60, end=True)
        await mine.go_on()
        assert mine.outcome == 60 and room.num_bytes == 0


@async_test
async def test_a_body_too_large_and_one_that_is_given_up_leave_no_bytes():
    async with room_of(100) as (room, begin):
        large, given_up = begin("a"), begin("a")
        await large.send(61)
        assert large.outcome.status == 413
        await given_up.send(20)
        given_up.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up.task
        assert room.num_bytes == 0
