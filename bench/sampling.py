"""Sampling beside its floor: rows of logits from memory, against reading them once.

    python -m bench.sampling [--rows 1 64] [--vocab 49152 129000] [--threads 1 2] [--isa avx2]

Logits are normal numbers, times --spread: a larger one is a steeper distribution, where top_p leaves fewer tokens
(printed). A language model's are steep. Reading and sampling take turns: what disturbs one disturbs both. Some rows are
checked against the reference before they are timed. Medians and the least of the rounds; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from afd.ops.cpu.binding import NativeKernels
from afd.ops.reference import ReferenceOps
from afd.ops.sample_rows import SampleRow, filtered, weights_of
from afd.ops.select import native_kernels
from afd.types import SamplingParams
from bench.kernels import machine

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "top_k": {"temperature": 0.8, "top_k": 40},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "penalties": {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
}
READ_GRAIN = 1 << 18  # floats: the plain read's unit


def times_of(runs: Sequence[Callable[[], object]], budget_s: float) -> list[np.ndarray]:
    """Seconds of each call of each run, called in turns."""
    times: list[list[float]] = [[] for _ in runs]
    until = time.perf_counter() + budget_s * len(runs)
    while len(times[0]) < 7 or time.perf_counter() < until:
        for run, taken in zip(runs, times, strict=True):
            begun = time.perf_counter()
            run()
            taken.append(time.perf_counter() - begun)
    return [np.array(taken[2:]) for taken in times]


def rows_of(way: dict[str, Any], num_rows: int, vocab: int) -> list[SampleRow]:
    rng = np.random.default_rng(0)
    prompt, output = rng.integers(0, vocab, 400).tolist(), rng.integers(0, vocab, 100).tolist()
    return [SampleRow(SamplingParams(max_tokens=128, seed=i, **way), 100, prompt, output) for i in range(num_rows)]


def num_left(row: np.ndarray, way: dict[str, Any]) -> int:
    """Tokens that the filters leave."""
    params = SampleRow(SamplingParams(max_tokens=1, seed=0, **way), 0)
    return int(filtered(row, weights_of(row, row.max(), params.scale), params).sum()) if params.scale else 1


def measure(kernels: NativeKernels, num_rows: int, vocab: int, spread: float, threads: int, budget_s: float) -> list:
    generator = torch.Generator().manual_seed(0)
    logits = torch.from_numpy(np.empty((num_rows, vocab), np.float32))
    torch.randn(num_rows, vocab, generator=generator, out=logits).mul_(spread)
    floats = torch.from_numpy(np.ones(max(READ_GRAIN, num_rows * vocab // READ_GRAIN * READ_GRAIN), np.float32))
    results = []
    for name, way in WAYS.items():
        rows = rows_of(way, num_rows, vocab)
        checked = slice(0, 4)
        expected = ReferenceOps(torch.float32).sample(logits[checked], rows[checked])
        assert kernels.sample(logits[checked], rows[checked], threads) == expected, "not the reference's tokens"
        read, sampled = times_of(
            [
                lambda: kernels.read_memory(floats, threads),
                lambda rows=rows: kernels.sample(logits, rows, threads),
            ],
            budget_s,
        )
        read_s = np.median(read) * num_rows * vocab / len(floats)
        result = {
            "rows": num_rows,
            "vocab": vocab,
            "threads": threads,
            "spread": spread,
            "way": name,
            "left": num_left(logits[0].numpy(), way),
            "ms": round(float(np.median(sampled)) * 1e3, 2),
            "least_ms": round(float(sampled.min()) * 1e3, 2),
            "times_read": round(float(np.median(sampled) / read_s), 1),
        }
        results.append(result)
        print("{rows:4} {vocab:7} {threads:7} {spread:6} {way:12} {left:7} {ms:8} {least_ms:8} {times_read:8}".format(
            **result), flush=True)  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--vocab", type=int, nargs="+", default=[49_152, 129_000])
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--spread", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--isa", help="portable, avx2 or avx512; default: the best there is")
    parser.add_argument("--budget-s", type=float, default=0.5, help="time for each figure")
    options = parser.parse_args()
    kernels = native_kernels(options.isa)
    report: dict[str, Any] = {"bench": "sampling", **machine(), "isa": kernels.name, "results": []}
    print(f"{report['cpu']}, {kernels.name}, commit {report['commit']}")
    print("rows   vocab threads spread way             left       ms    least  x read")
    for vocab in options.vocab:
        for num_rows in options.rows:
            for spread in options.spread:
                for threads in options.threads:
                    report["results"] += measure(kernels, num_rows, vocab, spread, threads, options.budget_s)
    kernels.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
