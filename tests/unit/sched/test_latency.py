"""Step-time model: curves that recover what they measured, and the cycle that follows from them."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.sched.curves import Curve
from afd.sched.latency import LatencyModel, StepLoad, StepSample, attended
from afd.sched.sequence import BatchItem, MicroBatch


def curve():
    return Curve(4e-3, 2e-4, 2e-7)


def feed(fitted, truth, rng, count, *, tokens=None, noise=0.05, factor=1.0):
    for _ in range(count):
        num_tokens = tokens or rng.choice((1, 4, 16, 48, 200))
        context = num_tokens * rng.randrange(20, 1000)
        seconds = truth[0] + truth[1] * num_tokens + truth[2] * context
        fitted.add(factor * seconds * rng.uniform(1 - noise, 1 + noise), 1.0, num_tokens, context)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    base_ms=st.floats(2, 30),
    token_us=st.floats(20, 2000),
    context_us=st.floats(0, 0.5),
    seed=st.integers(0, 1000),
)
def test_a_curve_predicts_what_it_measured(base_ms, token_us, context_us, seed):
    truth = (base_ms / 1e3, token_us / 1e6, context_us / 1e6)
    fitted = curve()
    feed(fitted, truth, random.Random(seed), 150)
    for num_tokens, context in ((1, 500), (10, 5000), (100, 20_000), (200, 100_000)):
        expected = truth[0] + truth[1] * num_tokens + truth[2] * context
        assert fitted(1.0, num_tokens, context) == pytest.approx(expected, rel=0.1)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(samples=st.lists(st.tuples(st.floats(1e-6, 1.0), st.integers(1, 256), st.integers(1, 10**6)), max_size=40))
def test_no_sequence_of_measurements_makes_a_coefficient_negative(samples):
    fitted = curve()
    for seconds, num_tokens, context in samples:
        fitted.add(seconds, 1.0, num_tokens, context)
        assert fitted(1.0, num_tokens, context) >= 0.0
        assert min(fitted.coefficients) >= 0.0


def test_before_any_sample_a_curve_is_its_prior():
    assert curve()(1.0, 64, 0) == pytest.approx(4e-3 + 64 * 2e-4)
    assert curve().coefficients == pytest.approx((4e-3, 2e-4, 2e-7))


def test_what_recent_steps_do_not_tell_apart_stays_known():
    rng, truth, fitted = random.Random(3), (5e-3, 4e-4, 1e-7), curve()
    feed(fitted, truth, rng, 200)
    feed(fitted, truth, rng, 3000, tokens=32)  # far longer than the memory: only one batch size
    assert fitted(1.0, 1, 500) == pytest.approx(5e-3 + 4e-4 + 5e-5, rel=0.25)
    assert fitted(1.0, 128, 64_000) == pytest.approx(5e-3 + 128 * 4e-4 + 6.4e-3, rel=0.25)


def test_a_slope_below_the_noise_is_not_extrapolated():
    """One sequence at a time, 50 to 114 tokens long, steps of 28 +- 5 ms: that says nothing of 2000 tokens."""
    rng, fitted = random.Random(6), curve()
    for step in range(2000):
        fitted.add(rng.uniform(23e-3, 33e-3) * (1.0 + 0.2 * (step % 64 > 40)), 1.0, 1, 50 + step % 64)
    assert fitted(1.0, 1, 2000) < 40e-3


def test_a_machine_that_becomes_slower_is_followed():
    rng, truth, fitted = random.Random(4), (5e-3, 4e-4, 1e-7), curve()
    feed(fitted, truth, rng, 300)
    before = fitted(1.0, 48, 20_000)
    feed(fitted, truth, rng, 250, factor=2.0)
    assert fitted(1.0, 48, 20_000) == pytest.approx(2 * before, rel=0.15)


def test_one_hiccup_is_not_a_cost():
    rng, truth, fitted = random.Random(5), (5e-3, 4e-4, 0.0), curve()
    feed(fitted, truth, rng, 100)
    before = fitted(1.0, 16, 1000)
    fitted.add(2.0, 1.0, 16, 1000)  # two seconds instead of eleven milliseconds
    assert fitted(1.0, 16, 1000) < 1.15 * before


def test_attended_counts_every_pair_of_row_and_position():
    assert attended(0, 3) == 1 + 2 + 3
    assert attended(10, 1) == 11
    assert attended(4, 2) == 5 + 6


def test_the_load_of_a_micro_batch():
    batch = MicroBatch(0, 1, (BatchItem(None, 9, 1, True), BatchItem(None, 0, 4, False)))
    assert StepLoad.of(batch) == StepLoad(5, 10 + 10, 1)


class Pipeline:
    """Feeds a model with steps of a machine whose curves are known; returns that machine's cycle."""

    A, H, F, C = (2e-3, 1e-4), (1e-3, 5e-5), (3e-3, 2e-4), 1.5e-3

    def __init__(self, *, overlap=True, slowness=1.0, alone=1.0):
        self.model = LatencyModel(overlap=overlap, alone=1.0 / alone, ffn_alone=1.0 / alone)
        self.overlap, self.slowness, self.alone = overlap, slowness, alone

    def speed(self, num_streams):
        """Time of computing relative to that beside another stream."""
        return self.alone if num_streams == 1 else 1.0

    def parts(self, num_tokens, num_streams=2):
        a = self.A[0] + self.A[1] * num_tokens + self.H[0] + self.H[1] * num_tokens
        return self.speed(num_streams) * a, self.speed(num_streams) * (self.F[0] + self.F[1] * num_tokens)

    def cycle(self, tokens_by_stream):
        steps = [self.parts(tokens, len(tokens_by_stream)) for tokens in tokens_by_stream]
        sum_a, sum_f = sum(a for a, _ in steps), sum(f for _, f in steps)
        if not self.overlap:
            return self.slowness * (sum_a + sum_f)
        return self.slowness * max(sum_a, sum_f, max(a + f for a, f in steps) + self.C)

    def run(self, tokens_by_stream, rounds=60):
        took = self.cycle(tokens_by_stream)
        speed = self.speed(len(tokens_by_stream))
        for _ in range(rounds):
            for stream, tokens in enumerate(tokens_by_stream):
                _, f = self.parts(tokens, len(tokens_by_stream))
                self.model.observe(
                    StepSample(
                        stream=stream,
                        load=StepLoad(tokens, 100 * tokens, tokens),
                        attention_s=speed * (self.A[0] + self.A[1] * tokens),
                        head_s=speed * (self.H[0] + self.H[1] * tokens),
                        ffn_s=f,
                        exchange_s=f + (self.C if self.overlap else 0.0),
                        gang_tokens=tokens,
                        took_s=took,
                        in_flight=range(len(tokens_by_stream)),
                    )
                )
        return took

    def predicted(self, tokens_by_stream):
        return self.model.cycle_s([StepLoad(tokens, 100 * tokens, tokens) for tokens in tokens_by_stream])


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("slowness", [1.0, 1.4])
def test_the_cycle_is_predicted_for_batches_and_streams_that_did_not_run(overlap, slowness):
    pipeline = Pipeline(overlap=overlap, slowness=slowness)
    for tokens in (1, 8, 30, 8, 64):
        pipeline.run([tokens])
    for wanted in ([16], [48], [16, 16], [20, 20, 20]):
        assert pipeline.predicted(wanted) == pytest.approx(pipeline.cycle(wanted), rel=0.1), wanted


