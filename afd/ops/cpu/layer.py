"""A layer's half in one native call: what lies between two exchanges, without Python in between.

bfloat16 activations, packed weights of either kind, a bfloat16 KV cache; float32 residual. Each class is built once
per layer, keeps its weights alive, and is called from one thread at a time. Without the native kernels there is nothing
here to call (`afd.ops.native_kernels`); the same composed from single kernels is what it is tested against.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from afd.ops.cpu.binding import DTYPE_CODES, Matrix, NativeKernels, error_of
from afd.ops.cpu.packed import Packed
from afd.ops.ops import MAX_PARTIALS


class _SwiGlu(ctypes.Structure):
    """AfdSwiGlu of src/api.h."""

    _fields_ = (
        ("gate_up", Matrix),
        ("down", Matrix),
        ("hidden", c_int32),
        ("width", c_int32),
        ("limit", c_float),
    )


class _Experts(ctypes.Structure):
    """AfdExperts of src/api.h."""

    _fields_ = (
        ("gate_up", POINTER(Matrix)),
        ("down", POINTER(Matrix)),
        ("first", c_int32),
        ("num_local", c_int32),
        ("hidden", c_int32),
        ("width", c_int32),
        ("limit", c_float),
    )


class _Layer(ctypes.Structure):
    """AfdAttentionLayer of src/api.h."""

    _fields_ = (
        ("attn_norm", c_void_p),
        ("ffn_norm", c_void_p),
        ("qkv", Matrix),
        ("qkv_bias", c_void_p),
        ("q_norm", c_void_p),
        ("q_up", Matrix),
        ("q_head_norm", c_void_p),
        ("k_head_norm", c_void_p),
        ("o", Matrix),
        ("o_bias", c_void_p),
        *((name, c_int32) for name in ("hidden", "q_rank", "num_heads", "num_kv_heads", "head_dim", "v_dim")),
        *((name, c_int32) for name in ("head_gate", "half", "interleaved", "window")),
        ("scale", c_float),
        ("eps", c_float),
    )


class _Batch(ctypes.Structure):
    """AfdBatch of src/api.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("cos", "sin", "slots", "block_table", "seq_lens", "query_start")),
        ("table_stride", c_int64),
        ("num_tokens", c_int32),
        ("num_seqs", c_int32),
    )


class SwiGluCall:
    """down(silu(gate(x)) * up(x)); gate_up [2 * width, hidden], down [hidden, width]; limit: of the clamped form."""

    def __init__(self, kernels: NativeKernels, gate_up: Packed, down: Packed, limit: float):
        hidden, width = down.shape
        if gate_up.shape != (2 * width, hidden):
            raise ValueError(f"gate_up is {tuple(gate_up.shape)}, expected {(2 * width, hidden)}")
        self._kernels = kernels
        self._hidden = hidden
        self._weights = (gate_up, down)
        self._args = _SwiGlu(kernels.matrix(gate_up), kernels.matrix(down), hidden, width, limit)
        self.args_address = ctypes.addressof(self._args)

    def __call__(self, rows: Tensor) -> Tensor:
        """rows bfloat16 [n, hidden], which may be apart in memory -> bfloat16 [n, hidden]."""
        assert rows.dtype is torch.bfloat16 and rows.shape[1] == self._hidden and rows.stride(1) == 1
        out = torch.empty(rows.shape, dtype=torch.bfloat16)
        status = self._kernels.library.afd_swiglu(
            self._kernels.isa,
            torch.get_num_threads(),
            byref(self._args),
            rows.data_ptr(),
            rows.stride(0),
            rows.shape[0],
            out.data_ptr(),
        )
        if status:
            raise error_of(status, 0, 0)
        return out


