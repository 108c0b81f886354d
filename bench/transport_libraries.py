"""Other libraries under bench/transport.py's round trip: ZeroMQ, torch's gloo, NIXL. Each may be missing.

The same work as every other subject: the driver copies its rows into place, sends, and has the whole answer in memory;
the server does the same with its own rows. Each library's fastest way for one pair on one host is used.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from transport_subjects import LIMIT_S, Shape


def missing(name: str) -> str | None:
    """Why a library cannot take part, or None."""
    modules = {"zeromq": ("zmq",), "gloo": ("torch",), "nixl": ("nixl_cu12", "nixl")}[name]
    if not any(importlib.util.find_spec(module) for module in modules):
        return f"{modules[0]} is not installed (pip install {'nixl-cu12' if name == 'nixl' else modules[0]})"
    return None


def meeting_place() -> str:
    """A folder of our own under /tmp, for sockets and stores; removed by `measure`."""
    return tempfile.mkdtemp(prefix="bench-transport-")


def drive(pipe: Connection, server: Connection, round_trip: Callable[[], None], check: Callable[[], bool]) -> None:
    """The driver's loop: one gate, then as many timed round trips as it is told, until it is told none."""
    server.send(1)
    round_trip()
    if not check():
        raise RuntimeError("wrong answer")
    pipe.send("ready")
    while (count := pipe.recv()) > 0:
        server.send(count)
        times = []
        for _ in range(count):
            began = time.perf_counter_ns()
            round_trip()
            times.append(time.perf_counter_ns() - began)
        pipe.send(times)
    server.send(0)


def contents(shape: Shape) -> tuple[Any, Any]:
    """What the driver and the server send."""
    rng = np.random.default_rng(4)
    return (
        rng.integers(0, 255, shape.out_bytes, np.uint8),
        rng.integers(0, 255, shape.back_bytes, np.uint8),
    )


def zeromq_server(pipe: Connection, shape: Shape, place: str) -> None:
    import zmq

    out, back = contents(shape)
    target = np.empty_like(back)
    with zmq.Context() as context, context.socket(zmq.PAIR) as sock:
        sock.linger = 0
        sock.rcvtimeo = int(LIMIT_S * 1000)
        sock.bind(f"ipc://{place}/pair")
        first = True
        while (count := pipe.recv()) > 0:
            for _ in range(count):
                came = sock.recv(copy=False)
                if first and bytes(came.buffer) != out.tobytes():
                    raise RuntimeError("wrong content")
                first = False
                np.copyto(target, back)
                sock.send(target, copy=False)


def zeromq_driver(pipe: Connection, shape: Shape, place: str, server: Connection) -> None:
    import zmq

    out, back = contents(shape)
    target = np.empty_like(out)
    came: Any = None
    with zmq.Context() as context, context.socket(zmq.PAIR) as sock:
        sock.linger = 0
        sock.rcvtimeo = int(LIMIT_S * 1000)
        sock.connect(f"ipc://{place}/pair")

        def round_trip() -> None:
            nonlocal came
            np.copyto(target, out)
            sock.send(target, copy=False)
            came = sock.recv(copy=False)

        drive(pipe, server, round_trip, lambda: bytes(came.buffer) == back.tobytes())


def gloo_group(place: str, rank: int) -> Any:
    import torch
    import torch.distributed

    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
    return torch


def gloo_server(pipe: Connection, shape: Shape, place: str) -> None:
    torch = gloo_group(place, 1)
    out, back = (torch.from_numpy(content) for content in contents(shape))
    came, target = torch.empty_like(out), torch.empty_like(back)
    while (count := pipe.recv()) > 0:
        for _ in range(count):
            torch.distributed.recv(came, 0)
            target.copy_(back)
            torch.distributed.send(target, 0)
    if not torch.equal(came, out):
        raise RuntimeError("wrong content")
    torch.distributed.destroy_process_group()


def gloo_driver(pipe: Connection, shape: Shape, place: str, server: Connection) -> None:
    torch = gloo_group(place, 0)
    out, back = (torch.from_numpy(content) for content in contents(shape))
    target, came = torch.empty_like(out), torch.empty_like(back)

    def round_trip() -> None:
        target.copy_(out)
        torch.distributed.send(target, 1)
        torch.distributed.recv(came, 1)

    drive(pipe, server, round_trip, lambda: bool(torch.equal(came, back)))
    torch.distributed.destroy_process_group()


class NixlEnd:
    """One agent: a buffer to send from, one that the peer writes into, a prepared transfer with a notification."""

    def __init__(self, pipe: Connection, name: str, send_bytes: int, receive_bytes: int) -> None:
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        os.environ.setdefault("UCX_TLS", "posix,sysv,cma,self,tcp")  # shared memory on one host
        module = importlib.import_module("nixl_cu12._api" if importlib.util.find_spec("nixl_cu12") else "nixl._api")
        self._agent = module.nixl_agent(name, module.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        self.outgoing, self.incoming = np.zeros(send_bytes, np.uint8), np.zeros(receive_bytes, np.uint8)
        for buffer in (self.outgoing, self.incoming):
            self._agent.register_memory([(buffer.ctypes.data, buffer.nbytes, 0, "")], "DRAM")
        pipe.send((self._agent.get_agent_metadata(), self.incoming.ctypes.data))
        if not pipe.poll(LIMIT_S):
            raise TimeoutError("the other agent does not answer")
        metadata, address = pipe.recv()
        peer = self._agent.add_remote_agent(metadata)
        source = self._agent.get_xfer_descs([(self.outgoing.ctypes.data, send_bytes, 0)], "DRAM")
        target = self._agent.get_xfer_descs([(address, send_bytes, 0)], "DRAM")
        self._transfer = self._agent.initialize_xfer("WRITE", source, target, peer, b"posted")

    def send(self, content: Any) -> None:
        np.copyto(self.outgoing, content)
        state = self._agent.transfer(self._transfer)
        while state == "PROC":
            os.sched_yield()
            state = self._agent.check_xfer_state(self._transfer)
        if state != "DONE":
            raise RuntimeError(f"transfer ended as {state}")

    def await_next(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not self._agent.get_new_notifs():
            os.sched_yield()  # it offers no blocking wait, and the peer may need this core
            if time.monotonic() > deadline:
                raise TimeoutError("no notification")


def nixl_server(pipe: Connection, shape: Shape, place: str) -> None:
    out, back = contents(shape)
    end = NixlEnd(pipe, "server", shape.back_bytes, shape.out_bytes)
    first = True
    while (count := pipe.recv()) > 0:
        for _ in range(count):
            end.await_next()
            if first and not np.array_equal(end.incoming, out):
                raise RuntimeError("wrong content")
            first = False
            end.send(back)


def nixl_driver(pipe: Connection, shape: Shape, place: str, server: Connection) -> None:
    out, back = contents(shape)
    end = NixlEnd(server, "driver", shape.out_bytes, shape.back_bytes)

    def round_trip() -> None:
        end.send(out)
        end.await_next()

    drive(pipe, server, round_trip, lambda: np.array_equal(end.incoming, back))


LIBRARIES = {
    "zeromq": (zeromq_server, zeromq_driver),
    "gloo": (gloo_server, gloo_driver),
    "nixl": (nixl_server, nixl_driver),
}
