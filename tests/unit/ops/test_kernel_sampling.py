"""Sampling by the native kernels: the reference's tokens and log-probabilities, to the last bit."""

from __future__ import annotations

import pytest
import torch

from afd.ops.cpu.binding import NativeKernels
from afd.ops.cpu.ops import CpuOps
from tests.unit.ops.sample_batches import REFERENCE, check_batches, row_of


def test_random_rows(kernels: NativeKernels) -> None:
    """`make fuzz` has 100,000 of them (tests/fuzz/test_sampled_rows.py)."""
    check_batches(kernels, seed=1, num_rows=1000)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.999])
def test_large_vocabularies_whatever_the_guess(kernels: NativeKernels, top_p: float) -> None:
    """Where top_p cuts is guessed from a few logits of each 64: other tokens may not follow them."""
    generator = torch.Generator().manual_seed(0)
    flat, steep = (torch.randn(20_011, generator=generator) * sigma for sigma in (1.0, 4.0))
    sampled_low, sampled_high = flat.clone(), flat.clone()
    for place in range(4):
        sampled_low[place::64] -= 6.0
        sampled_high[place::64] += 6.0
    ties = [torch.zeros_like(flat), flat.round(), steep.bfloat16().float()]
    logits = torch.stack([flat, steep, sampled_low, sampled_high, *ties])
    rows = [row_of(seed=i, temperature=0.8, top_p=top_p, logprobs=3) for i in range(len(logits))]
    expected = REFERENCE.sample(logits, rows)
    assert kernels.sample(logits, rows, 1) == expected
    for i, row in enumerate(rows):
        assert kernels.sample(logits[i : i + 1], [row], 1).ids == [expected.ids[i]]


def test_a_row_may_be_cut_into_slices(kernels: NativeKernels) -> None:
    """Few rows and many threads: the threads share a row."""
    logits = torch.randn(2, 150_000, generator=torch.Generator().manual_seed(3))
    for changes in ({}, {"top_p": 0.9}, {"top_k": 30, "top_p": 0.5}, {"temperature": 0.0, "repetition_penalty": 1.2}):
        rows = [row_of(seed=i, prompt=(1, 5, 149_999), logprobs=2, **changes) for i in range(2)]
        expected = kernels.sample(logits, rows, 1)
        assert expected == REFERENCE.sample(logits, rows)
        assert [kernels.sample(logits, rows, threads) for threads in (2, 3, 4)] == [expected] * 3


def test_rows_apart_in_memory(kernels: NativeKernels) -> None:
    wide = torch.randn(5, 300, generator=torch.Generator().manual_seed(4))
    rows = [row_of(seed=i, top_p=0.8) for i in range(5)]
    assert kernels.sample(wide[:, :130], rows, 1) == REFERENCE.sample(wide[:, :130].contiguous(), rows)
    assert kernels.sample(torch.empty(0, 300), [], 1).ids == []


def test_a_token_outside_the_vocabulary_is_refused(kernels: NativeKernels) -> None:
    logits = torch.zeros(2, 10)
    for bad in (
        row_of(logit_bias=((10, 1.0),)),
        row_of(logit_bias=((-1, 1.0),)),
        row_of(prompt=(3, 99), repetition_penalty=1.5),
        row_of(output=(10,), presence_penalty=0.5),
        row_of(stop_token_ids=(10,), min_tokens=9),
    ):
        with pytest.raises(IndexError, match="row 1 names token"):
            kernels.sample(logits, [row_of(), bad], 1)


def test_wrong_arguments_are_refused(kernels: NativeKernels) -> None:
    ops = CpuOps(kernels, torch.float32)
    for logits, rows in (
        (torch.zeros(2, 10), [row_of()]),
        (torch.zeros(1, 10).double(), [row_of()]),
        (torch.zeros(10, 2).T, [row_of()] * 2),
        (torch.zeros(1, 0), [row_of()]),
    ):
        with pytest.raises(ValueError):
            ops.sample(logits, rows)
