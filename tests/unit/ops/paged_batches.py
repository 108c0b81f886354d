"""Random paged batches, laid out as unkindly as the contract allows, and what their attention may deviate by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from afd.ops.cpu.binding import NativeKernels
from afd.ops.ops import AttentionArgs
from afd.ops.reference import ReferenceOps


@dataclass(frozen=True)
class BatchShape:
    """Sequences as (context length, query tokens), and the model's dimensions."""

    seqs: tuple[tuple[int, int], ...]
    num_kv_heads: int = 2
    group: int = 3
    head_dim: int = 64
    v_dim: int = 64
    block_size: int = 16
    window: int = 0
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass
class PagedBatch:
    shape: BatchShape
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start: Tensor
    scale: float

    def args(self) -> AttentionArgs:
        return AttentionArgs(
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_table,
            self.seq_lens,
            self.query_start,
            self.scale,
            self.shape.window,
            self.seq_lens.numpy(),
            self.query_start.numpy(),
        )

    def run(self, kernels: NativeKernels, num_threads: int = 1) -> Tensor:
        """Rows of `out` are a slice of something wider, and NaN until they are written."""
        num_tokens, num_heads, _ = self.q.shape
        wide = torch.full((num_tokens, num_heads * self.shape.v_dim + 8), float("nan"), dtype=self.q.dtype)
        out = wide[:, : num_heads * self.shape.v_dim].view(num_tokens, num_heads, self.shape.v_dim)
        kernels.paged_attention(self.args(), out, num_threads)
        assert wide[:, num_heads * self.shape.v_dim :].isnan().all(), "wrote between the rows of out"
        return out

    def expected(self) -> tuple[Tensor, Tensor]:
        """The exact result, and the same with |v|, which is what rounding errors of the weights are relative to."""
        exact = PagedBatch(
            self.shape,
            self.q.float(),
            self.k_cache.float(),
            self.v_cache.float(),
            self.block_table,
            self.seq_lens,
            self.query_start,
            self.scale,
        )
        reference = ReferenceOps(torch.float32)
        result = reference.paged_attention(exact.args())
        exact.v_cache = exact.v_cache.abs()
        return result, reference.paged_attention(exact.args())


def make_batch(shape: BatchShape) -> PagedBatch:
    """Blocks in random order; all memory that no query may see is NaN, all table entries not needed are wild."""
    generator = torch.Generator().manual_seed(shape.seed)
    counts = [-(-length // shape.block_size) for length, _ in shape.seqs]
    num_blocks, max_blocks = sum(counts) + 2, max(counts, default=0) + 1
    free = torch.randperm(num_blocks, generator=generator).tolist()
    caches = [
        torch.full((num_blocks, shape.num_kv_heads, shape.block_size, dim), float("nan"), dtype=shape.dtype)
        for dim in (shape.head_dim, shape.v_dim)
    ]
    table = torch.full((len(shape.seqs), max_blocks), -(2**31), dtype=torch.int32)
    starts = [0]
    for seq, (length, num_query) in enumerate(shape.seqs):
        starts.append(starts[-1] + num_query)
        first_key = max(0, length - num_query + 1 - shape.window) if shape.window else 0
        for position in range(first_key // shape.block_size, counts[seq]):
            table[seq, position] = free.pop()
        positions = torch.arange(first_key, length)
        blocks, offsets = table[seq].long()[positions // shape.block_size], positions % shape.block_size
        for cache in caches:
            rows = torch.randn(len(positions), shape.num_kv_heads, cache.shape[3], generator=generator)
            cache[blocks, :, offsets] = rows.to(shape.dtype)
    num_heads = shape.num_kv_heads * shape.group
    wide = torch.randn(starts[-1], num_heads * shape.head_dim + 24, generator=generator).to(shape.dtype)
    return PagedBatch(
        shape,
        wide[:, 16:-8].view(starts[-1], num_heads, shape.head_dim),
        *caches,
        table,
        torch.tensor([length for length, _ in shape.seqs], dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
        2.0 * shape.head_dim**-0.5,
    )


def assert_accurate(name: str, batch: PagedBatch, out: Tensor, weight_error: float = 1e-5) -> None:
    """float32 to `weight_error`. bfloat16 to its rounding, and where weights are bfloat16 too (AVX-512), to theirs."""
    result, magnitude = batch.expected()
    if batch.shape.dtype == torch.float32:
        bound = weight_error * magnitude
    else:
        bound = 2**-8 * result.abs() + (2**-8 if name == "avx512" else weight_error) * magnitude
    error = (out.float() - result).abs()
    assert not out.isnan().any()
    assert (error <= bound + 1e-30).all(), f"off by {(error / (bound + 1e-30)).max():.2f} times the bound"


@st.composite
def batch_shapes(draw: st.DrawFn) -> BatchShape:
    group = draw(st.sampled_from([1, 2, 3, 5, 8, 16, 64, 70]))
    heavy = group >= 16
    lengths = st.one_of(st.integers(1, 130), st.sampled_from([511, 512, 513, 600] + ([] if heavy else [1025, 1300])))
    seqs = []
    for _ in range(draw(st.integers(0, 2 if heavy else 4))):
        length = draw(lengths)
        queries = st.one_of(st.just(1), st.integers(1, min(length, 8 if heavy else 64)))
        seqs.append((length, draw(queries)))
    head_dim = draw(st.sampled_from([32, 64, 80, 96, 128, 256]))
    return BatchShape(
        seqs=tuple(seqs),
        num_kv_heads=draw(st.integers(1, 1 if heavy else 3)),
        group=group,
        head_dim=head_dim,
        v_dim=draw(st.sampled_from([head_dim, head_dim, 8, 72, 128])),
        block_size=draw(st.sampled_from([16, 16, 8, 24, 64])),
        window=draw(st.sampled_from([0, 0, 1, 7, 64, 200, 512])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 2**16)),
    )
