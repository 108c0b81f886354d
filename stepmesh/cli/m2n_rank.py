"""One rank of `python -m stepmesh m2n`, in a process of its own.

Content is known to both ends: rows of a table, from a place that the exchange's ranks and number name. The first
exchanges of every size are compared byte for byte at both ends; of the timed ones the first and the last element are,
so that a stale or torn frame cannot pass for speed.
"""

from __future__ import annotations

import logging
import secrets
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from stepmesh.cli.m2n_experiment import ROW_BYTES, Experiment
from stepmesh.config import MeshConfig
from stepmesh.errors import MeshError, TransportError
from stepmesh.layout import PayloadLayout
from stepmesh.mesh import Mesh
from stepmesh.rendezvous import RendezvousClient
from stepmesh.types import (
    CombineArrived,
    CombineMeta,
    DispatchArrived,
    DispatchMeta,
    Event,
    Member,
    PeerDown,
    RankId,
    Role,
    Rows,
    WireDtype,
)

_NUM_CHECKED = 8  # exchanges of a size that are compared byte for byte; they also warm up
_OFFSETS = 1024  # places in a table where content may begin
_EPOCH = 1
_POLL_S = 0.1


class Task(NamedTuple):
    """What a rank's process needs to know."""

    id: RankId
    experiment: Experiment
    where: tuple[str, int]  # of the rendezvous
    secret: bytes


def run_rank(task: Task, pipe: Connection) -> None:
    """The process's target: sends ("done", results) or ("error", reason)."""
    logging.getLogger("stepmesh").setLevel(logging.ERROR)  # every end of a run would be a warning
    try:
        with (
            RendezvousClient(*task.where, task.secret, str(task.id), task.experiment.timeout_s) as meeting,
            Mesh(_config(task)) as mesh,
        ):
            rank = _Attention(task, mesh, meeting) if task.id.role is Role.ATTENTION else _Ffn(task, mesh, meeting)
            pipe.send(("done", rank.run()))
    except MeshError as error:
        pipe.send(("error", str(error)))
    except KeyboardInterrupt:
        pass  # the parent was interrupted as well, and says so


def _config(task: Task) -> MeshConfig:
    experiment = task.experiment
    return MeshConfig(
        id=task.id,
        incarnation=secrets.token_hex(8),
        secret=task.secret,
        config_hash=b"m2n",
        layout=_layout(experiment),
        num_streams=1,
        listen_host=experiment.host,
        transport=experiment.transports[0],
        peer_timeout_s=min(5.0, experiment.timeout_s),  # more ranks than cores are a normal case here
    )


