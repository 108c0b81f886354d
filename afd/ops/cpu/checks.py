"""Checks of the kernels' arguments: the native code trusts what passes here, so a wrong shape is a ValueError.

What needs the contents of a tensor (block indices, slots, lengths) is checked by the kernels themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afd.ops.cpu.abi import KEY_GROUP
from afd.ops.cpu.packed import Packed, PackedMatrix, check_panels
from afd.ops.ops import AttentionArgs, KvWrite, Rotation, RowMax

MAX_HEAD_DIM = 512

_STORAGE = (torch.float32, torch.bfloat16)


def check_attention(args: AttentionArgs) -> None:
    q, k_cache, v_cache, block_table, seq_lens, query_start, _, window, *_ = args
    check_cache(k_cache, v_cache)
    _, num_heads, head_dim = _rows_of_heads("q", q)
    _, num_kv_heads, _, cache_dim = k_cache.shape
    if q.dtype != k_cache.dtype:
        raise ValueError(f"q is {q.dtype}, the cache {k_cache.dtype}: they must agree")
    if head_dim != cache_dim:
        raise ValueError(f"q has head_dim {head_dim}, k_cache {cache_dim}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} KV heads evenly")
    num_seqs = len(seq_lens)
    if block_table.dim() != 2:
        raise ValueError(f"block_table must be [num_seqs, max_blocks]; it is {_describe(block_table)}")
    _check_index("block_table", block_table, torch.int32, (num_seqs, block_table.shape[1]))
    _check_index("seq_lens", seq_lens, torch.int32, (num_seqs,))
    _check_index("query_start", query_start, torch.int32, (num_seqs + 1,))
    if window < 0:
        raise ValueError(f"window is {window}: 0 means none, a positive number counts keys, the query's own included")


def check_rope_write_kv(q: Tensor, write: KvWrite, rotation: Rotation) -> None:
    k, v, k_cache, v_cache, slot_mapping = write
    check_cache(k_cache, v_cache)
    num_tokens = k.shape[0]
    if k.dtype != k_cache.dtype or v.dtype != k_cache.dtype:
        raise ValueError(f"k is {k.dtype}, v {v.dtype}, the cache {k_cache.dtype}: they must agree")
    for name, rows, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if _rows_of_heads(name, rows) != (num_tokens, cache.shape[1], cache.shape[3]):
            raise ValueError(f"{name} is {tuple(rows.shape)}, expected {(num_tokens, cache.shape[1], cache.shape[3])}")
    _check_index("slot_mapping", slot_mapping, torch.int64, (num_tokens,))
    _check_rope(q, k, rotation.cos, rotation.sin)


def _check_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    num_tokens, _, head_dim = _rows_of_heads("q", q)
    if q.dtype != k.dtype or num_tokens != k.shape[0] or head_dim != k.shape[2]:
        raise ValueError(f"q {_describe(q)} and k {_describe(k)} differ in tokens, head_dim or dtype")
    for name, table in (("cos", cos), ("sin", sin)):
        if (
            table.dtype != torch.float32
            or table.dim() != 2
            or table.shape[0] != num_tokens
            or not table.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be contiguous float32 [num_tokens, rotary_dim / 2]; it is {_describe(table)}"
            )
    if cos.shape != sin.shape or 2 * cos.shape[1] > head_dim:
        raise ValueError(
            f"cos {_describe(cos)} and sin {_describe(sin)} do not fit together or exceed head_dim {head_dim}"
        )


def check_norm(x: Tensor, weight: Tensor) -> None:
    _check_matrix("x", x)
    if weight.shape != x.shape[1:] or weight.dtype != torch.float32 or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous float32 {tuple(x.shape[1:])}; it is {_describe(weight)}")


def check_sample(logits: Tensor, num_rows: int) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32 or not logits.is_cpu or not logits.shape[1]:
        raise ValueError(f"logits must be a float32 matrix with columns; it is {_describe(logits)}")
    if not _unit_stride(logits):
        raise ValueError(f"logits must have rows of unit stride; it is {_describe(logits)}")
    if logits.shape[0] != num_rows:
        raise ValueError(f"{logits.shape[0]} rows of logits, parameters for {num_rows}")


def check_silu_mul(gate_up: Tensor) -> None:
    _check_storage("gate_up", gate_up)
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or not _unit_stride(gate_up):
        raise ValueError(f"gate_up must be [num_tokens, 2 * width] with unit stride; it is {_describe(gate_up)}")


def check_pack_int8(values: Tensor, scales: Tensor) -> None:
    if values.dim() != 2 or values.dtype != torch.int8 or not (values.is_cpu and values.is_contiguous()):
        raise ValueError(f"values must be a contiguous int8 matrix on the CPU; it is {_describe(values)}")
    _check_index("scales", scales, torch.float32, (values.shape[0],))


def check_unpack_rows(w: PackedMatrix, idx: Tensor) -> None:
    _check_index("idx", idx, torch.int64, (idx.shape[0],))
    if idx.shape[0] and not (int(idx.min()) >= 0 and int(idx.max()) < w.shape[0]):
        raise IndexError(f"rows {int(idx.min())} to {int(idx.max())} of a matrix with {w.shape[0]} rows")


def check_gemm(x: Tensor, w: Packed, out: Tensor) -> None:
    check_factors(x, w)
    _check_storage("out", out)
    if out.shape != (x.shape[0], w.shape[0]) or not _unit_stride(out):
        raise ValueError(f"out must be {(x.shape[0], w.shape[0])} with unit stride in its rows; it is {_describe(out)}")


def check_gemm_row_max(x: Tensor, w: Packed, best: RowMax, start: int, stop: int) -> None:
    check_factors(x, w)
    if not 0 <= start < stop <= w.shape[0]:
        raise ValueError(f"{start} to {stop} are no columns of a product with {w.shape[0]}")
    check_panels(w, start, stop)
    for found, dtype in zip(best, (torch.float32, torch.int64), strict=True):
        if found.shape != x.shape[:1] or found.dtype != dtype or not found.is_cpu or not found.is_contiguous():
            raise ValueError(f"best must be contiguous {dtype} for {x.shape[0]} rows; it is {_describe(found)}")


def check_factors(x: Tensor, w: Packed) -> None:
    _check_storage("x", x)
    if x.dim() != 2 or x.dtype != torch.bfloat16 or not _unit_stride(x):
        raise ValueError(f"x must be a bfloat16 matrix with unit stride in its rows; it is {_describe(x)}")
    if x.shape[1] != w.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)}, w {tuple(w.shape)}: the inner dimensions differ")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} strides {tensor.stride()} on {tensor.device}"


def _unit_stride(tensor: Tensor) -> bool:
    return tensor.stride(-1) == 1 or tensor.shape[-1] <= 1


def _check_storage(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _STORAGE or not tensor.is_cpu:
        raise ValueError(f"{name} must be float32 or bfloat16 on the CPU; it is {_describe(tensor)}")


def _check_matrix(name: str, tensor: Tensor) -> None:
    _check_storage(name, tensor)
    if tensor.dim() != 2 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be a contiguous matrix; it is {_describe(tensor)}")


def _rows_of_heads(name: str, tensor: Tensor) -> tuple[int, int, int]:
    """The shape of `[num_tokens, heads, dim]` whose tokens may be apart (a slice of a fused projection)."""
    _check_storage(name, tensor)
    if tensor.dim() == 3:
        num_tokens, heads, dim = tensor.shape
        _, head_stride, stride = tensor.stride()
        if (stride == 1 or dim <= 1) and (head_stride == dim or heads <= 1):
            return num_tokens, heads, dim
    raise ValueError(f"{name} must be [num_tokens, heads, dim] with its heads side by side; it is {_describe(tensor)}")


def takes_cache(k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the kernels take these blocks.

    Not those of MLA: its values are columns of K (a strided view), and its full-size keys are 576 wide.
    """
    sizes = (k_cache.shape[2], k_cache.shape[3], v_cache.shape[3])
    return all(size % KEY_GROUP == 0 for size in sizes) and max(sizes[1:]) <= MAX_HEAD_DIM and v_cache.is_contiguous()


def check_cache(k_cache: Tensor, v_cache: Tensor) -> None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _check_storage(name, cache)
        if cache.dim() != 4 or not cache.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous [num_blocks, num_kv_heads, block_size, head_dim]; it is {_describe(cache)}"
            )
        _, num_kv_heads, block_size, dim = cache.shape
        if block_size % KEY_GROUP or dim % KEY_GROUP or not (num_kv_heads and block_size and 0 < dim <= MAX_HEAD_DIM):
            raise ValueError(
                f"{name}: {num_kv_heads} KV heads, block_size {block_size}, head_dim {dim}; the latter two must be "
                f"multiples of {KEY_GROUP}, head_dim at most {MAX_HEAD_DIM}"
            )
    if k_cache.dtype != v_cache.dtype or k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(f"k_cache {_describe(k_cache)} and v_cache {_describe(v_cache)} do not belong together")


def _check_index(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape or not (tensor.is_cpu and tensor.is_contiguous()):
        raise ValueError(f"{name} must be contiguous {dtype} of shape {shape}; it is {_describe(tensor)}")
