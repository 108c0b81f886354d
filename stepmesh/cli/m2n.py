"""M attention and N FFN ranks, a process each, exchange payloads of given sizes: verified first, then timed.

All ranks meet at a rendezvous. Without --at this process is the rendezvous, with a key made for the run, and starts
all ranks itself; with it, each host starts its own, and attention/0's host is the rendezvous.
"""

from __future__ import annotations

import multiprocessing
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

from stepmesh.cli.m2n_experiment import Experiment
from stepmesh.cli.m2n_rank import Task, run_rank
from stepmesh.errors import ConfigError, TransportError
from stepmesh.rendezvous import RendezvousServer
from stepmesh.types import RankId, Role


class Result(NamedTuple):
    """Times of one transport and size, over all exchanges of attention/0; all attention ranks ran at once."""

    transport: str  # as asked for
    carried_by: str  # what the pairs of attention/0 took
    ranks: str
    out_bytes: int
    back_bytes: int
    exchanges: int
    p50_us: float
    p99_us: float
    gb_per_s: float  # both directions, all pairs, from the slowest attention rank's time


def run(experiment: Experiment, *, secret: bytes, at: str | None, run_ranks: str | None) -> list[Result]:
    """Run all or this host's ranks. Results come where attention/0 runs, elsewhere the list is empty.

    Raises ConfigError for arguments, TransportError when a rank fails; none of the processes is left then.
    """
    ours = _ranks_here(experiment, run_ranks)
    host, port = ("127.0.0.1", 0) if at is None else _endpoint(at)
    if at is None:
        if len(ours) != len(experiment.ranks):
            raise ConfigError("some ranks run elsewhere: say where they meet (--at HOST:PORT)")
        secret = secrets.token_bytes(32)
    elif len(secret) < 16:
        raise ConfigError("ranks of several hosts need a common key of 16 bytes or more (--secret-file)")
    results = []
    leads = RankId(Role.ATTENTION, 0) in ours
    server = RendezvousServer(host, port, secret) if leads else None
    try:
        where = server.address if server is not None else (host, port)
        for transport in experiment.transports:
            part = replace(experiment, transports=(transport,))
            answers = _run_processes([Task(rank_id, part, where, secret) for rank_id in ours], experiment)
            if leads:
                results += _summarise(part, answers)
    finally:
        if server is not None:
            server.close()
    return results


def text(result: Result) -> str:
    """One line of the table."""
    carried = result.carried_by if result.carried_by == result.transport else f"{result.transport}:{result.carried_by}"
    return (
        f"{result.ranks:>6} {carried:>10} {result.out_bytes:>9} B out {result.back_bytes:>9} B back"
        f"  p50 {result.p50_us:9.1f} us  p99 {result.p99_us:9.1f} us  {result.gb_per_s:7.3f} GB/s"
    )


def _ranks_here(experiment: Experiment, run_ranks: str | None) -> list[RankId]:
    if run_ranks is None:
        return experiment.ranks
    by_name = {str(rank_id): rank_id for rank_id in experiment.ranks}
    names = run_ranks.split(",")
    if unknown := [name for name in names if name not in by_name]:
        raise ConfigError(f"rank {unknown[0]!r} is none of {', '.join(by_name)}")
    return [by_name[name] for name in names]


def _endpoint(at: str) -> tuple[str, int]:
    host, _, port = at.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"{at!r} is no HOST:PORT")
    return host.strip("[]"), int(port)


def _run_processes(tasks: Sequence[Task], experiment: Experiment) -> dict[RankId, Any]:
    """What each rank has to say at its end."""
    spawn = multiprocessing.get_context("spawn")
    running: list[tuple[RankId, SpawnProcess, Connection]] = []
    try:
        for task in tasks:
            here, there = spawn.Pipe(duplex=False)
            process = spawn.Process(target=run_rank, args=(task, there), daemon=True)
            process.start()
            there.close()
            running.append((task.id, process, here))
        deadline = time.monotonic() + experiment.timeout_s * (2 + len(experiment.sizes))
        return _collect({pipe: rank_id for rank_id, _, pipe in running}, deadline)
    finally:
        for _, process, pipe in running:
            pipe.close()
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()


def _collect(pipes: dict[Connection, RankId], deadline: float) -> dict[RankId, Any]:
    """What each rank has to say. Raises TransportError with the first complaint: the others would only wait for it."""
    said: dict[RankId, Any] = {}
    left = dict(pipes)
    while left:
        ready = wait([*left], max(deadline - time.monotonic(), 0.0))
        if not ready:
            raise TransportError(f"{', '.join(map(str, left.values()))} not finished in time")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank_id = left.pop(pipe)
            try:
                kind, value = pipe.recv()
            except EOFError:
                raise TransportError(f"{rank_id} has died") from None
            if kind == "error":
                raise TransportError(str(value) if str(value).startswith(str(rank_id)) else f"{rank_id}: {value}")
            said[rank_id] = value
    return said


def _summarise(experiment: Experiment, answers: dict[RankId, Any]) -> list[Result]:
    lead = answers[RankId(Role.ATTENTION, 0)]
    results = []
    for part in lead["parts"]:
        micros = sorted(time_ns / 1e3 for time_ns in part["times_ns"])
        slowest_s = max(part["total_s"])
        num_pairs = experiment.num_attention * experiment.num_ffn
        moved = (part["out_bytes"] + part["back_bytes"]) * num_pairs * experiment.count
        results.append(
            Result(
                transport=experiment.transports[0],
                carried_by="+".join(lead["carried_by"]),
                ranks=f"{experiment.num_attention}x{experiment.num_ffn}",
                out_bytes=part["out_bytes"],
                back_bytes=part["back_bytes"],
                exchanges=len(micros),
                p50_us=round(micros[len(micros) // 2], 1),
                p99_us=round(micros[len(micros) * 99 // 100], 1),
                gb_per_s=round(moved / slowest_s / 1e9, 3),
            )
        )
    return results