def test_a_number_of_streams_that_behaves_otherwise_is_corrected_by_itself():
    pipeline = Pipeline()
    pipeline.run([8])
    pipeline.run([32])
    pipeline.slowness = 1.5  # two streams get in each other's way on this machine
    pipeline.run([16, 16])
    assert pipeline.predicted([16, 16]) == pytest.approx(pipeline.cycle([16, 16]), rel=0.1)
    pipeline.slowness = 1.0
    assert pipeline.predicted([32]) == pytest.approx(pipeline.cycle([32]), rel=0.1)
    assert pipeline.model.correction(3) == pytest.approx(1.5, rel=0.1)  # the nearest that is known


def test_a_step_beside_one_of_unknown_size_says_nothing_of_a_single_stream():
    """The first step of a trial ends while nothing is known yet of the stream beside it, which made it longer."""
    pipeline = Pipeline()
    pipeline.run([8])
    before = pipeline.model.correction(1)
    load = StepLoad(8, 800, 8)
    for _ in range(5):
        pipeline.model.observe(StepSample(0, load, 3e-3, 1.4e-3, 4.6e-3, 9e-3, 8, 0.02, in_flight=[0, 1]))
    assert pipeline.model.correction(1) == before


def test_a_single_stream_that_has_all_cores_is_learnt_apart():
    pipeline = Pipeline(alone=0.55)
    pipeline.run([16])
    pipeline.run([64])
    assert pipeline.predicted([40]) == pytest.approx(pipeline.cycle([40]), rel=0.1)
    # Several streams would not have those cores, which is known before any has run.
    assert pipeline.predicted([20, 20]) == pytest.approx(pipeline.cycle([20, 20]), rel=0.15)
    for tokens in (8, 32, 20):
        pipeline.run([tokens, tokens])
    for wanted in ([40], [16], [20, 20], [30, 30], [20, 20, 20]):
        assert pipeline.predicted(wanted) == pytest.approx(pipeline.cycle(wanted), rel=0.1), wanted
    assert pipeline.model.num_steps > 400


