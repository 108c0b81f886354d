"""Paged attention of every instruction set against the torch reference, and that results do not depend on company."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from afd.ops.cpu.binding import NativeKernels
from afd.ops.reference import ReferenceOps
from tests.unit.ops.paged_batches import BatchShape, PagedBatch, assert_accurate, batch_shapes, make_batch

DTYPES = [torch.float32, torch.bfloat16]


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=batch_shapes())
def test_random_batches(kernels: NativeKernels, shape: BatchShape) -> None:
    batch = make_batch(shape)
    assert_accurate(kernels.name, batch, batch.run(kernels))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1024, 1025])
def test_lengths_around_the_edges_of_blocks_tiles_and_chunks(
    kernels: NativeKernels, length: int, dtype: torch.dtype
) -> None:
    batch = make_batch(BatchShape(((length, 1), (length, min(length, 2))), dtype=dtype))
    assert_accurate(kernels.name, batch, batch.run(kernels))


@pytest.mark.parametrize("num_query", [1, 2, 20, 21, 22, 33, 64])
def test_chunks_of_a_prompt(kernels: NativeKernels, num_query: int) -> None:
    batch = make_batch(BatchShape(((num_query, num_query), (100 + num_query, num_query)), dtype=torch.bfloat16))
    assert_accurate(kernels.name, batch, batch.run(kernels))


@pytest.mark.parametrize("window", [1, 2, 8, 63, 64, 65, 512, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_windows(kernels: NativeKernels, window: int, dtype: torch.dtype) -> None:
    batch = make_batch(BatchShape(((700, 1), (600, 40), (30, 30)), window=window, dtype=dtype))
    assert_accurate(kernels.name, batch, batch.run(kernels))


def test_sixty_four_heads_to_one(kernels: NativeKernels) -> None:
    """The shape of Step-3's MFA."""
    shape = BatchShape(((300, 1), (40, 5)), num_kv_heads=1, group=64, head_dim=256, v_dim=256, dtype=torch.bfloat16)
    batch = make_batch(shape)
    assert_accurate(kernels.name, batch, batch.run(kernels))


def test_scores_far_apart(kernels: NativeKernels) -> None:
    """Maxima that jump from tile to tile by more than a float's exponent holds.

    A score of 4000 has an error of 4000 * 2^-24 by itself, which is then the relative error of a weight.
    """
    batch = make_batch(BatchShape(((1100, 1), (200, 64))))
    batch.scale = 60.0
    assert_accurate(kernels.name, batch, batch.run(kernels), weight_error=1e-3)


def test_nothing_to_do(kernels: NativeKernels) -> None:
    assert make_batch(BatchShape(())).run(kernels).shape == (0, 6, 64)
    assert make_batch(BatchShape(((40, 0), (0, 0)))).run(kernels).shape == (0, 6, 64)


def test_padding_tokens_are_left_alone(kernels: NativeKernels) -> None:
    batch = make_batch(BatchShape(((40, 3), (9, 2))))
    batch.query_start = torch.tensor([0, 3, 3], dtype=torch.int32)
    out = batch.run(kernels)
    assert out[3:].isnan().all() and not out[:3].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 100])
def test_a_row_does_not_depend_on_its_batch_nor_on_threads(
    kernels: NativeKernels, dtype: torch.dtype, window: int
) -> None:
    shape = BatchShape(((1500, 1), (530, 70), (3, 1), (1029, 5)), window=window, dtype=dtype)
    batch = make_batch(shape)
    together = batch.run(kernels)
    for num_threads in (2, 3):
        assert torch.equal(together, batch.run(kernels, num_threads))
    for seq, (start, stop) in enumerate(zip(batch.query_start[:-1], batch.query_start[1:], strict=True)):
        for first in range(start, stop, 13):
            last = min(first + 13, int(stop))
            alone = PagedBatch(
                replace(shape, seqs=()),
                batch.q[first:last],
                batch.k_cache,
                batch.v_cache,
                batch.block_table[seq : seq + 1].contiguous(),
                batch.seq_lens[seq : seq + 1] - (int(stop) - last),
                torch.tensor([0, last - first], dtype=torch.int32),
                batch.scale,
            )
            assert torch.equal(together[first:last], alone.run(kernels))


def test_callers_on_several_threads_at_once(kernels: NativeKernels) -> None:
    batches = [make_batch(BatchShape(((900, 1), (300, 40)), seed=seed)) for seed in range(4)]
    expected = [batch.run(kernels) for batch in batches]
    equal = [False] * len(batches)

    def attend(index: int) -> None:
        equal[index] = all(torch.equal(batches[index].run(kernels, 2), expected[index]) for _ in range(20))

    callers = [threading.Thread(target=attend, args=(index,)) for index in range(len(batches))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert all(equal)


@pytest.mark.parametrize("which", ["native", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_lens": [40, 1]}, "less than its"),
        ({"seq_lens": [1000, 20]}, "too short"),
        ({"query_start": [1, 3, 5]}, "query_start"),
        ({"query_start": [0, 3, 2]}, "query_start"),
        ({"query_start": [0, 3, 6]}, "query_start"),
        ({"block": -1}, "block"),
        ({"block": 99}, "block"),
    ],
)
def test_wrong_indices_are_refused_before_anything_is_written(
    kernels: NativeKernels, which: str, change: dict[str, list[int]], message: str
) -> None:
    batch = make_batch(BatchShape(((40, 3), (20, 2))))
    if "block" in change:
        batch.block_table[1, 1] = change["block"]
    for name in ("seq_lens", "query_start"):
        if name in change:
            setattr(batch, name, torch.tensor(change[name], dtype=torch.int32))
    out = torch.zeros(5, 6, 64)
    with pytest.raises(ValueError, match=message):
        if which == "native":
            kernels.paged_attention(batch.args(), out, 2)
        else:
            ReferenceOps(torch.float32).paged_attention(batch.args())
    assert not out.any()
