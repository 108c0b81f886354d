"""Rows of logits and parameters of every kind, for tests of sampling."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from afd.ops.cpu.binding import NativeKernels
from afd.ops.reference import ReferenceOps
from afd.ops.sample_rows import SampleRow
from afd.types import SamplingParams

REFERENCE = ReferenceOps(torch.float32)
VOCABULARIES = (1, 2, 7, 63, 64, 65, 130, 200, 777, 1000, 1500, 5000)


def row_of(position: int = 5, prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), **changes: Any) -> SampleRow:
    return SampleRow(SamplingParams(**{"max_tokens": 8, "seed": 1, **changes}), position, prompt, output)


def random_logits(rng: np.random.Generator, pick: random.Random, num_rows: int, vocab: int) -> np.ndarray:
    """Of every kind: flat and steep, ties, masked, damaged."""
    x = (rng.standard_normal((num_rows, vocab)) * pick.choice([0, 0.1, 1, 2, 5, 30])).astype(np.float32)
    match pick.choice(["plain", "bfloat16", "ties", "infinities", "damaged", "zeros", "huge", "spike"]):
        case "bfloat16":
            x = torch.from_numpy(x).bfloat16().float().numpy()
        case "ties":
            x = np.round(x)
        case "infinities":
            x[rng.random(x.shape) < 0.3] = -np.inf
        case "damaged":
            x[0, rng.integers(vocab)] = pick.choice([np.nan, np.inf])
            x[1:2] = -np.inf
        case "zeros":
            x[rng.random(x.shape) < 0.5] = 0.0
            x[rng.random(x.shape) < 0.2] = -0.0
        case "huge":
            x = np.clip(x, -9, 9) * np.float32(3e37)
        case "spike":
            x[:, rng.integers(vocab)] += pick.choice([5, 12, 20])
    return x


def random_row(rng: np.random.Generator, pick: random.Random, vocab: int) -> SampleRow:
    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocab, count).tolist())

    return row_of(
        pick.choice([0, 3, 4, 1000]),
        tokens(pick.choice([0, 5, 50])),
        tokens(pick.choice([0, 5, 50])),
        seed=pick.choice([0, 1, -1, 2**63, 2**64 - 1, pick.getrandbits(63)]),
        choice=pick.choice([0, 1, 7]),
        temperature=pick.choice([0, 0.01, 0.3, 0.8, 1, 1, 2.5, 100]),
        top_p=pick.choice([1, 1, 0.95, 0.95, 0.5, 0.05, 1e-9, 0.999]),
        top_k=pick.choice([0, 0, 0, 1, 5, 40, 1000, 10**6, 2**31]),
        min_p=pick.choice([0, 0, 0, 0.02, 0.3, 1, 1e-12]),
        stop_token_ids=tokens(2),
        min_tokens=pick.choice([0, 4]),
        presence_penalty=pick.choice([0, 0, 0.7, -1.3]),
        frequency_penalty=pick.choice([0, 0, -0.4, 0.31]),
        repetition_penalty=pick.choice([1, 1, 1.3, 0.01]),
        logit_bias=tuple((token, pick.choice([5.0, -100.0, 0.1])) for token in tokens(pick.choice([0, 0, 1, 3]))),
        logprobs=pick.choice([-1, -1, 0, 1, 5, 20]),
    )


def random_batches(seed: int, num_rows: int) -> Iterator[tuple[torch.Tensor, list[SampleRow]]]:
    rng, pick = np.random.default_rng(seed), random.Random(seed)
    while num_rows > 0:
        count, vocab = pick.choice([1, 2, 3, 8]), pick.choice(VOCABULARIES)
        yield (
            torch.from_numpy(random_logits(rng, pick, count, vocab)),
            [random_row(rng, pick, vocab) for _ in range(count)],
        )
        num_rows -= count


def check_batches(kernels: NativeKernels, seed: int, num_rows: int) -> None:
    """The reference's tokens and log-probabilities, to the last bit; the logits stay as they are."""
    for logits, rows in random_batches(seed, num_rows):
        before = logits.clone()
        assert kernels.sample(logits, rows, 2) == REFERENCE.sample(logits, rows), rows
        assert torch.equal(logits.view(torch.int32), before.view(torch.int32))
