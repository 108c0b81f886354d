"""Kernel figures beside their ceilings: paged decode attention, the small GEMMs, the row-wise kernels.

    python bench/kernels.py [--quick] [--threads 1 2] [--isa avx512] [--tables gemm]

Decode attention is measured over a KV pool larger than the caches, as the layers of a model follow one another: at
random blocks, which is what a pool comes to after some time, and with the blocks in order, as a new pool hands them
out. Its ceilings are the memory bandwidth of a plain read (measured first, same threads) and the kernel's own
speed on KV that stays in the cache; `of ceiling` is relative to the lower of the two. SDPA is torch's, with the query
heads of one KV head folded into query rows, over K and V that lie contiguously: no gather is charged to it.

Each result is checked against torch before it is timed. Medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from afd.config import AttentionConfig
from afd.ops.cpu.binding import NativeKernels
from afd.ops.cpu.packed import Packed, PackedInt8, PackedMatrix
from afd.ops.cpu.packed_reference import product
from afd.ops.int8 import int8_copy
from afd.ops.ops import AttentionArgs, KvWrite, Rotation
from afd.ops.reference import ReferenceOps, add_rms_norm
from afd.ops.select import native_kernels

BLOCK_SIZE = AttentionConfig().block_size
REFERENCE = ReferenceOps(torch.bfloat16)
TABLES = ("attention", "gemm", "rowwise")
POOL_BYTES = 256 << 20
"""K and V of one run come from a pool of at least this size, so that no run finds its KV in a cache."""


@dataclass(frozen=True)
class AttentionShape:
    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * 2


ATTENTION_SHAPES = [AttentionShape("SmolLM2", 9, 3, 64), AttentionShape("MFA", 64, 1, 256)]
GEMM_SHAPES = {
    "qkv": (960, 576),
    "o": (576, 576),
    "gate_up": (3072, 576),
    "down": (576, 1536),
    "lm_head": (49152, 576),
}


def median_s(run: Callable[[], object], budget_s: float) -> float:
    """Median time of one call, after a warm-up of two."""
    return medians_s([run], budget_s)[0]


def medians_s(runs: Sequence[Callable[[], object]], budget_s: float) -> list[float]:
    """Medians of several functions that are called in turns: what disturbs one disturbs all. budget_s: for each."""
    for run in runs:
        run()
        run()
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + budget_s * len(runs)
    while len(times[0]) < 5 or time.perf_counter() < end:
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return [float(np.median(taken)) for taken in times]


def zeros_bf16(*shape: int) -> Tensor:
    """Zeros in memory of numpy, which asks for huge pages: what the engine's KV cache does."""
    return torch.from_numpy(np.zeros(shape, np.uint16)).view(torch.bfloat16)


