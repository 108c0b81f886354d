"""`Ops` in torch, on any device, in few large kernels; nothing here waits for a GPU but the draw of tokens.

Other implementations take from it what they have no better code for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.host.memory import limit_bytes
from afd.ops.composed import ComposedExperts, ComposedSwiGlu
from afd.ops.int8 import Int8Weight, int8_linear
from afd.ops.ops import (
    AttentionArgs,
    Experts,
    KvWrite,
    LayerCall,
    LayerShape,
    LayerWeights,
    Ops,
    Rotary,
    Rotation,
    Routing,
    RoutingRule,
    RowMax,
    SwiGlu,
    Weight,
    WeightMemory,
)
from afd.ops.rope import ComputedAngles, rotate
from afd.ops.sample_rows import SampledRows, SampleRow, sample_row

HEAD_PIECE_ROWS = 16384
"""Vocabulary rows per GEMM of the head: bounds the activation-dtype temporary that precedes the float32 logits."""

GATHER_TOKENS = 1 << 17
"""Cached tokens that `attend_decodes` copies at once: bounds its memory to that of so many."""


class DeviceMemory:
    """Weights in tensors of their own. Implements `ops.WeightMemory`."""

    def __init__(self, device: torch.device):
        self._device = device

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor to be filled."""
        return torch.empty(*shape, dtype=dtype, device=self._device)


