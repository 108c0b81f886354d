"""What a size would serve, by hand, from what steps cost."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.cluster.autoscale.capacity import Bounds, CostModel, StepLine, TokenWork
from afd.messages.membership import StageLines, StepCosts
from afd.types import Topology

ONE = Topology(1, 1)
MODEL = CostModel(
    size=ONE,
    attention_s=2e-3,
    attention_seq_s=1e-3,
    ffn={1: StepLine(3e-3, 5e-4)},
    link_row_s=2e-4,
    rows=2.0,
    streams=range(2, 3),
)


IDLE = StageLines((9.0, 9.0, 9.0), (9.0, 9.0), (3e-3, 5e-4))


def told(**changes: Any) -> StepCosts:
    """By an attention worker with ten sequences in two streams."""
    worker = StepCosts(
        attention=(1e-3, 1e-4, 1e-6),
        head=(1e-3, 5e-4),
        ffn=(3e-3, 5e-4),
        transfer_s=1e-3,
        num_steps=1000,
        num_seqs=10,
        tokens=10.0,
        context=1000.0,
        rows=10.0,
        num_streams=2,
        corrections={2: 1.0},
        lines=StageLines((1e-3, 1e-4, 1e-6), (1e-3, 5e-4), (3e-3, 5e-4)),
    )
    return msgspec.structs.replace(worker, **changes)


def test_the_parts_of_a_cycle_by_hand() -> None:
    parts = MODEL.parts(ONE, 10.0, 2)
    assert parts["attention"] == pytest.approx(2 * 2e-3 + 10 * 1e-3)
    assert parts["FFN"] == pytest.approx(2 * 3e-3 + 20 * 5e-4)
    assert parts["network"] == pytest.approx(20 * 2e-4 * 2 / 3)
    assert parts["latency"] == pytest.approx((14e-3 + 16e-3 + 4e-3) / 2)
    assert MODEL.cycle_s(ONE, 10.0) == pytest.approx(17e-3) and MODEL.bound(ONE, 10.0) == "latency"


def test_more_workers_share_sequences_experts_and_links() -> None:
    parts = MODEL.parts(Topology(2, 4), 20.0, 2)
    assert parts["attention"] == pytest.approx(2 * 2e-3 + 10 * 1e-3)
    assert parts["FFN"] == pytest.approx((0.3 + 0.7 / 4) * (2 * 3e-3 + 40 * 5e-4)), "some of it does not divide"
    assert parts["network"] == pytest.approx(4 * 20 * 2e-4 * 2 / 3), "each row goes to four FFN workers"


def test_fewer_ffn_workers_are_thought_to_take_all_the_more_and_seen_ones_what_they_took() -> None:
    four = dataclasses.replace(MODEL, size=Topology(1, 4), ffn={4: StepLine(1e-3, 1e-4)})
    assert four.ffn_of(1) == StepLine(4e-3, 4e-4)
    seen = dataclasses.replace(four, ffn={4: StepLine(1e-3, 1e-4), 1: StepLine(2e-3, 3e-4)})
    assert seen.ffn_of(1) == StepLine(2e-3, 3e-4)


def test_a_worker_takes_the_number_of_streams_that_is_best() -> None:
    heavy = dataclasses.replace(MODEL, ffn={1: StepLine(20e-3, 0.0)}, streams=range(1, 4))
    assert heavy.cycle_s(ONE, 4.0) == pytest.approx(2e-3 + 4e-3 + 20e-3 + 8 * 2e-4), "one reads weights once"


def test_the_capacity_is_where_the_cycle_reaches_the_target() -> None:
    wide = dataclasses.replace(MODEL, link_row_s=None, ffn={1: StepLine(1e-6, 1e-6)})
    assert wide.capacity(ONE, Bounds(0.05)) == pytest.approx(46 / 0.05, rel=2e-3)  # 2 x 2 ms + 46 x 1 ms
    assert wide.capacity(ONE, Bounds(0.05, most_seqs=16.0)) == pytest.approx(16 / 0.02, rel=2e-3)
    assert wide.capacity(ONE, Bounds(0.002)) == 0.0


def test_a_network_that_binds_is_not_helped_by_more_ffn_workers() -> None:
    thin = dataclasses.replace(MODEL, link_row_s=5e-3)
    assert thin.bound(ONE, 10.0) == "network"
    alone, wide, both = (thin.capacity(size, Bounds(0.05)) for size in (ONE, Topology(1, 3), Topology(3, 3)))
    assert wide < alone and both == pytest.approx(alone, rel=0.1)


costs_ms = st.floats(0.01, 20.0)


@settings(max_examples=60, derandomize=True)
@given(st.tuples(*[costs_ms] * 5), st.integers(1, 6), st.integers(1, 6), st.floats(1.0, 1e4), st.floats(1, 500))
def test_serves_and_capacity_agree(ms: tuple[float, ...], x: int, y: int, tokens_per_s: float, most: float) -> None:
    a, seq, f, row, link = (each * 1e-3 for each in ms)
    model = dataclasses.replace(
        MODEL, attention_s=a, attention_seq_s=seq, ffn={1: StepLine(f, row / 10)}, link_row_s=link / 10
    )
    bounds, size = Bounds(0.05, most), Topology(x, y)
    capacity = model.capacity(size, bounds)
    if not math.isclose(capacity, tokens_per_s, rel_tol=5e-3):
        assert model.serves(size, tokens_per_s, bounds) == (tokens_per_s < capacity)
    if capacity > 1.0:
        num_seqs = min(0.99 * capacity * bounds.tpot_s, most * x)
        assert model.cycle_s(size, max(1.0, num_seqs)) <= bounds.tpot_s * 1.001


# -- from what workers tell -----------------------------------------------------------------------------------


def test_costs_are_those_of_whom_most_runs_at() -> None:
    model = CostModel.of(
        [told(), told(num_seqs=0, context=0.0, lines=IDLE), told(num_steps=3, lines=IDLE)],
        Topology(3, 1),
        TokenWork(rows=3.0, attended=200.0),
        range(1, 4),
    )
    assert model is not None
    assert model.attention_s == pytest.approx(2e-3 + 18.0 * 0.01 / 10.01, rel=0.01)
    assert model.ffn == {1: StepLine(3e-3, 5e-4)}, "who has measured little does not count"
    assert (model.rows, model.link_row_s) == (3.0, None)
    assert CostModel.of([told(num_steps=3)], ONE, TokenWork(), range(1, 2)) is None


def test_a_cycle_longer_than_predicted_counts_for_every_size_unless_the_link_explains_it() -> None:
    def correction(**changes: Any) -> float:
        model = CostModel.of(
            [told(corrections={2: 1.5}, transfer_s=0.0, **changes)], ONE, TokenWork(1.0, 100.0), range(2, 3)
        )
        assert model is not None
        return model.correction

    assert correction() == pytest.approx(1.5)
    way_s = (2 * 2e-3 + 10 * 7e-4 + 2 * 3e-3 + 10 * 5e-4) / 2
    link_row_s = way_s / 10  # which makes one stream's way half as long again
    assert correction(link_row_s=link_row_s) == pytest.approx(1.0, abs=0.05)