def read_bandwidth(kernels: NativeKernels, num_threads: int, budget_s: float) -> float:
    memory = torch.from_numpy(np.ones(POOL_BYTES // 4, np.float32))
    return POOL_BYTES / median_s(lambda: kernels.read_memory(memory, num_threads), budget_s)


class DecodePool:
    """KV blocks of a shape, filled at random, cut into `num_batches` batches that are attended in turn."""

    def __init__(self, shape: AttentionShape, batch: int, context: int, num_batches: int) -> None:
        generator = torch.Generator().manual_seed(0)
        blocks_per_seq = -(-context // BLOCK_SIZE)
        num_blocks = num_batches * batch * blocks_per_seq
        self.caches = [zeros_bf16(num_blocks, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim) for _ in range(2)]
        pattern = torch.randn(1 << 20, generator=generator).bfloat16()
        for cache in self.caches:
            flat = cache.flatten()
            for start in range(0, len(flat), len(pattern)):
                flat[start : start + len(pattern)] = pattern[: len(flat) - start]
        self.tables = torch.randperm(num_blocks, generator=generator).int().view(num_batches, batch, blocks_per_seq)
        self.turn = cycle(self.tables)
        self.seq_lens = torch.full((batch,), context, dtype=torch.int32)
        self.query_start = torch.arange(batch + 1, dtype=torch.int32)
        self.q = torch.randn(batch, shape.num_heads, shape.head_dim, generator=generator).bfloat16()
        self.scale = shape.head_dim**-0.5

    def attend(self, kernels: NativeKernels, table: Tensor, num_threads: int) -> Tensor:
        out = torch.empty_like(self.q)
        kernels.paged_attention(self.args(table), out, num_threads)
        return out

    def args(self, table: Tensor) -> AttentionArgs:
        lengths = self.seq_lens.numpy(), self.query_start.numpy()
        return AttentionArgs(self.q, *self.caches, table, self.seq_lens, self.query_start, self.scale, 0, *lengths)

    def put_in_order(self) -> None:
        self.tables.copy_(torch.arange(self.tables.numel()).view_as(self.tables))

    def check(self, kernels: NativeKernels, num_threads: int) -> None:
        """Raises AssertionError if the first batch comes out wrong."""
        got = self.attend(kernels, self.tables[0], num_threads)
        want = REFERENCE.paged_attention(self.args(self.tables[0]))
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)

    def time(self, kernels: NativeKernels, num_threads: int, budget_s: float) -> float:
        return median_s(lambda: self.attend(kernels, next(self.turn), num_threads), budget_s)


def time_folded_sdpa(shape: AttentionShape, batch: int, context: int, num_batches: int, budget_s: float) -> float:
    size = (batch, shape.num_kv_heads, context, shape.head_dim)
    turn = cycle([(zeros_bf16(*size).fill_(0.5), zeros_bf16(*size).fill_(0.5)) for _ in range(num_batches)])
    q = torch.randn(batch, shape.num_kv_heads, shape.num_heads // shape.num_kv_heads, shape.head_dim).bfloat16()
    return median_s(lambda: F.scaled_dot_product_attention(q, *next(turn)), budget_s)


def bench_attention(
    kernels: NativeKernels, num_threads: int, bandwidth: float, quick: bool, budget_s: float
) -> list[dict[str, Any]]:
    print(f"\ndecode attention, {num_threads} thread(s): {bandwidth / 1e9:.1f} GB/s is what memory gives")
    print("shape    batch context        us   GB/s GFLOP/s of memory in order of ceiling  x SDPA")
    rows = []
    for shape in ATTENTION_SHAPES:
        in_cache = DecodePool(shape, num_threads, 512, 1).time(kernels, num_threads, budget_s)
        ceiling = min(bandwidth, num_threads * 512 * shape.kv_bytes_per_token / in_cache)
        for batch in (1, 16) if quick else (1, 4, 16, 64):
            for context in (128, 2048) if quick else (128, 512, 2048, 8192):
                kv_bytes = batch * context * shape.kv_bytes_per_token
                num_batches = max(1, POOL_BYTES // kv_bytes)
                pool = DecodePool(shape, batch, context, num_batches)
                pool.check(kernels, num_threads)
                ours_s = pool.time(kernels, num_threads, budget_s)
                pool.put_in_order()
                in_order_s = pool.time(kernels, num_threads, budget_s)
                del pool
                sdpa_s = time_folded_sdpa(shape, batch, context, num_batches, budget_s)
                flop = 4 * batch * context * shape.num_heads * shape.head_dim
                row = {
                    "shape": shape.name,
                    "batch": batch,
                    "context": context,
                    "num_threads": num_threads,
                    "us": round(ours_s * 1e6, 1),
                    "gb_per_s": round(kv_bytes / ours_s / 1e9, 2),
                    "gflop_per_s": round(flop / ours_s / 1e9, 1),
                    "of_memory": round(kv_bytes / ours_s / bandwidth, 3),
                    "of_memory_in_order": round(kv_bytes / in_order_s / bandwidth, 3),
                    "of_ceiling": round(kv_bytes / ours_s / ceiling, 3),
                    "times_sdpa": round(sdpa_s / ours_s, 2),
                }
                rows.append(row)
                print(
                    f"{shape.name:8} {batch:5} {context:7} {row['us']:9} {row['gb_per_s']:6} {row['gflop_per_s']:7} "
                    f"{row['of_memory']:9.0%} {row['of_memory_in_order']:8.0%} {row['of_ceiling']:10.0%} "
                    f"{row['times_sdpa']:7}"
                )
    return rows


def bench_gemm(
    kernels: NativeKernels, num_threads: int, bandwidth: float, quick: bool, budget_s: float
) -> list[dict[str, Any]]:
    print(f"\nGEMM over packed weights, {num_threads} thread(s), weights from memory")
    print("weight        n     k   m  bf16 us   GB/s of memory  GF/s x torch  int8 us   GB/s of memory GOP/s x bf16")
    rows = []
    for name, (n, k) in list(GEMM_SHAPES.items())[: 2 if quick else None]:
        num_copies = max(1, POOL_BYTES // (2 * n * k))
        weights = zeros_bf16(num_copies, n, k)
        weights.copy_(torch.randn(n, k, generator=torch.Generator().manual_seed(0)))
        rounded = int8_copy(weights[0], torch.empty(n, k, dtype=torch.int8), n * k)
        packed = [PackedMatrix(w.clone()) for w in weights]
        for matrix in packed:
            kernels.pack(matrix.data)
        narrow = [PackedInt8.pack(rounded.values.clone(), rounded.scales.clone(), kernels.int8_order) for _ in weights]
        turns = cycle(packed), cycle(narrow), cycle(weights)
        for m in (1, 16) if quick else (1, 8, 16, 32, 64, 256):
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).bfloat16()
            out = torch.empty(m, n, dtype=torch.bfloat16)
            _check_gemm(kernels, x, packed[0], weights[0], narrow[0], num_threads)
            gemms = [partial(_gemm_once, kernels, turn, x, out, num_threads) for turn in turns[:2]]
            bf16_s, int8_s, torch_s = medians_s([*gemms, partial(_linear_once, turns[2], x)], budget_s)
            row = {
                "weight": name,
                "m": m,
                "num_threads": num_threads,
                "bf16": _gemm_figures(bf16_s, m, n, k, 2, bandwidth),
                "int8": _gemm_figures(int8_s, m, n, k, 1, bandwidth),
                "bf16_times_torch": round(torch_s / bf16_s, 2),
                "int8_times_bf16": round(bf16_s / int8_s, 2),
            }
            rows.append(row)
            wide, short = (
                f"{figures['us']:8} {figures['gb_per_s']:6} {figures['of_memory']:9.0%} {figures['gop_per_s']:5}"
                for figures in (row["bf16"], row["int8"])
            )
            print(
                f"{name:8} {n:6} {k:5} {m:3} {wide} {row['bf16_times_torch']:7} {short} {row['int8_times_bf16']:6}",
                flush=True,
            )
    return rows


def _check_gemm(
    kernels: NativeKernels, x: Tensor, packed: PackedMatrix, weights: Tensor, narrow: PackedInt8, num_threads: int
) -> None:
    """Raises AssertionError if a product comes out wrong."""
    x = x[:8]
    out = torch.empty(x.shape[0], weights.shape[0], dtype=torch.bfloat16)
    kernels.gemm(x, packed, out, num_threads)
    torch.testing.assert_close(out, F.linear(x, weights), rtol=2**-6, atol=2**-4)
    kernels.gemm(x, narrow, out, num_threads)
    assert torch.equal(out, product(x, narrow).bfloat16()), "the int8 GEMM is exact"


def _gemm_figures(seconds: float, m: int, n: int, k: int, weight_bytes: int, bandwidth: float) -> dict[str, float]:
    read = weight_bytes * n * k
    return {
        "us": round(seconds * 1e6, 1),
        "gb_per_s": round(read / seconds / 1e9, 2),
        "of_memory": round(read / seconds / bandwidth, 3),
        "gop_per_s": round(2 * m * n * k / seconds / 1e9),
    }


def _gemm_once(kernels: NativeKernels, weights: Iterator[Packed], x: Tensor, out: Tensor, num_threads: int) -> None:
    kernels.gemm(x, next(weights), out, num_threads)


def _linear_once(weights: Iterator[Tensor], x: Tensor) -> None:
    F.linear(x, next(weights))


def bench_rowwise(kernels: NativeKernels, quick: bool, budget_s: float) -> list[dict[str, Any]]:
    """SmolLM2's widths against the torch twins, data in the cache: what counts is the number of passes and of calls."""
    print("\nrow-wise kernels, 1 thread(s)\nkernel         rows       us x torch")
    rows = []
    for num_rows in (1, 64) if quick else (1, 8, 64, 256):
        x, gate_up = torch.randn(num_rows, 576).bfloat16(), torch.randn(num_rows, 3072).bfloat16()
        partials = [torch.randn(num_rows, 576).bfloat16() for _ in range(2)]
        q, k = torch.randn(num_rows, 9, 64).bfloat16(), torch.randn(num_rows, 3, 64).bfloat16()
        caches = [torch.zeros(64, 3, BLOCK_SIZE, 64, dtype=torch.bfloat16) for _ in range(2)]
        cos, slots = torch.ones(num_rows, 32), torch.randperm(64 * BLOCK_SIZE)[:num_rows]
        norm = (x, partials, torch.ones(576), 1e-5, torch.empty_like(x))
        rope = (q, KvWrite(k, k, *caches, slots), Rotation(cos, cos))
        out = gate_up[:, :1536].contiguous()
        calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "add_rms_norm": (partial(kernels.add_rms_norm, *norm), partial(add_rms_norm, *norm)),
            "silu_mul": (partial(kernels.silu_mul, gate_up, 0.0, out), partial(REFERENCE.silu_mul, gate_up, 0.0)),
            "rope_write_kv": (partial(kernels.rope_write_kv, *rope), partial(REFERENCE.rope_write_kv, *rope)),
        }
        for name, (ours, theirs) in calls.items():
            ours_s, theirs_s = median_s(ours, budget_s), median_s(theirs, budget_s)
            row = {
                "kernel": name,
                "rows": num_rows,
                "us": round(ours_s * 1e6, 2),
                "times_torch": round(theirs_s / ours_s, 2),
            }
            rows.append(row)
            print(f"{name:14} {num_rows:4} {row['us']:8} {row['times_torch']:7}")
    return rows


def machine() -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": names[0] if names else platform.machine(),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few points of each table, in under a minute")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", help="portable, avx2 or avx512; default: the best there is")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    options = parser.parse_args()
    kernels = native_kernels(options.isa)
    budget_s = 0.05 if options.quick else 0.3
    torch.manual_seed(0)
    report: dict[str, Any] = {**machine(), "isa": kernels.name, "bandwidth_gb_per_s": {}, "attention": [], "gemm": []}
    print(f"{report['cpu']}, {kernels.name}, commit {report['commit']}, torch {report['torch']}")
    for num_threads in options.threads:
        torch.set_num_threads(num_threads)
        bandwidth = read_bandwidth(kernels, num_threads, budget_s)
        report["bandwidth_gb_per_s"][num_threads] = round(bandwidth / 1e9, 1)
        for table, bench in (("attention", bench_attention), ("gemm", bench_gemm)):
            if table in options.tables:
                report[table] += bench(kernels, num_threads, bandwidth, options.quick, budget_s)
    torch.set_num_threads(1)
    if "rowwise" in options.tables:
        report["rowwise"] = bench_rowwise(kernels, options.quick, budget_s)
    kernels.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