class TorchOps:
    """Implements `ops.Ops`.

    host: what draws the tokens from logits in host memory; None = the rule in numpy (`sample_rows`).
    """

    name = "torch"

    def __init__(self, dtype: torch.dtype, device: str = "cpu", host: Ops | None = None):
        self.dtype = dtype
        self.device = torch.empty(0, device=device).device  # as tensors name it: "cuda" is "cuda:0" or another
        self._host = host

    # -- memory

    def memory_bytes(self) -> int:
        """See `Ops`, as for all methods here."""
        return torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else limit_bytes()

    def weight_memory(self) -> WeightMemory:
        return DeviceMemory(self.device)

    def prepare(self, weight: Tensor | Int8Weight) -> Weight:
        return weight

    # -- dense

    def embed(self, ids: Tensor, table: Weight) -> Tensor:
        return F.embedding(ids, _plain(table)).float()

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        if isinstance(weight, Int8Weight):
            return int8_linear(x, weight)
        return F.linear(x, _plain(weight))

    def norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(dtype or x.dtype)

    def silu_mul(self, gate_up: Tensor, limit: float) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        if limit > 0:
            return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
        return F.silu(gate) * up

    def swiglu(self, gate_up: Weight, down: Weight, limit: float = 0.0) -> SwiGlu:
        return ComposedSwiGlu(self, gate_up, down, limit)

    def head_logits(self, x: Tensor, head: Weight, out: Tensor, start: int, stop: int) -> None:
        for at, end in _pieces(start, stop):
            out[:, at:end].copy_(self.linear(x, _rows(head, at, end)))

    def head_max(self, x: Tensor, head: Weight, best: RowMax, start: int, stop: int) -> None:
        for at, end in _pieces(start, stop):
            largest, idx = self.linear(x, _rows(head, at, end)).float().max(dim=1)
            best.join(RowMax(largest, idx + at))

    # -- attention

    def rotary(self, frequencies: Tensor, factor: float) -> Rotary:
        return ComputedAngles(frequencies.to(self.device), factor)

    def rope_write_kv(self, q: Tensor, write: KvWrite, rotation: Rotation) -> Tensor:
        self.write_rows(rotate(write.k, *rotation), write.k_cache, write.slot_mapping)
        self.write_rows(write.v, write.v_cache, write.slot_mapping)
        return rotate(q, *rotation)

    def write_rows(self, rows: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
        block_size = cache.shape[2]
        cache[slot_mapping // block_size, :, slot_mapping % block_size] = rows

    def paged_attention(self, args: AttentionArgs) -> Tensor:
        return attend_decodes(args) if args.seq_lens.shape[0] == args.q.shape[0] else attend_in_turn(args)

    def attention_layer(self, weights: LayerWeights, shape: LayerShape) -> LayerCall | None:
        return None

    # -- experts

    def route(self, rows: Tensor, weight: Tensor, bias: Tensor | None, rule: RoutingRule) -> Routing:
        logits = F.linear(rows.to(weight.dtype), weight).float()
        scores = torch.sigmoid(logits) if rule.sigmoid else torch.softmax(logits, dim=-1)
        choice = scores if bias is None else scores + bias
        if rule.num_groups > 1:
            choice = _within_top_groups(choice, rule.num_groups, rule.top_groups)
        ids = torch.topk(choice, rule.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        if rule.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=rule.norm_min)
        if rule.scaling != 1.0:
            weights = weights * rule.scaling
        return Routing(ids.to(torch.int32), weights)

    def experts(self, experts: Sequence[SwiGlu], first_expert: int) -> Experts:
        return ComposedExperts(experts, first_expert)

    # -- tokens

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> SampledRows:
        logits = logits.detach().cpu()
        if self._host is not None:
            return self._host.sample(logits, rows)
        sampled = [sample_row(x, row) for x, row in zip(logits.numpy(), rows, strict=True)]
        return SampledRows([token for token, _ in sampled], [logprobs for _, logprobs in sampled])

    # -- threads

    def start_threads(self, num_threads: int) -> None:
        if self._host is not None:
            self._host.start_threads(num_threads)

    def close(self) -> None:
        if self._host is not None:
            self._host.close()


def attend_in_turn(args: AttentionArgs) -> Tensor:
    """`Ops.paged_attention`, one sequence at a time.

    The query heads of one KV head are folded into rows, so that K and V are never repeated.
    """
    q, k_cache, v_cache, window = args.q, args.k_cache, args.v_cache, args.window
    num_tokens, num_heads, _ = q.shape
    num_kv_heads = k_cache.shape[1]
    group = num_heads // num_kv_heads
    out = q.new_empty(num_tokens, num_heads, v_cache.shape[3])
    bounds, lengths = args.host_query_start.tolist(), args.host_seq_lens.tolist()
    for seq, length in enumerate(lengths):
        start, stop = bounds[seq], bounds[seq + 1]
        count = stop - start
        keys, values = (_context(c, args.block_table[seq], length, q.dtype) for c in (k_cache, v_cache))
        rows = q[start:stop].view(count, num_kv_heads, group, -1).permute(1, 2, 0, 3).flatten(1, 2)
        mask = None
        if count > 1 or 0 < window < length:
            mask = _visible(count, length, window, q.device).repeat(group, 1)
        attended = F.scaled_dot_product_attention(rows[None], keys[None], values[None], mask, scale=args.scale)[0]
        out[start:stop] = attended.view(num_kv_heads, group, count, -1).permute(2, 0, 1, 3).flatten(1, 2)
    return out


def attend_decodes(args: AttentionArgs, gather_tokens: int = GATHER_TOKENS) -> Tensor:
    """`Ops.paged_attention` for one token of each sequence, in few large kernels: what a GPU wants.

    Contexts are gathered and padded to the longest, gather_tokens of them at once.
    """
    q, k_cache, v_cache = args.q, args.k_cache, args.v_cache
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    out = q.new_empty(num_seqs, num_heads, v_cache.shape[3])
    places = torch.arange(args.block_table.shape[1] * block_size, device=q.device)
    step = max(gather_tokens // places.shape[0], 1)
    for start in range(0, num_seqs, step):
        some = slice(start, start + step)
        lengths = args.seq_lens[some, None]
        seen = places < lengths
        if args.window:
            seen = seen & (places >= lengths - args.window)
        table = args.block_table[some].long()
        keys, values = (c[table].transpose(1, 2).flatten(2, 3).to(q.dtype) for c in (k_cache, v_cache))
        rows = q[some].view(-1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        attended = F.scaled_dot_product_attention(rows, keys, values, seen[:, None, None], scale=args.scale)
        out[some] = attended.flatten(1, 2)
    return out


def _plain(weight: Weight) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(f"a {type(weight).__name__} was prepared for other ops than these")
    return weight


def _rows(weight: Weight, start: int, stop: int) -> Weight:
    if isinstance(weight, Int8Weight):
        return weight.narrow(0, start, stop - start)
    return _plain(weight).narrow(0, start, stop - start)


def _pieces(start: int, stop: int) -> list[tuple[int, int]]:
    return [(at, min(at + HEAD_PIECE_ROWS, stop)) for at in range(start, stop, HEAD_PIECE_ROWS)]


def _within_top_groups(choice: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """choice [n, num_experts] with -inf outside each row's best groups (DeepSeek-V3 report, section 2.1.2)."""
    grouped = choice.view(choice.shape[0], num_groups, choice.shape[1] // num_groups)
    best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(top_groups, dim=-1).indices
    outside = torch.ones(grouped.shape[:2], dtype=torch.bool, device=choice.device).scatter_(1, best, False)
    return grouped.masked_fill(outside[:, :, None], -torch.inf).view(choice.shape)


def _context(cache: Tensor, table: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[num_kv_heads, length, width]: one sequence's blocks, gathered."""
    blocks = cache[table[: -(-length // cache.shape[2])].long()]
    return blocks.transpose(0, 1).flatten(1, 2)[:, :length].to(dtype)


def _visible(count: int, length: int, window: int, device: torch.device) -> Tensor:
    """[count, length] bool: the last `count` positions of a context see keys up to themselves, within the window."""
    distance = torch.arange(length - count, length, device=device)[:, None] - torch.arange(length, device=device)
    visible = distance >= 0
    return visible & (distance < window) if window else visible