class ExpertsCall:
    """The experts first_expert, first_expert + 1, ... of an MoE layer, all of one shape."""

    def __init__(
        self,
        kernels: NativeKernels,
        gate_up: Sequence[Packed],
        down: Sequence[Packed],
        first_expert: int,
        limit: float,
    ):
        hidden, width = down[0].shape
        for matrices, shape in ((gate_up, (2 * width, hidden)), (down, (hidden, width))):
            if len(matrices) != len(down) or any(matrix.shape != shape for matrix in matrices):
                raise ValueError(f"the experts' weights are not all {shape}")
        self._kernels = kernels
        self._hidden = hidden
        self._num_local = len(down)
        self._weights = (list(gate_up), list(down))
        tables = [(Matrix * len(down))(*[kernels.matrix(m) for m in matrices]) for matrices in self._weights]
        self._args = _Experts(*tables, first_expert, len(down), hidden, width, limit)

    def add_to(
        self, out: Tensor, rows: Tensor, expert_ids: Tensor, expert_weights: Tensor, measured: bool
    ) -> tuple[list[int], list[float] | None]:
        """out [n, hidden] float32 += the sum over local experts e of weight_e * e(row), in the experts' order.

        Returns the rows of each expert and, if measured, the sum of its outputs' mean squares before weighting.
        """
        ids, weights, rows = expert_ids.contiguous(), expert_weights.contiguous(), rows.contiguous()
        assert ids.dtype is torch.int32 and weights.dtype is torch.float32 and ids.shape == weights.shape
        assert rows.dtype is torch.bfloat16 and rows.shape == (ids.shape[0], self._hidden)
        assert out.dtype is torch.float32 and out.shape == rows.shape and out.is_contiguous()
        counts = (c_int32 * self._num_local)()
        squares = (c_double * self._num_local)() if measured else None
        status = self._kernels.library.afd_experts(
            self._kernels.isa,
            torch.get_num_threads(),
            byref(self._args),
            rows.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            rows.shape[0],
            ids.shape[1],
            out.data_ptr(),
            counts,
            squares,
        )
        if status:
            raise error_of(status, 0, 0)
        return list(counts), None if squares is None else list(squares)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer as AfdAttentionLayer of src/api.h describes it; None = it has none."""

    attn_norm: Tensor
    ffn_norm: Tensor
    qkv: Packed
    o: Packed
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    q_up: Packed | None = None
    q_head_norm: Tensor | None = None
    k_head_norm: Tensor | None = None
    o_bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerShape:
    """rotary_half: half of the rotated dimensions.  q_rank: 0 unless MFA.  window: 0 = none."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    q_rank: int
    head_gate: bool
    rotary_half: int
    interleaved: bool
    window: int
    scale: float
    eps: float


class LayerBatch:
    """A micro-batch's tokens as native calls take them: tables as in `afd.ops.paged_attention`, `rope_write_kv`."""

    def __init__(
        self, cos: Tensor, sin: Tensor, slots: Tensor, block_table: Tensor, seq_lens: Tensor, query_start: Tensor
    ):
        tensors = (cos, sin, slots, block_table, seq_lens, query_start)
        dtypes = (torch.float32, torch.float32, torch.int64, torch.int32, torch.int32, torch.int32)
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            if tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
                raise ValueError(f"a table is {tensor.dtype} {tuple(tensor.shape)}, expected contiguous {dtype}")
        num_tokens, num_seqs = slots.shape[0], seq_lens.shape[0]
        if cos.shape[0] != num_tokens or sin.shape != cos.shape or query_start.shape[0] != num_seqs + 1:
            raise ValueError(f"a batch's tables differ in tokens ({num_tokens}) or sequences ({num_seqs})")
        self._tensors = tensors
        self.num_tokens = num_tokens
        self.rotary_half = cos.shape[1]
        pointers = [tensor.data_ptr() for tensor in tensors]
        self._args = _Batch(*pointers, block_table.shape[1], num_tokens, num_seqs)
        self.args_pointer = byref(self._args)
        self.args_address = ctypes.addressof(self._args)


