"""FFN kinds over one rank's shard: rows in, pre-weighted partial rows out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from afd.model.expert_load import ExpertLoad
from afd.ops.device import to_device
from afd.ops.ops import Ops, Routing, SwiGlu


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

    def __init__(self, ops: Ops, experts: Sequence[SwiGlu], first_expert: int, shared: SharedExpert | None):
        self._experts = experts
        self._shared = shared
        self._routed = ops.experts(experts, first_expert)
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
        routing = Routing(dispatch.expert_ids, dispatch.expert_weights)
        self.load.add(*self._routed.add_to(out, rows, routing, self.load.begin_batch()))
        return out
