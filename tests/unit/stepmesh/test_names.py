"""Host names are looked up beside the main thread, with a deadline."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from stepmesh import Address, Member, Mesh, PeerDown, TransportError
from stepmesh.transports.host import HostFabric
from stepmesh.transports.names import NameResolver
from tests.contract.world import World, attention, ffn, make_parts

A0, F0 = attention(0), ffn(0)
LIMIT_S = 20.0


class NameServer:
    """Answers each name once it is told to: with an address, or not at all."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._answers: dict[str, str | OSError] = {}
        self._told = threading.Condition()
        self.closed = False

    def answer(self, name: str, address: str | OSError) -> None:
        with self._told:
            self._answers[name] = address
            self._told.notify_all()

    def getaddrinfo(self, host: str, port: int, **options: Any) -> list[tuple[Any, ...]]:
        self.asked.append(host)
        with self._told:
            assert self._told.wait_for(lambda: host in self._answers or self.closed, LIMIT_S)
            answer = self._answers.pop(host, OSError("closed"))
        if isinstance(answer, OSError):
            raise answer
        return socket.getaddrinfo(answer, port, **options)

    def close(self) -> None:
        with self._told:
            self.closed = True
            self._told.notify_all()
        for thread in threading.enumerate():
            if thread.name.startswith("stepmesh-names"):
                thread.join(LIMIT_S)


@pytest.fixture
def server() -> Iterator[NameServer]:
    server = NameServer()
    yield server
    server.close()


class Clock:
    now = 100.0


def resolver(server: NameServer) -> tuple[NameResolver, Clock, threading.Semaphore]:
    clock, rung = Clock(), threading.Semaphore(0)
    names = NameResolver(5.0, rung.release, getaddrinfo=server.getaddrinfo, now=lambda: clock.now)
    return names, clock, rung


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_address_in_digits_asks_nobody(server: NameServer, host: str) -> None:
    names, _, _ = resolver(server)
    found = names.look_up(host, 80)
    assert found is not None and found.where[:2] == (host, 80)
    assert server.asked == []


def test_a_name_is_answered_later_and_once(server: NameServer) -> None:
    names, clock, rung = resolver(server)
    for _ in range(3):
        assert names.look_up("a.test", 80) is None
    server.answer("a.test", "127.0.0.2")
    assert rung.acquire(timeout=LIMIT_S)
    found = names.look_up("a.test", 80)
    assert found is not None and found.where == ("127.0.0.2", 80)
    assert server.asked == ["a.test"]
    assert names.look_up("a.test", 80) is None  # it may have moved
    server.answer("a.test", "127.0.0.3")
    assert rung.acquire(timeout=LIMIT_S)
    clock.now += 5.1
    assert names.look_up("a.test", 80) is None  # nobody wanted it then, and it is old now
    server.answer("a.test", "127.0.0.4")
    assert rung.acquire(timeout=LIMIT_S)
    found = names.look_up("a.test", 80)
    assert found is not None and found.where == ("127.0.0.4", 80)


def test_a_name_that_does_not_exist_is_named(server: NameServer) -> None:
    names, _, rung = resolver(server)
    assert names.look_up("b.test", 80) is None
    server.answer("b.test", socket.gaierror(socket.EAI_NONAME, "unknown"))
    assert rung.acquire(timeout=LIMIT_S)
    with pytest.raises(TransportError, match=r"cannot resolve 'b\.test'.*unknown"):
        names.look_up("b.test", 80)


def test_a_name_server_that_is_away_is_a_failure_and_one_thread(server: NameServer) -> None:
    names, clock, rung = resolver(server)
    assert names.look_up("c.test", 80) is None
    for later_s in (5.1, 60.0):
        clock.now = 100.0 + later_s
        with pytest.raises(TransportError, match=rf"looking up 'c\.test' has had no answer for {later_s} s"):
            names.look_up("c.test", 80)
    assert server.asked == ["c.test"]
    server.answer("c.test", "127.0.0.1")  # late, and welcome
    assert rung.acquire(timeout=LIMIT_S)
    assert names.look_up("c.test", 80) is not None


@pytest.mark.parametrize("host", ["a" * 64 + ".test", "a\0.test"])
def test_what_cannot_be_a_name_is_a_failure(host: str) -> None:
    rung = threading.Semaphore(0)
    names = NameResolver(5.0, rung.release)
    assert names.look_up(host, 80) is None
    assert rung.acquire(timeout=LIMIT_S)
    with pytest.raises(TransportError, match="cannot resolve"):
        names.look_up(host, 80)


def test_a_rank_goes_on_while_a_name_is_looked_up(server: NameServer) -> None:
    """F1 has a name that nobody answers: exchanges with F0 do not wait for it, and it is reported in time."""
    world = World("tcp")
    try:
        config = world.config(A0, connect_timeout_s=0.5)
        world.meshes[A0] = Mesh(config, HostFabric(config, world.verbs, server.getaddrinfo))
        world.events[A0] = []
        world.add(F0)
        world.add(ffn(1))
        known = world.member(ffn(1))
        named = Member(known.id, known.incarnation, Address("", "f1.test", known.address.port))
        world.meshes[A0].set_members(1, [world.member(F0), named])
        for rank_id in (F0, ffn(1)):
            world.meshes[rank_id].set_members(1, [world.member(A0)])
        world.until(lambda: F0 in world.meshes[A0].peers)
        assert server.asked == ["f1.test"]
        world.exchange(A0, [F0], make_parts(3))
        (down,) = world.take(A0, PeerDown)
        assert "looking up 'f1.test' has had no answer" in down.reason
        server.answer("f1.test", "127.0.0.1")
        world.until_connected()
        world.exchange(A0, [F0, ffn(1)], make_parts(3))
    finally:
        world.close()
