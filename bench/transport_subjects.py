"""What bench/transport.py measures: a round trip over stepmesh, and the two floors it is held against.

Every subject is a pair of process groups: drivers that time round trips, servers that answer. A round trip is: the
driver copies its rows into place, sends, and has the whole answer; the server copies its own rows into the answer.
"""

from __future__ import annotations

import logging
import mmap
import os
import select
import socket
import time
import zlib
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import numpy as np

from stepmesh import (
    Address,
    CombineArrived,
    CombineMeta,
    DispatchArrived,
    DispatchMeta,
    DispatchParts,
    Member,
    Mesh,
    MeshConfig,
    PayloadLayout,
    PeerUp,
    RankId,
    Role,
    WireDtype,
)

LIMIT_S = 60.0  # of any wait; reached only when something is broken


@dataclass(frozen=True)
class Shape:
    """A payload: num_tokens rows of hidden columns, out in one type and back in another."""

    label: str
    num_tokens: int
    hidden: int
    top_k: int
    out: WireDtype
    back: WireDtype

    @property
    def layout(self) -> PayloadLayout:
        return PayloadLayout(self.hidden, self.num_tokens, self.top_k, self.out, self.back)

    @property
    def out_bytes(self) -> int:
        return self.layout.dispatch(self.num_tokens, self.top_k).total

    @property
    def back_bytes(self) -> int:
        return self.layout.combine(self.num_tokens).total


SHAPES = {
    "64B": Shape("64B", 1, 16, 0, WireDtype.FP32, WireDtype.FP32),
    "8KiB": Shape("8KiB", 1, 2048, 0, WireDtype.FP32, WireDtype.FP32),
    "128x7168": Shape("128x7168", 128, 7168, 8, WireDtype.FP8_E4M3, WireDtype.BF16),
}


def answer_rows(shape: Shape, seed: int) -> Any:
    """Rows that a server answers with."""
    kind = shape.back.numpy
    bits = np.random.default_rng(seed).integers(0, 127, (shape.num_tokens, shape.hidden * kind.itemsize), np.uint8)
    return bits.view(kind)


# stepmesh


def member(role: Role, rank: int, address: dict[str, Any]) -> Member:
    return Member(RankId(role, rank), f"{role.value}-{rank}", Address.from_dict(address))


def open_mesh(role: Role, rank: int, shape: Shape, transport: str) -> Mesh:
    logging.getLogger("stepmesh").setLevel(logging.ERROR)  # the end of every subject would be a warning
    return Mesh(
        MeshConfig(
            id=RankId(role, rank),
            incarnation=f"{role.value}-{rank}",
            secret=b"benchmark secret",
            config_hash=shape.label.encode(),
            layout=shape.layout,
            transport=transport,  # type: ignore[arg-type]
        )
    )


def mesh_server(pipe: Connection, shape: Shape, transport: str, rank: int, num_attention: int) -> None:
    """One FFN rank. Layer 0 is the correctness gate: it answers with the checksum of what came."""
    rows = answer_rows(shape, rank)
    with open_mesh(Role.FFN, rank, shape, transport) as mesh:
        pipe.send(mesh.address.to_dict())
        nowhere = {"unix": "", "host": "", "port": 0}
        mesh.set_members(1, [member(Role.ATTENTION, i, nowhere) for i in range(num_attention)])
        mesh.watch_fd(pipe.fileno())
        meta = CombineMeta()
        while True:
            for event in mesh.progress(1.0):
                if isinstance(event, DispatchArrived):
                    answer = rows
                    if event.header.layer == 0:
                        answer = rows.copy()
                        answer.view(np.uint8)[0, :4] = np.frombuffer(dispatch_digest(event.parts), np.uint8)
                    mesh.combine(event, meta, answer)
            if pipe.poll():
                return


def mesh_driver(pipe: Connection, shape: Shape, transport: str, rank: int, servers: list[dict[str, Any]]) -> None:
    """One attention rank: runs `count` round trips whenever it is told to, and returns their times in ns."""
    with open_mesh(Role.ATTENTION, rank, shape, transport) as mesh:
        mesh.set_members(1, [member(Role.FFN, i, address) for i, address in enumerate(servers)])
        peers = [RankId(Role.FFN, i) for i in range(len(servers))]
        connected: set[RankId] = set()
        deadline = time.monotonic() + LIMIT_S
        while len(connected) < len(peers):
            connected |= {event.peer for event in mesh.progress(0.1) if isinstance(event, PeerUp)}
            if time.monotonic() > deadline:
                raise TimeoutError(f"connected to {connected} of {peers}")
        source = dispatch_parts(mesh, peers[0], shape, rank)
        check_answers(mesh, peers, shape, source)
        mesh.idle(0)  # whoever has work under way must not sit here while others start
        pipe.send("ready")
        while (order := pipe.recv()) != 0:
            count, pause_s = order if isinstance(order, tuple) else (order, 0.0)
            times = []
            for step in range(count):
                if pause_s:
                    mesh.idle(0)
                    pause(mesh, pause_s)
                times.append(round_trip(mesh, peers, source, step))
            pipe.send(times)
            mesh.idle(0)


def pause(mesh: Mesh, seconds: float) -> None:
    """Wait as an idle engine does."""
    until = time.monotonic() + seconds
    while (left_s := until - time.monotonic()) > 0:
        if mesh.progress(left_s):
            raise RuntimeError("something happened while nothing was to happen")


