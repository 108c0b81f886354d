"""Paged attention and KV writes: the one place where the model meets the attention kernels.

On the CPU these are AFD's native kernels; elsewhere, and for shapes that those do not take, plain torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from afd import ops as kernels
from afd.model.batch import AttentionBatch
from afd.model.rope import rotate

GATHER_TOKENS = 1 << 17
"""Cached tokens that `torch_decode_attention` copies at once: bounds its memory to that of so many."""

_NATIVE_MULTIPLE = 8  # of block size and head dimensions, as afd.ops asks
_NATIVE_MAX_HEAD_DIM = 512


def rope_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, Tensor],
    interleaved: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
) -> Tensor:
    """Rotate q [n, num_heads, head_dim] and k [n, num_kv_heads, head_dim], store k and v at their slots, return q.

    tables: (cos, sin) of the batch's positions, [n, rotary_dim / 2] float32.  q may be rotated in place.
    """
    cos, sin = tables
    if runs_natively(k_cache, v_cache):
        kernels.rope_write_kv(q, k, v, cos, sin, k_cache, v_cache, batch.slot_mapping, interleaved)
        return q
    write_kv(rotate(k, cos, sin, interleaved), v, k_cache, v_cache, batch.slot_mapping)
    return rotate(q, cos, sin, interleaved)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store k [n, num_kv_heads, head_dim] and v at their slots of [num_blocks, num_kv_heads, block_size, head_dim]."""
    write_cache(k, k_cache, slot_mapping)
    write_cache(v, v_cache, slot_mapping)


def write_cache(rows: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Store rows [n, num_kv_heads, width] at their slots of one [num_blocks, num_kv_heads, block_size, width]."""
    block_size = cache.shape[2]
    cache[slot_mapping // block_size, :, slot_mapping % block_size] = rows


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float, window: int = 0
) -> Tensor:
    """Causal attention of q [n, num_heads, head_dim] over the cached contexts -> [n, num_heads, v_head_dim]."""
    if runs_natively(k_cache, v_cache):
        return kernels.paged_attention(
            q,
            k_cache,
            v_cache,
            batch.block_table,
            batch.seq_lens,
            batch.query_start,
            scale,
            window,
            num_threads=torch.get_num_threads(),
        )
    if not k_cache.is_cpu and batch.num_seqs == q.shape[0]:
        return torch_decode_attention(q, k_cache, v_cache, batch, scale, window)
    return torch_paged_attention(q, k_cache, v_cache, batch, scale, window)


def runs_natively(k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the kernels take these blocks.

    Not those of MLA: its values are columns of K (a strided view), and its full-size keys are 576 wide.
    """
    sizes = (k_cache.shape[2], k_cache.shape[3], v_cache.shape[3])
    fits = all(size % _NATIVE_MULTIPLE == 0 for size in sizes) and max(sizes[1:]) <= _NATIVE_MAX_HEAD_DIM
    return fits and k_cache.is_cpu and v_cache.is_contiguous()


def torch_paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float, window: int = 0
) -> Tensor:
    """`paged_attention` in torch, one sequence at a time.

    The query heads of one KV head are folded into rows, so that K and V are never repeated.
    """
    num_tokens, num_heads, _ = q.shape
    num_kv_heads = k_cache.shape[1]
    group = num_heads // num_kv_heads
    out = q.new_empty(num_tokens, num_heads, v_cache.shape[3])
    bounds, lengths = batch.host_query_start.tolist(), batch.host_seq_lens.tolist()
    for seq, length in enumerate(lengths):
        start, stop = bounds[seq], bounds[seq + 1]
        count = stop - start
        keys, values = (_context(c, batch.block_table[seq], length, q.dtype) for c in (k_cache, v_cache))
        rows = q[start:stop].view(count, num_kv_heads, group, -1).permute(1, 2, 0, 3).flatten(1, 2)
        mask = None
        if count > 1 or 0 < window < length:
            mask = _visible(count, length, window, q.device).repeat(group, 1)
        attended = F.scaled_dot_product_attention(rows[None], keys[None], values[None], mask, scale=scale)[0]
        out[start:stop] = attended.view(num_kv_heads, group, count, -1).permute(2, 0, 1, 3).flatten(1, 2)
    return out


def torch_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float, window: int = 0
) -> Tensor:
    """`paged_attention` for one token of each sequence, in few large kernels: what a GPU wants.

    Contexts are gathered and padded to the longest, GATHER_TOKENS of them at once.
    """
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    out = q.new_empty(num_seqs, num_heads, v_cache.shape[3])
    places = torch.arange(batch.block_table.shape[1] * block_size, device=q.device)
    step = max(GATHER_TOKENS // places.shape[0], 1)
    for start in range(0, num_seqs, step):
        some = slice(start, start + step)
        lengths = batch.seq_lens[some, None]
        seen = places < lengths
        if window:
            seen = seen & (places >= lengths - window)
        table = batch.block_table[some].long()
        keys, values = (c[table].transpose(1, 2).flatten(2, 3).to(q.dtype) for c in (k_cache, v_cache))
        rows = q[some].view(-1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        attended = F.scaled_dot_product_attention(rows, keys, values, seen[:, None, None], scale=scale)
        out[some] = attended.flatten(1, 2)
    return out


def _context(cache: Tensor, table: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[num_kv_heads, length, width]: one sequence's blocks, gathered."""
    blocks = cache[table[: -(-length // cache.shape[2])].long()]
    return blocks.transpose(0, 1).flatten(1, 2)[:, :length].to(dtype)


def _visible(count: int, length: int, window: int, device: torch.device) -> Tensor:
    """[count, length] bool: the last `count` positions of a context see keys up to themselves, within the window."""
    distance = torch.arange(length - count, length, device=device)[:, None] - torch.arange(length, device=device)
    visible = distance >= 0
    return visible & (distance < window) if window else visible
