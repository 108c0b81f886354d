"""FFN kinds over one rank's shard: rows in, pre-weighted partial rows out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from afd import ops as kernels
from afd.model.device import to_device
from afd.model.expert_load import ExpertLoad
from afd.model.primitives import Weight, linear, silu_mul
from afd.ops import Packed
from afd.ops.cpu.layer import ExpertsCall, SwiGluCall


@dataclass(slots=True)
class Dispatch:
    """What crosses from the attention half to every FFN rank at one layer. Zero rows are ordinary.

    rows [n, hidden]; expert_ids [n, k] int32 and expert_weights [n, k] float32 on MoE layers, None on dense ones.
    row_idx [n] int32: place of each row in its sender's micro-batch, for `ffn_parallel = ep`; None = 0..n-1.
    scales [n, groups] float32: of rows that are in the wire's float8 already; None = rows of a half's own type.

    On a GPU's FFN worker, rows are in its memory and the rest in the host's: what the routing selects is worked out
    there, so that nobody waits for the GPU to tell.
    """

    layer: int
    rows: Tensor
    expert_ids: Tensor | None = None
    expert_weights: Tensor | None = None
    row_idx: Tensor | None = None
    scales: Tensor | None = None


class Ffn(Protocol):
    """One layer's FFN: float32 or activation-dtype partial rows [n, hidden]."""

    def __call__(self, dispatch: Dispatch) -> Tensor: ...


class SwiGlu:
    """down(silu(gate(h)) * up(h)) over a slice of the intermediate dimension, which may be empty.

    gate_up [2 * slice, hidden], gate first; down [hidden, slice].  limit: of the clamped form, 0 = none.
    """

    def __init__(self, gate_up: Weight, down: Weight, limit: float = 0.0):
        self.gate_up = gate_up
        self.down = down
        self.limit = limit
        self.call: SwiGluCall | None = None  # where the kernels are native and the weights packed for them
        native = kernels.native_kernels()
        if native is not None and isinstance(gate_up, Packed) and isinstance(down, Packed):
            self.call = SwiGluCall(native, gate_up, down, limit)

    def __call__(self, rows: Tensor) -> Tensor:
        """rows [n, hidden] -> [n, hidden], in the same dtype."""
        if self.call is not None:
            return self.call(rows)
        return linear(silu_mul(linear(rows, self.gate_up), self.limit), self.down)


@dataclass(slots=True)
class DenseFfn:
    swiglu: SwiGlu

    def __call__(self, dispatch: Dispatch) -> Tensor:
        return self.swiglu(dispatch.rows)


@dataclass(slots=True)
class SharedExpert:
    """The expert that sees every token. (first, stride): the rows that this rank computes, by Dispatch.row_idx."""

    swiglu: SwiGlu
    first: int = 0
    stride: int = 1

    def add_to(self, out: Tensor, dispatch: Dispatch) -> None:
        """Add the shared expert's rows to out [n, hidden] float32."""
        if self.stride == 1:
            out += self.swiglu(dispatch.rows)
        elif dispatch.row_idx is None:
            out[self.first :: self.stride] += self.swiglu(dispatch.rows[self.first :: self.stride])
        else:
            mine = (dispatch.row_idx % self.stride == self.first).nonzero()[:, 0]
            mine = to_device(mine, out.device)
            out.index_add_(0, mine, self.swiglu(dispatch.rows[mine]).float())


class MoeFfn:
    """The routed experts that this rank holds, and its part of the shared expert.

    first_expert: global id of experts[0]. All experts have one shape.
    """

    def __init__(self, experts: Sequence[SwiGlu], first_expert: int, shared: SharedExpert | None):
        self._experts = experts
        self._first_expert = first_expert
        self._shared = shared
        self._call = _experts_call(experts, first_expert)
        self.load = ExpertLoad(first_expert, [0] * len(experts))

    def __call__(self, dispatch: Dispatch) -> Tensor:
        """Sum over local experts e of w_e * expert_e(row), plus the shared part; float32 accumulation."""
        assert dispatch.expert_ids is not None and dispatch.expert_weights is not None, "an MoE layer needs routing"
        rows = dispatch.rows
        out = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        if rows.shape[0] == 0:
            return out
        if self._shared is not None:
            self._shared.add_to(out, dispatch)
        if self._call is None:
            self._add_routed(out, rows, dispatch.expert_ids, dispatch.expert_weights)
        else:
            measured = self.load.begin_batch()
            routed = self._call.add_to(out, rows, dispatch.expert_ids, dispatch.expert_weights, measured)
            self.load.add(*routed)
        return out

    def _add_routed(self, out: Tensor, rows: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> None:
        """Sort the (token, expert) pairs by expert, then one GEMM pair per expert that has tokens, in id order."""
        num_local = len(self._experts)
        local = (expert_ids - self._first_expert).flatten().long()
        pairs = ((local >= 0) & (local < num_local)).nonzero()[:, 0]
        if pairs.shape[0] == 0:
            return
        order = pairs[torch.argsort(local[pairs], stable=True)]
        counts = torch.bincount(local[order], minlength=num_local).tolist()
        tokens = to_device(order // expert_ids.shape[1], rows.device)
        weights = to_device(expert_weights.flatten()[order][:, None], rows.device)
        measured = self.load.begin_batch()
        stop = 0
        for e, count in enumerate(counts):
            if not count:
                continue
            start, stop = stop, stop + count
            mine = tokens[start:stop]
            answers = self._experts[e](rows[mine])
            self.load.num_tokens[e] += count
            if measured:
                self.load.measure(e, answers)
            out.index_add_(0, mine, answers.float() * weights[start:stop])


def _experts_call(experts: Sequence[SwiGlu], first_expert: int) -> ExpertsCall | None:
    """All experts in one native call, where their weights are packed for it."""
    native = kernels.native_kernels()
    gate_up = [e.gate_up for e in experts if isinstance(e.gate_up, Packed)]
    down = [e.down for e in experts if isinstance(e.down, Packed)]
    if native is None or not experts or len(gate_up) < len(experts) or len(down) < len(experts):
        return None
    return ExpertsCall(native, gate_up, down, first_expert, experts[0].limit)
