"""The number of streams: found by measuring a pipeline in virtual time whose best number is known."""

import pytest

from afd.sched.latency import LatencyModel, StepLoad, StepSample
from afd.sched.streams import DECIDE_EVERY, TRIAL_EVERY, StreamChooser


class Pipeline:
    """Attention and FFN as straight lines; `friction` slows a cycle for each stream beyond the first."""

    def __init__(self, *, a=(1e-3, 1e-4), f=(1e-3, 1e-4), c=1e-3, friction=0.0, alone=1.0):
        self.a, self.f, self.c, self.friction, self.alone = a, f, c, friction, alone
        self.model = LatencyModel(alone=alone, ffn_alone=alone)
        self.chooser = StreamChooser(self.model)
        self.num_streams = 2
        self.step = 0
        self.history = []

    def cycle(self, num_seqs, num_streams):
        a, f = self.halves(num_seqs, num_streams)
        ideal = max(num_streams * a, num_streams * f, a + f + self.c)
        return ideal * (1 + self.friction * (num_streams - 1))

    def halves(self, num_seqs, num_streams):
        tokens, speedup = num_seqs / num_streams, self.alone if num_streams == 1 else 1.0
        return tuple((fixed + each * tokens) / speedup for fixed, each in (self.a, self.f))

    def run(self, num_seqs, cycles, limit=4):
        for _ in range(cycles):
            active = min(self.num_streams, num_seqs)
            tokens = num_seqs / active
            took_s = self.cycle(num_seqs, active)
            attention_s, f = self.halves(num_seqs, active)
            for stream in range(active):
                load = StepLoad(tokens, tokens * 50, tokens)
                exchange_s = f + self.c + (took_s if active > 1 else 0.0)
                self.model.observe(
                    StepSample(stream, load, attention_s, 0.0, f, exchange_s, tokens, took_s, range(active))
                )
                self.step += 1
                if self.chooser.due(self.step):
                    whole = StepLoad(num_seqs, num_seqs * 50, num_seqs)
                    self.num_streams = self.chooser.choose(self.step, self.num_streams, limit, num_seqs, whole)
            self.history.append(self.num_streams)

    def best(self, num_seqs, limit=4):
        return min(range(1, limit + 1), key=lambda m: self.cycle(num_seqs, m))


@pytest.mark.parametrize(
    "shape",
    [
        {},  # balanced: two streams overlap, a third only adds fixed costs
        {"c": 2e-2},  # a slow wire: more streams hide it
        {"a": (1e-3, 3e-4), "f": (1e-4, 1e-5), "c": 1e-4},  # attention alone decides: one stream
        {"a": (5e-3, 1e-5), "f": (5e-3, 1e-5)},  # weights are read once per stream: few
        {"friction": 0.4},  # streams get in each other's way, which no curve tells
    ],
)
@pytest.mark.parametrize("num_seqs", [8, 64])
def test_it_settles_at_a_number_that_is_as_good_as_the_best(shape, num_seqs):
    pipeline = Pipeline(**shape)
    pipeline.run(num_seqs, 600)
    settled = max(set(pipeline.history[-200:]), key=pipeline.history[-200:].count)
    best_s = pipeline.cycle(num_seqs, pipeline.best(num_seqs))
    assert pipeline.cycle(num_seqs, settled) <= 1.08 * best_s, (settled, pipeline.best(num_seqs))


def test_a_single_stream_with_all_cores_is_not_left_for_what_has_half_of_them():
    pipeline = Pipeline(a=(3e-3, 2e-4), f=(5e-3, 4e-4), alone=2.0)
    pipeline.num_streams = 1
    for num_seqs in (4, 64, 16, 64):
        pipeline.run(num_seqs, 300)
    assert pipeline.best(64) == 1 and set(pipeline.history) == {1}


def test_trials_are_rare_and_changes_rarer():
    pipeline = Pipeline()
    pipeline.run(32, 400)
    pipeline.history.clear()
    pipeline.run(32, 3 * TRIAL_EVERY)
    settled = max(set(pipeline.history), key=pipeline.history.count)
    assert pipeline.history.count(settled) > 0.9 * len(pipeline.history)


def test_the_plan_bounds_it():
    pipeline = Pipeline(c=5e-2)
    pipeline.run(64, 300)
    assert max(pipeline.history[-50:]) > 2
    pipeline.run(64, 2 * DECIDE_EVERY, limit=2)
    assert set(pipeline.history[-DECIDE_EVERY:]) <= {1, 2}


def test_a_single_sequence_changes_nothing():
    pipeline = Pipeline()
    pipeline.run(1, 100)
    assert set(pipeline.history) == {2}


def test_it_follows_the_batch():
    pipeline = Pipeline(a=(4e-3, 2e-4), f=(4e-3, 2e-4), c=1e-2)
    for num_seqs in (4, 64, 4):
        pipeline.run(num_seqs, 500)
        settled = max(set(pipeline.history[-150:]), key=pipeline.history[-150:].count)
        assert pipeline.cycle(num_seqs, settled) <= 1.08 * pipeline.cycle(num_seqs, pipeline.best(num_seqs)), num_seqs