def dispatch_parts(mesh: Mesh, peer: RankId, shape: Shape, seed: int) -> DispatchParts:
    """Random content for every section that this shape has."""
    rng = np.random.default_rng(100 + seed)
    view = mesh.dispatch_view(peer, 0, shape.num_tokens, shape.top_k)
    return DispatchParts(
        *(
            None
            if part is None
            else rng.integers(0, 127, (*part.shape, part.itemsize), np.uint8).view(part.dtype)[..., 0]
            for part in view
        )
    )


def dispatch_digest(parts: Any) -> bytes:
    """crc32 over all sections."""
    crc = 0
    for part in parts:
        if part is not None:
            crc = zlib.crc32(part.tobytes(), crc)
    return crc.to_bytes(4, "little")


def send(mesh: Mesh, peers: list[RankId], source: DispatchParts, step: int, layer: int) -> None:
    mesh.dispatch(peers, DispatchMeta(0, 1, step, layer), source)


def gather(mesh: Mesh, count: int) -> list[CombineArrived]:
    arrived: list[CombineArrived] = []
    deadline = time.monotonic() + LIMIT_S
    while len(arrived) < count:
        for event in mesh.progress(1.0):
            if not isinstance(event, CombineArrived):
                raise RuntimeError(f"unexpected {event}")
            arrived.append(event)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(arrived)} of {count} answers")
    return arrived


def check_answers(mesh: Mesh, peers: list[RankId], shape: Shape, source: DispatchParts) -> None:
    """The correctness gate: every byte of both directions, over both parities."""
    digest = np.frombuffer(dispatch_digest(source), np.uint8)
    for step in range(4):
        send(mesh, peers, source, step, layer=0)
        for event in gather(mesh, len(peers)):
            expected = answer_rows(shape, event.peer.rank).view(np.uint8).copy()
            expected[0, :4] = digest
            if not np.array_equal(event.rows.view(np.uint8), expected):
                raise RuntimeError(f"{mesh.id}: wrong answer of {event.peer}")


def round_trip(mesh: Mesh, peers: list[RankId], source: DispatchParts, step: int) -> int:
    began = time.perf_counter_ns()
    send(mesh, peers, source, step, layer=1)
    gather(mesh, len(peers))
    return time.perf_counter_ns() - began


# Floor of shm: memcpy into shared memory, a flag to spin on for the same time, an eventfd to block on


class SharedMailbox:
    """Two one-way slots in one mapping; word 0 and word 8 count the messages each way."""

    def __init__(self, memfd: int, bells: tuple[int, int], shape: Shape, side: int) -> None:
        mapping = mmap.mmap(memfd, mailbox_bytes(shape))
        self._words = memoryview(mapping)[:128].cast("Q")
        out = np.frombuffer(mapping, np.uint8, shape.out_bytes, 4096)
        back = np.frombuffer(mapping, np.uint8, shape.back_bytes, 4096 + shape.out_bytes)
        self._mine = (out, back)[side]
        self._bells = bells
        self._side = side
        self._count = 0

    def put(self, content: Any) -> None:
        np.copyto(self._mine, content)
        self._words[8 * self._side] += 1
        os.eventfd_write(self._bells[1 - self._side], 1)

    def await_next(self) -> None:
        self._count += 1
        word, bell = 8 * (1 - self._side), self._bells[self._side]
        until = time.monotonic() + 30e-6
        while self._words[word] < self._count:
            if time.monotonic() > until:
                select.select([bell], [], [], LIMIT_S)
                os.eventfd_read(bell)


def mailbox_bytes(shape: Shape) -> int:
    return 4096 + shape.out_bytes + shape.back_bytes


def memcpy_server(pipe: Connection, shape: Shape) -> None:
    fds = [recv_handle(pipe) for _ in range(3)]
    mailbox = SharedMailbox(fds[0], (fds[1], fds[2]), shape, 1)
    back = np.ones(shape.back_bytes, np.uint8)
    while (count := pipe.recv()) > 0:
        for _ in range(count):
            mailbox.await_next()
            mailbox.put(back)


def memcpy_driver(pipe: Connection, shape: Shape, server: Connection, server_pid: int) -> None:
    memfd = os.memfd_create("memcpy floor")
    os.ftruncate(memfd, mailbox_bytes(shape))
    bells = (os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK))
    for fd in (memfd, *bells):
        send_handle(server, fd, server_pid)
    mailbox = SharedMailbox(memfd, bells, shape, 0)
    out = np.ones(shape.out_bytes, np.uint8)
    pipe.send("ready")
    while (count := pipe.recv()) > 0:
        server.send(count)
        times = []
        for _ in range(count):
            began = time.perf_counter_ns()
            mailbox.put(out)
            mailbox.await_next()
            times.append(time.perf_counter_ns() - began)
        pipe.send(times)
    server.send(0)


# Floor of tcp: one blocking socket pair


def socket_server(pipe: Connection, shape: Shape) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        sock, _ = listener.accept()
    with sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        came, back, source = bytearray(shape.out_bytes), bytearray(shape.back_bytes), bytes(shape.back_bytes)
        while sock.recv_into(came, shape.out_bytes, socket.MSG_WAITALL) == shape.out_bytes:
            back[:] = source
            sock.sendall(back)


def socket_driver(pipe: Connection, shape: Shape, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as sock:
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        out, source, came = bytearray(shape.out_bytes), bytes(shape.out_bytes), bytearray(shape.back_bytes)
        pipe.send("ready")
        while (count := pipe.recv()) > 0:
            times = []
            for _ in range(count):
                began = time.perf_counter_ns()
                out[:] = source
                sock.sendall(out)
                sock.recv_into(came, shape.back_bytes, socket.MSG_WAITALL)
                times.append(time.perf_counter_ns() - began)
            pipe.send(times)
