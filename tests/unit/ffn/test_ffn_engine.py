"""The FFN worker's loop against a scripted mesh."""

from __future__ import annotations

import numpy as np
import torch

from afd.ffn.engine import MAX_WAIT_S, FFNEngine
from afd.ffn.gang import GangTable
from afd.ffn.python_path import PythonPath
from afd.model.halves import Dispatch
from stepmesh.layout import PayloadLayout
from stepmesh.types import DispatchArrived, DispatchParts, FrameKind, Header, RankId, Role, WireDtype

HIDDEN = 8


class Layer:
    """A dense layer of a model's spec."""

    class ffn:
        top_k = 0
        num_experts = 0


class Half:
    """Doubles its rows."""

    dtype = torch.float32

    class spec:
        layers = (Layer,)

    def layer(self, dispatch: Dispatch) -> torch.Tensor:
        return 2 * dispatch.rows


class BusyMesh:
    """Two attention workers that never pause: each call brings a dispatch of the one that was just answered."""

    def __init__(self) -> None:
        self.next = [0, 1]
        self.answers: list[tuple[int, np.ndarray]] = []
        self.waits: list[float] = []

    def progress(self, timeout_s: float) -> list[DispatchArrived]:
        self.waits.append(timeout_s)
        ranks, self.next = self.next, []
        return [dispatch(rank) for rank in ranks]

    def combine(self, arrival: DispatchArrived, meta: object, rows: np.ndarray) -> None:
        self.answers.append((arrival.peer.rank, rows))
        self.next.append(arrival.peer.rank)


def dispatch(rank: int) -> DispatchArrived:
    zeros = dict.fromkeys(Header._fields, 0)
    header = Header(**{**zeros, "magic": b"", "kind": int(FrameKind.DISPATCH), "epoch": 1, "num_tokens": 1})
    return DispatchArrived(RankId(Role.ATTENTION, rank), header, DispatchParts(np.full((1, HIDDEN), rank, np.float32)))


def engine(mesh: BusyMesh) -> FFNEngine:
    layout = PayloadLayout(
        hidden=HIDDEN, max_tokens=4, max_top_k=1, dispatch_dtype=WireDtype.FP32, combine_dtype=WireDtype.FP32
    )
    return FFNEngine(Half(), mesh, GangTable(1, 2), PythonPath(Half(), mesh, layout))


def test_a_rank_that_always_has_work_comes_back_after_each_batch():
    mesh = BusyMesh()
    ffn = engine(mesh)
    for turn in range(1, 6):
        ffn.run_once(10.0)
        assert ffn.totals.num_batches == turn
    assert mesh.waits == [MAX_WAIT_S, *[0.0] * 5], "it waits only while nothing is complete"
    assert [rank for rank, _ in mesh.answers[:4]] == [0, 1, 0, 1]
    assert all((rows == 2 * rank).all() for rank, rows in mesh.answers)
    assert ffn.totals.wait_s == 0.0