def _layout(experiment: Experiment) -> PayloadLayout:
    """A dispatch row has 64 bytes. An answer has as many rows; twice the bytes are twice as wide elements."""
    out = WireDtype.FP32 if experiment.back == 1 else WireDtype.BF16
    return PayloadLayout(ROW_BYTES // out.itemsize, max(1, max(experiment.sizes) // ROW_BYTES), 0, out, WireDtype.FP32)


class _Content:
    """What is sent: rows of a table that both ends can make."""

    def __init__(self, seed: int, layout: PayloadLayout, dtype: WireDtype) -> None:
        rng = np.random.default_rng(seed)
        shape = (layout.max_tokens + _OFFSETS, layout.hidden)
        self._table: Rows
        if dtype is WireDtype.FP32:
            self._table = rng.random(shape, np.float32)
        else:
            self._table = rng.integers(0, 1 << 16, shape, np.uint16)

    def rows(self, num_rows: int, *numbers: int) -> Rows:
        """[num_rows, hidden] of the exchange that the numbers name."""
        start = (131 * numbers[0] + 37 * numbers[1] + 17 * numbers[2]) % _OFFSETS
        return self._table[start : start + num_rows]


class _Rank:
    """What both roles share: meeting, forming the mesh, telling right content from wrong."""

    def __init__(self, task: Task, mesh: Mesh, meeting: RendezvousClient) -> None:
        self.id = task.id
        self._experiment = task.experiment
        self._mesh = mesh
        self._meeting = meeting
        self._out = _Content(1, mesh.config.layout, mesh.config.layout.dispatch_dtype)
        self._back = _Content(2, mesh.config.layout, mesh.config.layout.combine_dtype)
        self._finishing = False  # whoever closes its mesh now has done its part
        mesh.watch_fd(meeting.fileno())

    def _gather(self, name: str, size: int, payload: Any = None, timeout_s: float | None = None) -> dict[str, Any]:
        limit_s = self._experiment.timeout_s if timeout_s is None else timeout_s
        return self._meeting.gather(name, size, payload, timeout_s=limit_s, meanwhile=self._pass_time)

    def _join(self) -> None:
        """Learn of all ranks, and be connected to those of the other role."""
        here = Member(self.id, self._mesh.config.incarnation, self._mesh.address)
        name = f"join over {self._experiment.transports[0]}"
        met = self._gather(name, len(self._experiment.ranks), here.to_dict())
        members = [Member.from_dict(fields) for fields in met.values()]
        self._mesh.set_members(_EPOCH, [member for member in members if member.id.role is not self.id.role])
        expected = {rank_id for rank_id in self._experiment.ranks if rank_id.role is not self.id.role}
        deadline = time.monotonic() + self._experiment.timeout_s
        while expected - set(self._mesh.peers):
            self._pass_time(_POLL_S)
            if time.monotonic() > deadline:
                missing = ", ".join(str(rank_id) for rank_id in sorted(expected - set(self._mesh.peers)))
                raise TransportError(f"not connected to {missing} within {self._experiment.timeout_s:g} s")

    def _pass_time(self, seconds: float) -> None:
        for event in self._mesh.progress(min(seconds, _POLL_S)):
            self._take(event)

    def _take(self, event: Event) -> None:
        if isinstance(event, PeerDown) and (event.retryable or not self._finishing):
            raise TransportError(f"{event.peer} is lost: {event.reason}")

    def _check(self, got: Rows, expected: Rows, seq: int, what: str) -> None:
        if seq <= _NUM_CHECKED:
            same = np.array_equal(got, expected)
        else:
            same = got.size == 0 or (got.item(0) == expected.item(0) and got.item(-1) == expected.item(-1))
        if not same:
            raise TransportError(f"wrong content in {what}, exchange {seq}")


class _Ffn(_Rank):
    def run(self) -> None:
        self._join()
        self._finishing = True
        experiment = self._experiment
        self._gather("done", len(experiment.ranks), timeout_s=experiment.timeout_s * (1 + len(experiment.sizes)))

    def _take(self, event: Event) -> None:
        super()._take(event)
        if isinstance(event, DispatchArrived):
            header, sender, mine = event.header, event.peer.rank, self.id.rank
            expected = self._out.rows(header.num_tokens, sender, header.layer, header.step)
            self._check(event.parts.rows, expected, header.step, f"the dispatch of {event.peer}")
            view = self._mesh.combine_view(event)
            np.copyto(view, self._back.rows(header.num_tokens, sender, mine, header.step))
            self._mesh.combine(event, CombineMeta(), view)


class _Attention(_Rank):
    def __init__(self, task: Task, mesh: Mesh, meeting: RendezvousClient) -> None:
        super().__init__(task, mesh, meeting)
        self._peers = [rank_id for rank_id in task.experiment.ranks if rank_id.role is Role.FFN]
        self._arrived: list[CombineArrived] = []

    def run(self) -> dict[str, Any]:
        experiment = self._experiment
        self._join()
        parts = []
        for place, size in enumerate(experiment.sizes):
            self._gather(f"begin {place}", experiment.num_attention)
            num_rows = size // ROW_BYTES
            for step in range(1, _NUM_CHECKED + 1):
                self._exchange(num_rows, place, step)
            began = time.perf_counter()
            times_ns = [self._exchange(num_rows, place, _NUM_CHECKED + 1 + i) for i in range(experiment.count)]
            total_s = time.perf_counter() - began
            self._mesh.idle(0)
            ended = self._gather(f"end {place}", experiment.num_attention, total_s)
            back_bytes = num_rows * self._mesh.config.layout.hidden * 4
            parts.append(
                {"out_bytes": size, "back_bytes": back_bytes, "times_ns": times_ns, "total_s": [*ended.values()]}
            )
        stats = self._mesh.stats()["peers"]
        self._finishing = True
        self._gather("done", len(experiment.ranks))
        return {"parts": parts, "carried_by": sorted({peer["transport"] for peer in stats.values()})}

    def _exchange(self, num_rows: int, layer: int, step: int) -> int:
        """One dispatch to all FFN ranks and all their answers; its time in ns."""
        content = self._out.rows(num_rows, self.id.rank, layer, step)
        began = time.perf_counter_ns()
        view = self._mesh.dispatch_view(self._peers[0], 0, num_rows, 0)
        np.copyto(view.rows, content)
        self._mesh.dispatch(self._peers, DispatchMeta(0, _EPOCH, step, layer), view)
        deadline = time.monotonic() + self._experiment.timeout_s
        while len(self._arrived) < len(self._peers):
            self._pass_time(_POLL_S)
            if time.monotonic() > deadline:
                raise TransportError(
                    f"{len(self._arrived)} of {len(self._peers)} answers in {self._experiment.timeout_s:g} s"
                )
        elapsed = time.perf_counter_ns() - began
        for event in self._arrived:
            expected = self._back.rows(num_rows, self.id.rank, event.peer.rank, step)
            self._check(event.rows, expected, step, f"the answer of {event.peer}")
        self._arrived.clear()
        return elapsed

    def _take(self, event: Event) -> None:
        super()._take(event)
        if isinstance(event, CombineArrived):
            self._arrived.append(event)
