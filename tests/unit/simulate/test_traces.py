"""Recorded traffic: both forms of a trace, and prompts that share what their hash_ids say."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.errors import ConfigError
from afd.sched.scheduler import SchedulerConfig
from afd.simulate.arrivals import Lengths, OpenLoop, Request
from afd.simulate.cluster import HOP_S, Simulation
from afd.simulate.planned import Failure
from afd.simulate.prompts import Prompts
from afd.simulate.times import ConstantStages
from afd.simulate.traces import Trace, TraceLimits
from tests.unit.simulate.cluster_under_test import LAYERS, settings, stage

MOONCAKE = [  # two lines of the release's description, in the wrong order
    {"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [*range(46, 58), 2366]},
    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [*range(46, 58), 2353, 2354]},
]


@pytest.fixture
def trace_of(tmp_path):
    def write(*lines, **limits):
        path = tmp_path / "trace.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return Trace(str(path), TraceLimits(**{"max_context": 100_000, **limits}))

    return write


def test_a_mooncake_trace_in_order_of_time(trace_of):
    trace = trace_of(*MOONCAKE)
    first, second = trace
    assert (first.at_s, first.num_prompt, first.num_output) == (27.482, 6955, 52)
    assert (second.at_s, second.num_prompt, second.num_output) == (30.535, 6472, 26)
    assert first.hash_ids[:12] == second.hash_ids[:12] and first.hash_ids[12] != second.hash_ids[12]
    assert list(trace) == [first, second] and trace.shares_prefixes and trace.mean_output == 39


def test_both_forms_say_the_same(trace_of):
    ours = list(
        trace_of({"at_s": 1.5, "input_len": 7, "output_len": 3}, "", {"at_s": 2, "input_len": 8, "output_len": 1})
    )
    theirs = list(
        trace_of(
            {"timestamp": 1500, "input_length": 7, "output_length": 3, "hash_ids": []},
            {"timestamp": 2000, "input_length": 8, "output_length": 1},
        )
    )
    assert ours == theirs == [Request(0, 1.5, 7, 3), Request(1, 2.0, 8, 1)]


def test_what_of_a_trace_is_replayed(trace_of):
    lines = [{"at_s": at_s, "input_len": 10 * (at_s + 1), "output_len": 5} for at_s in range(9)]
    earliest = trace_of(*reversed(lines), num_requests=3, speed=2.0)
    assert [(request.idx, request.at_s) for request in earliest] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    short = trace_of(*lines, max_context=45, skip_long=True)
    assert [request.num_prompt for request in short] == [10, 20, 30, 40] and short.num_skipped == 5
    assert "(5 longer than 45 left out)" in short.summary
    with pytest.raises(ConfigError, match="no requests but 9 that are too long"):
        trace_of(*lines, max_context=10, skip_long=True)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"at_s": 1, "timestamp": 5, "input_len": 5, "output_len": 3}', "line 2: expected exactly one of at_s and"),
        ('{"at_s": 1, "output_len": 3}', "line 2: expected exactly one of input_len and input_length"),
        ('{"at_s": 1, "input_len": 5, "output_len": 3, "user": 1}', "line 2: Object contains unknown field `user`"),
        ('{"at_s": 1, "input_len": 5, "output_len": 3, "hash_ids": [-1]}', "line 2: Expected `int` >= 0"),
        ('{"at_s": 1, "input_len": 513, "output_len": 3, "hash_ids": [1, 2, 3]}', "3 hash_ids for 513 tokens, 2 "),
        ('{"at_s": 1, "input_len": 99999, "output_len": 3}', "line 2: 100002 tokens .* --skip-long leaves it out"),
        ('{"at_s": "soon", "input_len": 5, "output_len": 3}', "line 2: Expected `float | null`, got `str`"),
        ("\xff", "line 2"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(trace_of, line, complaint):
    with pytest.raises(ConfigError, match=complaint):
        trace_of({"at_s": 1, "input_len": 5, "output_len": 3}, line)


names = st.lists(st.integers(0, (1 << 63) - 1), max_size=6)


@given(st.lists(names, min_size=1, max_size=2), st.lists(st.integers(0, 80), min_size=2, max_size=2), names)
def test_prompts_share_exactly_what_their_names_say(tails, extra, shared):
    """Blocks of 16 tokens, a vocabulary of 300: a name takes eight of them."""
    prompts, requests = Prompts(300, 16), []
    for idx, more in enumerate(extra):
        hash_ids = (*shared, *tails[idx % len(tails)]) if len(tails) > 1 else tuple(shared)
        requests.append(Request(idx, 0.0, max(1, 16 * len(hash_ids) + more), 1, hash_ids))
    one, other = (prompts.ids(request) for request in requests)
    assert len(one) == requests[0].num_prompt and max(one) < 300 and min(one) >= 0
    same = 0
    while requests[0].hash_ids[same : same + 1] == requests[1].hash_ids[same : same + 1] != ():
        same += 1
    assert one[: 16 * same] == other[: 16 * same]
    if min(len(one), len(other)) >= 16 * (same + 1):
        assert one[: 16 * (same + 1)] != other[: 16 * (same + 1)]


def test_a_prefix_that_was_computed_is_not_computed_again(trace_of):
    """By hand: 1,100 tokens are five chunks of at most 256; the second prompt shares 1,024 of them and is one chunk."""
    trace = trace_of(
        {"at_s": 0, "input_len": 1100, "output_len": 1, "hash_ids": [7, 8, 9]},
        {"at_s": 5, "input_len": 1100, "output_len": 1, "hash_ids": [7, 8, 10]},
        {"at_s": 9, "input_len": 1100, "output_len": 1, "hash_ids": [8, 7, 10]},
    )
    outcomes = []
    config = SchedulerConfig(num_streams=1, max_step_tokens=256, max_context=2048)
    shape = settings(
        "1A1F",
        ConstantStages(stage(200, 150, head=700)),
        streams=1,
        scheduler=config,
        hash_block_tokens=512,
        block_size=16,
    )
    report = Simulation(shape, trace, outcomes.append).run()
    step_s = LAYERS * 350e-6
    expected_s = [2 * HOP_S + 700e-6 + num_chunks * step_s for num_chunks in (5, 1, 5)]
    assert [outcome.ttft_s for outcome in outcomes] == pytest.approx(expected_s, rel=1e-6)
    assert [outcome.cached_tokens for outcome in outcomes] == [0, 1024, 0]
    assert report.cached_tokens == 1024 and report.input_tokens == 3300


def test_each_request_is_told_of_once_however_it_ends():
    """One worker, which is lost at 30 ms: what it had is lost, what comes after it is known is refused."""
    outcomes = []
    arrivals = OpenLoop(40, 40.0, 1.0, Lengths(4), Lengths(3), seed=0)
    shape = settings(
        "1A1F", ConstantStages(stage(200, 150)), failures=(Failure("attention", 0, 0.03, None),), recovery_timeout_s=0.2
    )
    report = Simulation(shape, arrivals, outcomes.append).run()
    assert sorted(outcome.request for outcome in outcomes) == list(range(40))
    came = {request.idx: request.at_s for request in arrivals}
    by_ending = Counter(outcome.ending for outcome in outcomes)
    assert by_ending["lost"] == sum(report.lost.values()) > 0
    assert by_ending["answered"] == report.num_answered and by_ending["refused"] == sum(report.refused.values())
    for outcome in outcomes:
        assert outcome.at_s == pytest.approx(came[outcome.request]) and outcome.input_len == 4
        assert bool(outcome.reason) == (outcome.ending != "answered")
        if outcome.ending == "answered":
            assert outcome.output_len == 3 and outcome.e2el_s == pytest.approx(outcome.ttft_s + 2 * outcome.tpot_s)