class AttentionLayerCall:
    """Norm, projections, rotation, cache write, attention, output projection, residual and the next norm."""

    def __init__(self, kernels: NativeKernels, weights: LayerWeights, shape: LayerShape):
        hidden = weights.o.shape[0]
        q_width = shape.num_heads * shape.head_dim
        widths = [shape.q_rank or q_width, shape.num_kv_heads * shape.head_dim, shape.num_kv_heads * shape.v_head_dim]
        _expect("qkv", weights.qkv, (sum(widths) + shape.head_gate * shape.num_heads, hidden))
        _expect("o", weights.o, (hidden, shape.num_heads * shape.v_head_dim))
        _expect("q_up", weights.q_up, (q_width, shape.q_rank), needed=shape.q_rank > 0)
        _expect("q_norm", weights.q_norm, (shape.q_rank,), torch.float32, needed=shape.q_rank > 0)
        _expect("attn_norm", weights.attn_norm, (hidden,), torch.float32)
        _expect("ffn_norm", weights.ffn_norm, (hidden,), torch.float32)
        _expect("qkv_bias", weights.qkv_bias, (sum(widths),), torch.bfloat16, needed=False)
        _expect("o_bias", weights.o_bias, (hidden,), torch.bfloat16, needed=False)
        for name, norm in (("q_head_norm", weights.q_head_norm), ("k_head_norm", weights.k_head_norm)):
            _expect(name, norm, (shape.head_dim,), torch.float32, needed=False)
        self._kernels = kernels
        self._weights = weights
        self._hidden = hidden
        self._shape = shape
        self._cache_shape = (shape.num_kv_heads, shape.head_dim, shape.v_head_dim)
        self._partials = (c_void_p * MAX_PARTIALS)()
        self._detail = (c_int32 * 2)()
        self._args = _Layer(
            _pointer(weights.attn_norm),
            _pointer(weights.ffn_norm),
            kernels.matrix(weights.qkv),
            _pointer(weights.qkv_bias),
            _pointer(weights.q_norm),
            kernels.matrix(weights.q_up),
            _pointer(weights.q_head_norm),
            _pointer(weights.k_head_norm),
            kernels.matrix(weights.o),
            _pointer(weights.o_bias),
            hidden,
            shape.q_rank,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.v_head_dim,
            shape.head_gate,
            shape.rotary_half,
            shape.interleaved,
            shape.window,
            shape.scale,
            shape.eps,
        )
        self._args_pointer = byref(self._args)
        self.args_address = ctypes.addressof(self._args)

    def __call__(
        self, x: Tensor, partials: Sequence[Tensor], batch: LayerBatch, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        """Add partials, then the layer's attention, to x [n, hidden] float32 in place; store K and V -> ffn_norm(x).

        partials: at most MAX_PARTIALS, each like x, all float32 or all bfloat16. The result is bfloat16. ValueError
        for a block or slot that is not in the cache, before anything is written.
        """
        num_blocks, num_kv_heads, block_size, head_dim = k_cache.shape
        assert (num_kv_heads, head_dim, v_cache.shape[3]) == self._cache_shape
        assert k_cache.dtype is v_cache.dtype is torch.bfloat16 and batch.rotary_half == self._shape.rotary_half
        assert x.dtype is torch.float32 and x.shape == (batch.num_tokens, self._hidden) and x.is_contiguous()
        assert len(partials) <= MAX_PARTIALS
        partial_dtype = partials[0].dtype if partials else torch.float32
        rows = torch.empty(x.shape, dtype=torch.bfloat16)
        pointers, detail = self._partials, self._detail
        for i, partial in enumerate(partials):
            assert partial.shape == x.shape and partial.dtype is partial_dtype and partial.is_contiguous()
            pointers[i] = partial.data_ptr()
        status = self._kernels.library.afd_attention_layer(
            self._kernels.isa,
            torch.get_num_threads(),
            self._args_pointer,
            batch.args_pointer,
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            num_blocks,
            block_size,
            x.data_ptr(),
            pointers,
            len(partials),
            DTYPE_CODES[partial_dtype],
            rows.data_ptr(),
            detail,
        )
        if status:
            raise error_of(status, detail[0], detail[1])
        return rows


def _pointer(weight: Tensor | None) -> int | None:
    return None if weight is None else weight.data_ptr()


def _expect(
    name: str,
    weight: Tensor | Packed | None,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    *,
    needed: bool = True,
) -> None:
    if weight is None:
        if needed:
            raise ValueError(f"{name} is missing")
        return
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name} is {tuple(weight.shape)}, expected {shape}")
    if isinstance(weight, Tensor) and (weight.dtype is not dtype or not weight.is_contiguous()):
        raise ValueError(f"{name} is {weight.dtype}, expected contiguous {dtype}")
