"""Two processes: what only the system can show. Exchange across them, kill -9, SIGSTOP, restart."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

from stepmesh import CombineArrived, CombineMeta, DispatchArrived, Event, Member, Mesh, PeerDown, PeerUp
from tests.contract.world import RDMA_DEVICES, Holdings, World, attention, ffn, make_parts

A0, F0 = attention(0), ffn(0)
LIMIT_S = 30.0
START_S = 90.0  # of an interpreter, in an emulated guest
spawn = multiprocessing.get_context("spawn")


def serve(pipe: Connection, config: Any, client: Member) -> None:
    """An FFN rank in a process of its own: answers every dispatch with its rows, doubled."""
    with Mesh(config) as mesh:
        mesh.set_members(1, [client])
        pipe.send(Member(config.id, config.incarnation, mesh.address))
        mesh.watch_fd(pipe.fileno())
        while not pipe.poll():
            for event in mesh.progress(5.0):
                if isinstance(event, DispatchArrived):
                    rows = mesh.combine_view(event)
                    np.multiply(event.parts.rows, 2, out=rows)
                    mesh.combine(event, CombineMeta(), rows)


class Server:
    """The process above, as its parent sees it."""

    def __init__(self, world: World, **overrides: Any) -> None:
        self.pipe, there = spawn.Pipe()
        config = world.config(F0, **overrides)
        self.process = spawn.Process(target=serve, args=(there, config, world.member(A0)))
        self.process.start()
        there.close()
        assert self.pipe.poll(START_S), "the server did not start"
        self.member: Member = self.pipe.recv()

    def kill(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send("stop")
        self.process.join(LIMIT_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()
        self.process.close()


# Over the twin of a device two processes would not meet: verbs only where there is a real one (make test-rdma).
@pytest.fixture(params=["shm", "tcp", *(["verbs"] if RDMA_DEVICES else [])])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    # The first spawn starts a resource tracker that stays: not ours to count.
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()
    before = Holdings.now()
    world = World(request.param)
    world.add(A0, heartbeat_s=0.1, peer_timeout_s=1.0)
    yield world
    world.close()
    assert Holdings.now() == before


def until(mesh: Mesh, kind: type) -> Event:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        for event in mesh.progress(0.5):
            if isinstance(event, kind):
                return event
    raise AssertionError(f"no {kind.__name__}")


def exchange(world: World, num_tokens: int, seed: int) -> None:
    parts = make_parts(num_tokens, 2, seed=seed)
    world.dispatch(A0, [F0], parts, stream=seed % 4, epoch=max(world.meshes[A0]._roster.epochs.live_epochs))
    event = until(world.meshes[A0], CombineArrived)
    assert isinstance(event, CombineArrived)
    np.testing.assert_array_equal(event.rows, parts.rows * 2)


def test_exchange_between_processes(world: World) -> None:
    server = Server(world)
    try:
        mesh = world.meshes[A0]
        mesh.set_members(1, [server.member])
        until(mesh, PeerUp)
        for seed in range(60):
            exchange(world, seed, seed)
    finally:
        server.close()
    down = until(mesh, PeerDown)
    assert isinstance(down, PeerDown) and not down.retryable


def test_a_killed_process_is_noticed_at_once_and_its_successor_takes_over(world: World) -> None:
    mesh = world.meshes[A0]
    server = Server(world)
    try:
        mesh.set_members(1, [server.member])
        until(mesh, PeerUp)
        exchange(world, 5, 0)
        world.dispatch(A0, [F0], make_parts(5), stream=1)
        killed = time.monotonic()
        server.kill(signal.SIGKILL)
        until(mesh, PeerDown)
        assert time.monotonic() - killed < 10.0
    finally:
        server.close()
    successor = Server(world)
    try:
        mesh.set_members(2, [successor.member])
        mesh.retire_epoch(1)
        until(mesh, PeerUp)
        # The successor's own view is still its first epoch: it knows this rank, and takes epoch 2 once told.
        assert mesh.peers == (F0,)
    finally:
        successor.close()


def test_a_stopped_process_is_silent_and_comes_back(world: World) -> None:
    mesh = world.meshes[A0]
    server = Server(world, heartbeat_s=0.1)
    try:
        mesh.set_members(1, [server.member])
        until(mesh, PeerUp)
        server.kill(signal.SIGSTOP)
        down = until(mesh, PeerDown)
        assert isinstance(down, PeerDown)
        assert "no heartbeat" in down.reason
        server.kill(signal.SIGCONT)
        up = until(mesh, PeerUp)
        assert isinstance(up, PeerUp)
        assert up.generation >= 2
        exchange(world, 7, 1)
    finally:
        server.kill(signal.SIGCONT)
        server.close()


def test_arrivals_of_a_dead_process_stay_readable(world: World) -> None:
    mesh = world.meshes[A0]
    server = Server(world)
    try:
        mesh.set_members(1, [server.member])
        until(mesh, PeerUp)
        parts = make_parts(9, 2)
        world.dispatch(A0, [F0], parts)
        event = until(mesh, CombineArrived)
        assert isinstance(event, CombineArrived)
        server.kill(signal.SIGKILL)
        until(mesh, PeerDown)
        np.testing.assert_array_equal(event.rows, parts.rows * 2)
        del event
    finally:
        server.close()
