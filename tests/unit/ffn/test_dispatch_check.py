"""Layers and experts that do not exist are found, those that do pass."""

from __future__ import annotations

import numpy as np
import pytest

from afd.ffn.dispatch_check import DispatchCheck
from afd.model.loading import resolve_model


@pytest.fixture(scope="module")
def check() -> DispatchCheck:
    return DispatchCheck(resolve_model("dummy:step3-tiny").spec)  # 5 layers, 1 to 3 with 8 experts, top 3


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
