"""The kernels in plain torch, float32 inside: what the native ones are tested against, and what runs without them.

Written to be read, not to be fast. `num_threads` has no meaning here: torch decides. Sampling is numpy (`sample_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from afd.ops.cpu.packed import PAIRS, QUADS, Int8Order, Packed, PackedInt8
from afd.ops.ops import RowMax
from afd.ops.sample_rows import SampledRows, SampleRow, sample_row


class ReferenceKernels:
    """Implements `base.Kernels`."""

    name = "reference"

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start: Tensor,
        scale: float,
        window: int,
        out: Tensor,
        num_threads: int,
    ) -> None:
        _check_batch(q.shape[0], k_cache, block_table, seq_lens, query_start, window)
        starts = query_start.tolist()
        for seq, seq_len in enumerate(seq_lens.tolist()):
            tokens = slice(starts[seq], starts[seq + 1])
            num_tokens = tokens.stop - tokens.start
            if num_tokens == 0:
                continue
            first_position = seq_len - num_tokens
            first_key = max(0, first_position + 1 - window) if window > 0 else 0
            keys = _gather(k_cache, block_table[seq], first_key, seq_len)
            values = _gather(v_cache, block_table[seq], first_key, seq_len)
            query_positions = torch.arange(first_position, seq_len)[:, None]
            key_positions = torch.arange(first_key, seq_len)[None, :]
            distance = query_positions - key_positions
            hidden = (distance < 0) | (distance >= window) if window > 0 else distance < 0
            out[tokens] = _attend(q[tokens].float(), keys, values, hidden, scale).to(out.dtype)

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
        num_slots = k_cache.shape[0] * k_cache.shape[2]
        if bool((slot_mapping >= num_slots).any()):
            raise ValueError(f"slot_mapping names a slot behind the last of the cache, {num_slots - 1}")
        kept = slot_mapping >= 0
        slots = slot_mapping[kept]
        blocks, offsets = slots // k_cache.shape[2], slots % k_cache.shape[2]
        k_cache[blocks, :, offsets] = k[kept]
        v_cache[blocks, :, offsets] = v[kept]

    def rope_write_kv(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        self.write_kv(_rotate(k, cos, sin, interleaved), v, k_cache, v_cache, slot_mapping)
        q.copy_(_rotate(q, cos, sin, interleaved))

    def add_rms_norm(self, x: Tensor, partials: Sequence[Tensor], weight: Tensor, eps: float, out: Tensor) -> None:
        if partials:
            total = x.float()
            for partial in partials:
                total = total + partial.float()
            x.copy_(total)
        kept = x.float()
        inverse = torch.rsqrt(kept.square().mean(-1, keepdim=True) + eps)
        out.copy_(kept * inverse * weight)

    def silu_mul(self, gate_up: Tensor, limit: float, out: Tensor) -> None:
        gate, up = gate_up.float().chunk(2, dim=-1)
        gate = torch.nn.functional.silu(gate)
        if limit > 0:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        out.copy_(gate * up)

    def row_max(self, x: Tensor, out: RowMax, num_threads: int) -> None:
        out.idx.copy_(torch.from_numpy(x.numpy().argmax(axis=1)))  # whose first NaN counts as the largest
        out.largest.copy_(x.gather(1, out.idx[:, None])[:, 0])

    def sample(self, logits: Tensor, rows: Sequence[SampleRow], num_threads: int) -> SampledRows:
        sampled = [sample_row(x, row) for x, row in zip(logits.numpy(), rows, strict=True)]
        return SampledRows([token for token, _ in sampled], [logprobs for _, logprobs in sampled])

    def gemm(self, x: Tensor, w: Packed, out: Tensor, num_threads: int) -> None:
        if isinstance(w, PackedInt8):
            out.copy_(int8_product(x, w.unpacked(), w.scales[: w.shape[0]], w.order))
        else:
            out.copy_(x.float() @ w.unpacked().float().T)

    def gemm_row_max(self, x: Tensor, w: Packed, best: RowMax, start: int, stop: int, num_threads: int) -> None:
        products, found = torch.empty(x.shape[0], stop - start), RowMax.of_nothing(x.shape[0])
        self.gemm(x, w.narrow_rows(start, stop), products, num_threads)
        self.row_max(products, found, num_threads)
        best.join(RowMax(found.largest, found.idx + start))


def int8_product(x: Tensor, values: Tensor, scales: Tensor, order: Int8Order) -> Tensor:
    """x [m, k] bfloat16 times the transpose of values [n, k] int8, whose rows have scales [n]: [m, n] float32."""
    integers, row_scales = round_rows(x, order)
    width = group_width(x.shape[1], order)
    sums = torch.zeros(x.shape[0], values.shape[0], dtype=torch.float64)
    for group, begin in enumerate(range(0, x.shape[1], width)):
        part = slice(begin, begin + width)
        exact = integers[:, part].double() @ values[:, part].double().T  # of products whose sum fits 32 bits
        if order == PAIRS:  # one group: its scale meets that of the weights
            return exact.float() * (row_scales * scales)
        sums = torch.addcmul(sums, exact, row_scales[:, group, None].double()).float().double()  # as one rounding
    return sums.float() * scales


def group_width(num_columns: int, order: Int8Order) -> int:
    """Elements of a row of x that the int8 GEMM scales together: all, or kInt8Group of src/gemm_vnni.h."""
    return 64 if order == QUADS else max(num_columns, 1)


def round_rows(x: Tensor, order: Int8Order) -> tuple[Tensor, Tensor]:
    """x [m, k] bfloat16 as the int8 GEMM takes it -> integers [m, k] int16, scales [m, groups of elements] float32.

    Integers of 8 bits for src/gemm_vnni.h; else as large as they can be if no sum of k products with weights of -127 to
    127 may leave an int32. A group with an infinity or a NaN becomes zeros with a scale of NaN.
    """
    num_rows, num_columns = x.shape
    width = group_width(num_columns, order)
    most = 127 if order == QUADS else min((2**31 - 1) // (127 * width), 2**15 - 1)
    wide = torch.nn.functional.pad(x.float(), (0, -num_columns % width))
    wide = wide.reshape(num_rows, -(-num_columns // width), width)
    largest = wide.abs().amax(dim=2)
    finite = largest.isfinite()
    largest = largest.clamp(min=2.0**-100)
    limit = torch.tensor(float(most))
    integers = torch.where(finite[:, :, None], wide * torch.div(limit, largest)[:, :, None], 0.0).round()
    integers = integers.flatten(1)[:, :num_columns].to(torch.int16)
    return integers, torch.div(largest, limit).where(finite, torch.nan)


def _check_batch(
    num_tokens: int, k_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start: Tensor, window: int
) -> None:
    """What the native kernels check too: lengths and block indices that would lead outside the tensors."""
    num_blocks, block_size = k_cache.shape[0], k_cache.shape[2]
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


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the first 2 * half dimensions of x `[tokens, heads, head_dim]`; cos and sin `[tokens, half]`."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    rotary, rest = x[..., : 2 * half].float(), x[..., 2 * half :].float()
    if interleaved:
        first, second = rotary[..., 0::2], rotary[..., 1::2]
    else:
        first, second = rotary[..., :half], rotary[..., half:]
    rotated = first * cos - second * sin, second * cos + first * sin
    out = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return torch.cat([out, rest], dim=-1).to(x.dtype)
