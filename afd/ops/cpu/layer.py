"""A layer's half in one native call: what lies between two exchanges, without Python in between.

bfloat16 activations, packed weights of either kind, a bfloat16 KV cache; float32 residual. Each class is built once
per layer, keeps its weights alive, and is called from one thread at a time. Without the native kernels there is nothing
here to call; the same composed from single kernels is what it is tested against.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_double, c_int32, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from afd.ops.cpu.abi import MAX_PARTIALS, AfdAttentionLayer, AfdBatch, AfdExperts, AfdMatrix, AfdSwiGlu
from afd.ops.cpu.binding import DTYPE_CODES, NativeKernels, error_of
from afd.ops.cpu.checks import takes_cache
from afd.ops.cpu.packed import Packed
from afd.ops.ops import LayerShape, LayerTables, Routing


class SwiGluCall:
    """Implements `ops.SwiGlu`: down(silu(gate(x)) * up(x)); gate_up [2 * width, hidden], down [hidden, width]."""

    def __init__(self, kernels: NativeKernels, gate_up: Packed, down: Packed, limit: float):
        hidden, width = down.shape
        if gate_up.shape != (2 * width, hidden):
            raise ValueError(f"gate_up is {tuple(gate_up.shape)}, expected {(2 * width, hidden)}")
        self.kernels = kernels
        self.gate_up = gate_up
        self.down = down
        self.limit = limit
        self._hidden = hidden
        self._args = AfdSwiGlu(kernels.matrix(gate_up), kernels.matrix(down), hidden, width, limit)
        self.args_address = ctypes.addressof(self._args)

    def __call__(self, rows: Tensor) -> Tensor:
        """rows bfloat16 [n, hidden], which may be apart in memory -> bfloat16 [n, hidden]."""
        assert rows.dtype is torch.bfloat16 and rows.shape[1] == self._hidden and rows.stride(1) == 1
        out = torch.empty(rows.shape, dtype=torch.bfloat16)
        status = self.kernels.library.afd_swiglu(
            self.kernels.isa,
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
    """Implements `ops.Experts`: first_expert, first_expert + 1, ... of an MoE layer, all of one shape."""

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
        tables = [(AfdMatrix * len(down))(*[kernels.matrix(m) for m in matrices]) for matrices in self._weights]
        self._args = AfdExperts(*tables, first_expert, len(down), hidden, width, limit)

    def add_to(
        self, out: Tensor, rows: Tensor, routing: Routing, measured: bool
    ) -> tuple[list[int], list[float] | None]:
        """See `ops.Experts`."""
        ids, weights, rows = routing.ids.contiguous(), routing.weights.contiguous(), rows.contiguous()
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


class NativeWeights(NamedTuple):
    """`ops.LayerWeights` whose matrices are packed."""

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


class LayerBatch:
    """A micro-batch's tokens as native calls take them."""

    def __init__(self, tables: LayerTables):
        dtypes = (torch.float32, torch.float32, torch.int64, torch.int32, torch.int32, torch.int32)
        for tensor, dtype in zip(tables, dtypes, strict=True):
            if tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
                raise ValueError(f"a table is {tensor.dtype} {tuple(tensor.shape)}, expected contiguous {dtype}")
        cos, sin, slots, block_table, seq_lens, query_start = tables
        num_tokens, num_seqs = slots.shape[0], seq_lens.shape[0]
        if cos.shape[0] != num_tokens or sin.shape != cos.shape or query_start.shape[0] != num_seqs + 1:
            raise ValueError(f"a batch's tables differ in tokens ({num_tokens}) or sequences ({num_seqs})")
        self._tables = tables
        self.num_tokens = num_tokens
        self.rotary_half = cos.shape[1]
        pointers = [tensor.data_ptr() for tensor in tables]
        self._args = AfdBatch(*pointers, block_table.shape[1], num_tokens, num_seqs)
        self.args_pointer = byref(self._args)
        self.args_address = ctypes.addressof(self._args)


class AttentionLayerCall:
    """Implements `ops.LayerCall`.

    It is norm, projections, rotation, cache write, attention, output projection, residual and the next norm.
    """

    def __init__(self, kernels: NativeKernels, weights: NativeWeights, shape: LayerShape):
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
        self.kernels = kernels
        self._weights = weights
        self._hidden = hidden
        self._shape = shape
        self._cache_shape = (shape.num_kv_heads, shape.head_dim, shape.v_head_dim)
        self._partials = (c_void_p * MAX_PARTIALS)()
        self._detail = (c_int32 * 2)()
        self._args = AfdAttentionLayer(
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

    def takes(self, num_partials: int, k_cache: Tensor, v_cache: Tensor) -> bool:
        """Whether these caches can be read and written, and so many partials added."""
        native = k_cache.dtype is torch.bfloat16 and k_cache.is_cpu and takes_cache(k_cache, v_cache)
        return native and num_partials <= MAX_PARTIALS

    def batch(self, tables: LayerTables) -> LayerBatch:
        """A micro-batch as calls take it; ValueError for tables of other types, or that do not belong together."""
        return LayerBatch(tables)

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
        status = self.kernels.library.afd_attention_layer(
            self.kernels.isa,
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