def test_two_streams_that_ran_with_large_steps_only_keep_what_one_has_taught_of_small_ones():
    """A trial may meet nothing but prompts: what two streams need for a few decodes does not follow from those."""
    pipeline = Pipeline(alone=0.55)
    for tokens in (4, 256, 16, 256, 64) * 2:
        pipeline.run([tokens], rounds=6)
    pipeline.run([256, 256], rounds=8)
    for wanted in ([2, 2], [10, 10], [32, 32], [250, 250]):
        assert pipeline.predicted(wanted) == pytest.approx(pipeline.cycle(wanted), rel=0.1), wanted


def test_a_few_steps_of_two_streams_do_not_fix_what_is_thought_of_them():
    pipeline = Pipeline(alone=0.55)
    pipeline.run([2], rounds=18)
    pipeline.run([2, 2], rounds=1)
    for tokens in (4, 64, 256) * 20:
        pipeline.run([tokens], rounds=10)
    assert pipeline.predicted([128, 128]) == pytest.approx(pipeline.cycle([128, 128]), rel=0.1)


def test_rows_of_other_attention_workers_count_for_the_ffn():
    alone, shared = LatencyModel(), LatencyModel()
    for model, others in ((alone, 0), (shared, 64)):
        for tokens in (4, 16, 32, 64) * 20:
            f = 3e-3 + 2e-4 * (tokens + others)
            load = StepLoad(tokens, tokens * 10, tokens)
            model.observe(StepSample(0, load, 2e-3, 1e-3, f, f + 1e-3, tokens + others, f + 4e-3, [0]))
    load = StepLoad(16, 160, 16)
    assert shared.step_s(load)[1] - alone.step_s(load)[1] == pytest.approx(64 * 2e-4, rel=0.15)


def test_the_first_steps_of_a_process_are_not_believed():
    model = LatencyModel(overlap=False)
    cold = StepSample(0, StepLoad(64, 2080, 1), 2.0, 0.1, 0.0, 0.0, 0, 2.1, [0])
    before = model.cycle_s([StepLoad(64, 2080, 1)])
    model.observe(cold)
    model.observe(cold)
    assert model.cycle_s([StepLoad(64, 2080, 1)]) == before
    model.observe(cold)
    assert model.cycle_s([StepLoad(64, 2080, 1)]) > before


def test_waiting_for_other_streams_is_not_mistaken_for_the_wire():
    model = LatencyModel()
    load = StepLoad(8, 80, 8)
    for _ in range(50):
        model.observe(StepSample(0, load, 2e-3, 1e-3, 3e-3, 4e-3, 8, 7e-3, [0]))
    alone_s = model.transfer_s
    assert alone_s == pytest.approx(1e-3, rel=0.1)
    for _ in range(50):
        model.observe(StepSample(0, load, 2e-3, 1e-3, 3e-3, 12e-3, 8, 15e-3, [0, 1]))
    assert model.transfer_s == pytest.approx(alone_s)
