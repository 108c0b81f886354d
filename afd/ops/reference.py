"""`Ops` in plain torch, float32 inside: what the others are tested against, and what runs without native code.

Written to be read, not to be fast, for tensors in host memory. Sampling is numpy (`sample_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from afd.host.memory import HostMemory
from afd.ops.ops import AttentionArgs, Rotary, RowMax, WeightMemory
from afd.ops.rope import AngleTable
from afd.ops.torch_ops import TorchOps


class ReferenceOps(TorchOps):
    """Implements `ops.Ops`. ValueError for a slot, block or length that leads outside the cache.

    The result for a row depends on that row and its context alone, but for the rounding of torch's GEMMs.
    """

    name = "reference"

    def __init__(self, dtype: torch.dtype):
        super().__init__(dtype)

    def weight_memory(self) -> WeightMemory:
        return HostMemory()

    def norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or x.dtype
        direct = dtype in (x.dtype, torch.bfloat16)
        out = torch.empty(x.shape, dtype=dtype if direct else x.dtype)
        add_rms_norm(x, (), weight, eps, out)
        return out.to(dtype)

    def silu_mul(self, gate_up: Tensor, limit: float) -> Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        gate = torch.nn.functional.silu(gate)
        if limit > 0:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (gate * up).to(gate_up.dtype)

    def rotary(self, frequencies: Tensor, factor: float) -> Rotary:
        return AngleTable(frequencies, factor)

    def write_rows(self, rows: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
        """A negative slot skips the token."""
        num_blocks, _, block_size, _ = cache.shape
        if bool((slot_mapping >= num_blocks * block_size).any()):
            raise ValueError(f"slot_mapping names a slot behind the last of the cache, {num_blocks * block_size - 1}")
        kept = slot_mapping >= 0
        slots = slot_mapping[kept]
        cache[slots // block_size, :, slots % block_size] = rows[kept]

    def paged_attention(self, args: AttentionArgs) -> Tensor:
        """Entries of the block table behind a sequence's last position, or before its window, are not read."""
        _check_batch(args)
        q, window = args.q, args.window
        out = q.new_zeros(q.shape[0], q.shape[1], args.v_cache.shape[3])
        starts = args.query_start.tolist()
        for seq, seq_len in enumerate(args.seq_lens.tolist()):
            tokens = slice(starts[seq], starts[seq + 1])
            num_tokens = tokens.stop - tokens.start
            if num_tokens == 0:
                continue
            first_position = seq_len - num_tokens
            first_key = max(0, first_position + 1 - window) if window > 0 else 0
            keys = _gather(args.k_cache, args.block_table[seq], first_key, seq_len)
            values = _gather(args.v_cache, args.block_table[seq], first_key, seq_len)
            query_positions = torch.arange(first_position, seq_len)[:, None]
            key_positions = torch.arange(first_key, seq_len)[None, :]
            distance = query_positions - key_positions
            hidden = (distance < 0) | (distance >= window) if window > 0 else distance < 0
            out[tokens] = _attend(q[tokens].float(), keys, values, hidden, args.scale).to(out.dtype)
        return out


def add_rms_norm(x: Tensor, partials: Sequence[Tensor], weight: Tensor, eps: float, out: Tensor) -> None:
    """Add the partials to x [num_tokens, hidden] in place, in their order in float32; out = the RMSNorm of the new x.

    partials: each of x's shape, of one dtype, which may be another than that of x. weight: float32 [hidden].
    """
    if partials:
        total = x.float()
        for partial in partials:
            total = total + partial.float()
        x.copy_(total)
    kept = x.float()
    inverse = torch.rsqrt(kept.square().mean(-1, keepdim=True) + eps)
    out.copy_(kept * inverse * weight)


def row_max(x: Tensor) -> RowMax:
    """The largest element in each row of x [m, n] float32, n > 0, as numpy's argmax finds it."""
    idx = torch.from_numpy(x.numpy().argmax(axis=1))  # whose first NaN counts as the largest
    return RowMax(x.gather(1, idx[:, None])[:, 0], idx)


def _check_batch(args: AttentionArgs) -> None:
    """What the native kernels check too: lengths and block indices that would lead outside the tensors."""
    q, k_cache, _, block_table, seq_lens, query_start, _, window, *_ = args
    num_tokens, num_blocks, block_size = q.shape[0], k_cache.shape[0], k_cache.shape[2]
    starts = query_start.tolist()
    if starts[0] != 0 or starts != sorted(starts) or starts[-1] > num_tokens:
        raise ValueError(f"query_start must begin at 0, not fall, and end within q's {num_tokens} tokens: {starts}")
    for seq, seq_len in enumerate(seq_lens.tolist()):
        num_query = starts[seq + 1] - starts[seq]
        if num_query == 0:
            continue
        if seq_len < num_query:
            raise ValueError(f"sequence {seq} has seq_len {seq_len}, less than its {num_query} query tokens")
        if seq_len > block_table.shape[1] * block_size:
            raise ValueError(f"sequence {seq} has seq_len {seq_len}: its row of block_table is too short for it")
        first_key = max(0, seq_len - num_query + 1 - window) if window > 0 else 0
        blocks = block_table[seq, first_key // block_size : (seq_len - 1) // block_size + 1]
        if bool(((blocks < 0) | (blocks >= num_blocks)).any()):
            raise ValueError(f"sequence {seq} needs a block that is not in the cache: {blocks.tolist()}")


def _gather(cache: Tensor, table: Tensor, begin: int, end: int) -> Tensor:
    """Keys or values of positions [begin, end): `[num_kv_heads, end - begin, head_dim]`, float32."""
    block_size = cache.shape[2]
    first_block = begin // block_size
    blocks = table[first_block : (end - 1) // block_size + 1].long()
    rows = cache[blocks].transpose(0, 1).flatten(1, 2)
    return rows[:, begin - first_block * block_size : end - first_block * block_size].float()


def _attend(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """q `[tokens, num_heads, head_dim]`, keys and values `[num_kv_heads, keys, dim]`, hidden `[tokens, keys]`."""
    num_tokens, num_heads, _ = q.shape
    grouped = q.reshape(num_tokens, keys.shape[0], -1, q.shape[2])
    scores = torch.einsum("tkgd,ksd->kgts", grouped, keys) * scale
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("kgts,ksd->tkgd", weights, values).reshape(num_tokens, num_heads, -1)
