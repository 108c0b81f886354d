"""What an exchange costs the interpreter: time in dispatch, gather, receive and combine, by the number of peers.

M attention and N FFN ranks in one process take turns, so that nothing waits for anything: what is left is work.
Payloads are one row of 64 bytes, so that it is not memcpy. It is wall clock of the calling thread, system calls
included: over tcp most of it is the kernel's, which delivers a loopback packet within `send`.
"""

from __future__ import annotations

import logging
import statistics
import time
from typing import Any

import numpy as np
from transport_subjects import SHAPES, open_mesh

from stepmesh import (
    CombineArrived,
    CombineMeta,
    DispatchArrived,
    DispatchMeta,
    DispatchParts,
    Member,
    Mesh,
    Role,
)

ROUNDS = 400
STAGE_US = 272.0  # of one of three stages of a layer at 50 ms a token (Step-3: 61 layers)
LIMIT_S = 30.0


class Timer:
    """Times of one call, in us."""

    def __init__(self) -> None:
        self.micros: list[float] = []

    def __call__(self, began_ns: int) -> None:
        self.micros.append((time.perf_counter_ns() - began_ns) / 1e3)

    @property
    def p50(self) -> float:
        return statistics.median(self.micros[len(self.micros) // 4 :])


def measure_cpu(transport: str, num_attention: int, num_ffn: int) -> dict[str, Any]:
    """Medians, at the first attention rank and the first FFN rank."""
    shape = SHAPES["64B"]
    logging.getLogger("stepmesh").setLevel(logging.ERROR)
    attention = [open_mesh(Role.ATTENTION, rank, shape, transport) for rank in range(num_attention)]
    ffn = [open_mesh(Role.FFN, rank, shape, transport) for rank in range(num_ffn)]
    try:
        connect(attention, ffn)
        dispatch, gather, receive, combine = Timer(), Timer(), Timer(), Timer()
        parts, rows = DispatchParts(np.ones((1, 16), np.float32)), np.ones((1, 16), np.float32)
        peers = [mesh.id for mesh in ffn]
        for step in range(ROUNDS):
            for mesh in attention:
                began = time.perf_counter_ns()
                mesh.dispatch(peers, DispatchMeta(0, 1, step, 1), parts)
                if mesh is attention[0]:
                    dispatch(began)
            for mesh in ffn:
                arrivals, took_ns = collect(mesh, num_attention, DispatchArrived)
                began = time.perf_counter_ns()
                for arrival in arrivals:
                    mesh.combine(arrival, CombineMeta(), rows)
                if mesh is ffn[0]:
                    combine(began)
                    receive.micros.append(took_ns / 1e3)
            for mesh in attention:
                _, took_ns = collect(mesh, num_ffn, CombineArrived)
                if mesh is attention[0]:
                    gather.micros.append(took_ns / 1e3)
        return {
            "transport": transport, "attention": num_attention, "ffn": num_ffn,
            "dispatch_us": round(dispatch.p50, 1), "gather_us": round(gather.p50, 1),
            "receive_us": round(receive.p50, 1), "combine_us": round(combine.p50, 1),
        }  # fmt: skip
    finally:
        for mesh in (*attention, *ffn):
            mesh.close()


def connect(attention: list[Mesh], ffn: list[Mesh]) -> None:
    for here, there in ((attention, ffn), (ffn, attention)):
        members = [Member(mesh.id, mesh.config.incarnation, mesh.address) for mesh in there]
        for mesh in here:
            mesh.set_members(1, members)
    deadline = time.monotonic() + LIMIT_S
    while any(len(m.peers) < len(ffn) for m in attention) or any(len(m.peers) < len(attention) for m in ffn):
        for mesh in (*attention, *ffn):
            mesh.progress(0.0)
        if time.monotonic() > deadline:
            raise TimeoutError("the ranks do not connect")


def collect(mesh: Mesh, count: int, kind: type) -> tuple[list[Any], int]:
    """Arrivals, and the time in those calls of progress that brought some (not in those that came too early)."""
    arrivals: list[Any] = []
    took_ns = 0
    deadline = time.monotonic() + LIMIT_S
    while len(arrivals) < count:
        began = time.perf_counter_ns()
        found = [event for event in mesh.progress(0.0) if isinstance(event, kind)]
        if found:
            took_ns += time.perf_counter_ns() - began
            arrivals += found
        elif time.monotonic() > deadline:
            raise TimeoutError(f"{len(arrivals)} of {count} arrivals")
    return arrivals, took_ns


def cpu_table(transports: list[str]) -> list[dict[str, Any]]:
    """Sender against N, receiver against M; prints as it goes."""
    results = []
    for transport in transports:
        sender = [measure_cpu(transport, 1, num) for num in (1, 4, 16)]
        receiver = [measure_cpu(transport, num, 1) for num in (1, 4, 16)]
        for result in sender:
            num = result["ffn"]
            print(
                f"cpu {transport} sender   N={num:<2}  dispatch {result['dispatch_us']:6.1f} us"
                f" ({result['dispatch_us'] / num:4.1f} a peer)  gather {result['gather_us']:6.1f} us"
                f" ({result['gather_us'] / num:4.1f} a peer)"
            )
        for result in receiver:
            num = result["attention"]
            print(
                f"cpu {transport} receiver M={num:<2}  receive  {result['receive_us']:6.1f} us"
                f" ({result['receive_us'] / num:4.1f} a peer)  combine {result['combine_us']:6.1f} us"
                f" ({result['combine_us'] / num:4.1f} a peer)"
            )
        few, many = sender[0], sender[-1]
        costs = [result["dispatch_us"] + result["gather_us"] for result in (few, many)]
        per_peer = (costs[1] - costs[0]) / (many["ffn"] - few["ffn"])
        reach = int((STAGE_US / 4 - costs[0]) / per_peer) + 1 if costs[0] < STAGE_US / 4 else 0
        print(f"cpu {transport} sender: a quarter of {STAGE_US:g} us is passed beyond N={reach}")
        results += [*sender, *receiver, {"transport": transport, "quarter_stage_n": reach}]
    return results
