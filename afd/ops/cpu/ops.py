"""`Ops` by the native kernels; in torch where those do not take what they are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from afd.host.memory import HostMemory
from afd.ops.cpu import checks
from afd.ops.cpu.binding import NativeKernels
from afd.ops.cpu.layer import AttentionLayerCall, ExpertsCall, NativeWeights, SwiGluCall
from afd.ops.cpu.packed import Packed, PackedInt8, PackedMatrix
from afd.ops.int8 import Int8Weight
from afd.ops.ops import (
    AttentionArgs,
    Experts,
    KvWrite,
    LayerCall,
    LayerShape,
    LayerWeights,
    Rotary,
    Rotation,
    RowMax,
    SwiGlu,
    Weight,
    WeightMemory,
)
from afd.ops.rope import AngleTable
from afd.ops.sample_rows import SampledRows, SampleRow
from afd.ops.torch_ops import TorchOps, attend_in_turn


class CpuOps(TorchOps):
    """Implements `ops.Ops` with as many threads as torch uses (`torch.set_num_threads`).

    The result for a row depends on that row and its context alone, bit for bit: not on the batch it is computed in, on
    the way a prompt is cut into chunks, or on the number of threads. Exceptions are torch's GEMMs, which float32
    matrices go through. ValueError for shapes, dtypes, lengths and block indices that do not fit, before anything is
    written.
    """

    def __init__(self, kernels: NativeKernels, dtype: torch.dtype):
        super().__init__(dtype)
        self.kernels = kernels
        self.name = kernels.name
        self._packs = kernels.vectorised

    # -- weights

    def weight_memory(self) -> WeightMemory:
        return HostMemory()

    def prepare(self, weight: Tensor | Int8Weight) -> Weight:
        """Packed: bfloat16 matrices, and int8 ones for bfloat16 activations, where the processor has vectors."""
        if not self._packs or len(weight.shape) != 2:
            return weight
        if isinstance(weight, Int8Weight):
            return self._prepare_int8(weight) if self.dtype is torch.bfloat16 else weight
        if weight.dtype is not torch.bfloat16 or not weight.is_contiguous() or weight.shape[1] % 2:
            return weight
        self.kernels.pack(weight)
        return PackedMatrix(weight)

    def _prepare_int8(self, weight: Int8Weight) -> PackedInt8:
        checks.check_pack_int8(weight.values, weight.scales)
        return PackedInt8.pack(weight.values, weight.scales, self.kernels.int8_order)

    # -- dense

    def embed(self, ids: Tensor, table: Weight) -> Tensor:
        if not isinstance(table, PackedMatrix):
            return super().embed(ids, table)
        checks.check_unpack_rows(table, ids)
        out = torch.empty(ids.shape[0], table.shape[1], dtype=torch.float32)
        self.kernels.unpack_rows(table, ids, out, torch.get_num_threads())
        return out

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        if not isinstance(weight, Packed):
            return super().linear(x, weight)
        out = x.new_empty(x.shape[0], weight.shape[0])
        self._gemm(x, weight, out)
        return out

    def norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or x.dtype
        checks.check_norm(x, weight)
        direct = dtype in (x.dtype, torch.bfloat16)
        out = torch.empty(x.shape, dtype=dtype if direct else x.dtype)
        self.kernels.add_rms_norm(x, (), weight, eps, out)
        return out if direct else out.to(dtype)

    def silu_mul(self, gate_up: Tensor, limit: float) -> Tensor:
        checks.check_silu_mul(gate_up)
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        self.kernels.silu_mul(gate_up, limit, out)
        return out

    def swiglu(self, gate_up: Weight, down: Weight, limit: float = 0.0) -> SwiGlu:
        if isinstance(gate_up, Packed) and isinstance(down, Packed):
            return SwiGluCall(self.kernels, gate_up, down, limit)
        return super().swiglu(gate_up, down, limit)

    def head_logits(self, x: Tensor, head: Weight, out: Tensor, start: int, stop: int) -> None:
        if isinstance(head, Packed):
            self._gemm(x, head.narrow_rows(start, stop), out[:, start:stop])
        else:
            super().head_logits(x, head, out, start, stop)

    def head_max(self, x: Tensor, head: Weight, best: RowMax, start: int, stop: int) -> None:
        if not isinstance(head, Packed):
            super().head_max(x, head, best, start, stop)
            return
        checks.check_gemm_row_max(x, head, best, start, stop)
        self.kernels.gemm_row_max(x, head, best, start, stop, torch.get_num_threads())

    def _gemm(self, x: Tensor, weight: Packed, out: Tensor) -> None:
        checks.check_gemm(x, weight, out)
        self.kernels.gemm(x, weight, out, torch.get_num_threads())

    # -- attention

    def rotary(self, frequencies: Tensor, factor: float) -> Rotary:
        return AngleTable(frequencies, factor)

    def rope_write_kv(self, q: Tensor, write: KvWrite, rotation: Rotation) -> Tensor:
        """See `Ops`. Where the kernels take the cache, q is rotated in place, and a negative slot skips the token."""
        if not checks.takes_cache(write.k_cache, write.v_cache):
            return super().rope_write_kv(q, write, rotation)
        checks.check_rope_write_kv(q, write, rotation)
        self.kernels.rope_write_kv(q, write, rotation)
        return q

    def paged_attention(self, args: AttentionArgs) -> Tensor:
        """See `Ops`. Where the kernels take the cache, block table entries that no query may see are not read."""
        if not checks.takes_cache(args.k_cache, args.v_cache):
            return attend_in_turn(args)
        checks.check_attention(args)
        q = args.q
        out = q.new_empty(q.shape[0], q.shape[1], args.v_cache.shape[3])
        self.kernels.paged_attention(args, out, torch.get_num_threads())
        return out

    def attention_layer(self, weights: LayerWeights, shape: LayerShape) -> LayerCall | None:
        matrices = (weights.qkv, weights.o, *([] if weights.q_up is None else [weights.q_up]))
        if not all(isinstance(matrix, Packed) for matrix in matrices):
            return None
        native = NativeWeights(*[getattr(weights, name) for name in NativeWeights._fields])
        return AttentionLayerCall(self.kernels, native, shape)

    # -- experts

    def experts(self, experts: Sequence[SwiGlu], first_expert: int) -> Experts:
        gate_up = [e.gate_up for e in experts if isinstance(e.gate_up, Packed)]
        down = [e.down for e in experts if isinstance(e.down, Packed)]
        if not experts or len(gate_up) < len(experts) or len(down) < len(experts):
            return super().experts(experts, first_expert)
        return ExpertsCall(self.kernels, gate_up, down, first_expert, experts[0].limit)

    # -- tokens

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> SampledRows:
        logits = logits.detach()
        checks.check_sample(logits, len(rows))
        return self.kernels.sample(logits, rows, torch.get_num_threads())

    # -- threads

    def start_threads(self, num_threads: int) -> None:
        self.kernels.start_threads(num_threads)

    def close(self) -> None:
        self.kernels.close()
