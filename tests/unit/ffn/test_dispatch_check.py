"""Layers and experts that do not exist are found, those that do pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.ffn.dispatch_check import DispatchCheck
from afd.model.halves import Dispatch, FFNHalf
from afd.model.loading import load_ffn_half, resolve_model
from afd.model.sharding import ShardSpec
from afd.ops.select import select
from afd.types import FfnParallel


@pytest.fixture(scope="module")
def half() -> FFNHalf:
    """5 layers, 1 to 3 with 8 experts, top 3; rank 1 of 3 holds experts 2 to 4."""
    torch.set_num_threads(1)
    return load_ffn_half(
        resolve_model("dummy:step3-tiny"), ShardSpec(1, 3, FfnParallel.EP), select("cpu", torch.float32)
    )


@pytest.fixture(scope="module")
def check(half) -> DispatchCheck:
    return DispatchCheck(half.spec)


def ids(*rows: tuple[int, ...]) -> np.ndarray:
    return np.array(rows, np.int32).reshape(-1, 3)


@pytest.mark.parametrize(
    ("layer", "top_k", "expert_ids"), [(0, 0, None), (4, 0, None), (1, 3, ids()), (3, 3, ids((0, 7, 3), (1, 1, 1)))]
)
def test_what_an_honest_worker_sends_passes(check, layer, top_k, expert_ids):
    assert check.fault(layer, top_k, expert_ids) is None


@pytest.mark.parametrize(
    ("layer", "top_k", "expert_ids", "reason"),
    [
        (5, 0, None, "layer 5, the model has 5"),
        (65535, 3, ids((0, 1, 2)), "layer 65535, the model has 5"),
        (1, 0, None, "0 experts for each row of layer 1, which takes 3"),
        (0, 3, ids((0, 1, 2)), "3 experts for each row of layer 0, which takes 0"),
        (2, 3, ids((0, 1, 2), (3, 8, 1)), "expert 8 of layer 2, which has 8"),
        (2, 3, ids((0, -1, 99)), "expert -1 of layer 2, which has 8"),
        (2, 3, ids((0, 1, 2147483647)), "expert 2147483647 of layer 2, which has 8"),
    ],
)
def test_what_does_not_exist_is_named(check, layer, top_k, expert_ids, reason):
    assert check.fault(layer, top_k, expert_ids) == reason


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    layer=st.integers(0, 6),
    top_k=st.integers(0, 4),
    num_tokens=st.integers(0, 5),
    lowest=st.sampled_from([0, 0, 0, -1, -(2**31)]),
    highest=st.sampled_from([7, 7, 7, 8, 2**31 - 1]),
    places=st.sampled_from([None, [9, 9, 9, 9, 9], [-1, 0, 5, -7, 2**31 - 1]]),
    seed=st.integers(0, 99),
)
def test_whatever_passes_can_be_computed(check, half, layer, top_k, num_tokens, lowest, highest, places, seed):
    """Also with places in the micro-batch that make no sense: they choose rows, they address nothing."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(lowest, highest, (num_tokens, top_k), dtype=np.int32, endpoint=True) if top_k else None
    if check.fault(layer, top_k, drawn) is not None:
        return
    given_ids = None if drawn is None else torch.from_numpy(drawn)
    weights = None if drawn is None else torch.full((num_tokens, top_k), float("nan"))
    row_idx = None if places is None else torch.tensor(places[:num_tokens], dtype=torch.int32)
    rows = half.layer(Dispatch(layer, torch.ones(num_tokens, half.spec.hidden), given_ids, weights, row_idx))
    assert rows.shape == (num_tokens, half.spec.hidden)
