"""The engine without a model: time passes by formula, tokens are reproducible, the scheduler is the real one."""

import pytest

from afd.attention.modelled import ModelledEngine, StepFormula, modelled_token
from afd.config import resolve_config
from afd.errors import ConfigError
from afd.kv.block_pool import BlockPool
from afd.sched.latency import StepLoad
from afd.sched.scheduler import Scheduler, SchedulerConfig
from afd.sched.sequence import Sequence
from afd.types import FinishReason, SamplingParams

VOCAB = 1000


class Clock:
    """Virtual time: waiting advances it; `interrupt_s` cuts a wait short, as an arriving message does."""

    def __init__(self):
        self.now = 100.0
        self.interrupt_s = None
        self.waits = []

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.waits.append(seconds)
        self.now += seconds if self.interrupt_s is None else min(seconds, self.interrupt_s)
        self.interrupt_s = None


def make(text="base_ms=10,token_us=1000", num_streams=1, **config):
    clock = Clock()
    limits = {"max_step_tokens": 32, "min_chunk_tokens": 8, "max_num_seqs": 8, "max_context": 128}
    scheduler = Scheduler(SchedulerConfig(**{**limits, "num_streams": num_streams, **config}), BlockPool(64, 8))
    engine = ModelledEngine(StepFormula.parse(text), scheduler, VOCAB, wait=clock.wait, sleep=clock.wait, clock=clock)
    return engine, clock


def request(name, num_prompt=5, max_tokens=4, arrival=0, output=(), **sampling):
    params = SamplingParams(max_tokens=max_tokens, seed=3, **sampling)
    tokens = [*range(1, num_prompt + 1), *output]
    return Sequence(name, 0, b"gw", tokens, num_prompt, params, 0, arrival)


def run(engine, limit=1000):
    outputs = {}
    for _ in range(limit):
        if engine.scheduler.idle and not engine.in_flight:
            return outputs
        for output in engine.run_once(1.0):
            outputs.setdefault(output.progress.seq.req_id, []).append(output)
    raise AssertionError("requests did not finish")


def test_a_step_takes_what_the_formula_says():
    engine, clock = make("base_ms=10,token_us=1000,context_us=100")
    engine.scheduler.add(request("r"))
    begun_s = clock.now
    assert len(engine.run_once(1.0)) == 1
    assert clock.now - begun_s == pytest.approx(0.010 + 5 * 0.001 + 15 * 0.0001)  # 1 + 2 + 3 + 4 + 5 pairs
    begun_s = clock.now
    engine.run_once(1.0)
    assert clock.now - begun_s == pytest.approx(0.010 + 0.001 + 6 * 0.0001)
    assert engine.stages.totals.attention_s == pytest.approx(0.0165 + 0.0116)


def test_it_waits_for_deadlines_and_not_in_a_loop():
    engine, clock = make()
    engine.scheduler.add(request("r", max_tokens=20))
    run(engine)
    assert len(clock.waits) == 20 and min(clock.waits) > 0.005


def test_a_message_may_interrupt_a_step_without_ending_it():
    engine, clock = make()
    engine.scheduler.add(request("r"))
    clock.interrupt_s = 0.004
    assert engine.run_once(1.0) == [] and engine.in_flight
    begun_s = clock.now
    assert engine.run_once(0.0) == [] and clock.now == begun_s
    assert len(engine.run_once(1.0)) == 1
    assert clock.now - begun_s == pytest.approx(0.011)


def test_the_same_request_gets_the_same_tokens_in_any_company_and_after_a_move():
    engine, _ = make()
    engine.scheduler.add(request("alone", max_tokens=12))
    alone = [output.progress.ids[0] for output in run(engine)["alone"]]
    crowd, _ = make(num_streams=2)
    for idx in range(6):
        crowd.scheduler.add(request(f"r{idx}", max_tokens=12, arrival=idx))
    outputs = run(crowd)
    assert all([o.progress.ids[0] for o in outputs[f"r{idx}"]] == alone for idx in range(6))
    moved, _ = make()
    moved.scheduler.add(request("moved", max_tokens=12, output=alone[:5]))
    assert [o.progress.ids[0] for o in run(moved)["moved"]] == alone[5:]
    assert len(set(alone)) > 6 and all(0 <= token < VOCAB for token in alone)
    assert modelled_token(request("hot", temperature=0.5), VOCAB) == alone[0]
    assert modelled_token(request("second choice", choice=1), VOCAB) != alone[0]
    greedy = [modelled_token(request("greedy", temperature=0.0, choice=choice), VOCAB) for choice in range(2)]
    assert greedy[0] == greedy[1]


def test_streams_take_turns_on_the_one_device():
    engine, _ = make(num_streams=2)
    for idx in range(2):
        engine.scheduler.add(request(f"r{idx}", max_tokens=3, arrival=idx))
    order = []
    while not engine.scheduler.idle:
        order += [output.progress.seq.req_id for output in engine.run_once(1.0)]
    assert order == ["r0", "r1"] * 3


def test_a_stop_token_ends_it_and_an_abort_in_flight_brings_nothing():
    engine, _ = make()
    first = modelled_token(request("probe"), VOCAB)
    engine.scheduler.add(request("stops", stop_token_ids=(first,)))
    [output] = engine.run_once(1.0)
    assert output.progress.finish is FinishReason.STOP
    engine.scheduler.add(request("gone"))
    assert engine.run_once(0.0) == []
    engine.scheduler.abort("gone")
    assert engine.run_once(1.0) == [] and not engine.in_flight
    engine.scheduler.check()


def test_a_failed_step_is_run_again():
    engine, _ = make()
    engine.scheduler.add(request("r", max_tokens=2))
    engine.run_once(0.0)
    engine.fail()
    assert not engine.in_flight
    assert len(run(engine)["r"]) == 2


def test_logprobs_have_the_form_that_was_asked_for():
    engine, _ = make()
    engine.scheduler.add(request("r", max_tokens=1, logprobs=2))
    [output] = engine.run_once(1.0)
    assert next(token for token, _ in output.logprobs.top) == output.progress.ids[0]
    assert len(output.logprobs.top) == 2 and output.logprobs.logprob < 0


def test_steps_reach_the_latency_model():
    engine, _ = make()
    samples = []
    engine.stages.observer = samples.append
    engine.scheduler.add(request("r", max_tokens=2))
    run(engine)
    engine.stages.deliver()
    assert [sample.load for sample in samples] == [StepLoad(5, 15, 1), StepLoad(1, 6, 1)]
    assert [sample.attention_s for sample in samples] == pytest.approx([0.015, 0.011])


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "''"),
        ("base_ms", "'base_ms'"),
        ("base_ms=x", "'base_ms=x'"),
        ("base_ms=-1", "'base_ms=-1'"),
        ("base_ms=nan", "'base_ms=nan'"),
        ("base_ms=inf", "'base_ms=inf'"),
        ("base_ms=1,base_ms=2", "'base_ms=2'"),
        ("base_ms=1,step_us=2", "'step_us=2'"),
        ("base_ms=0", "no time"),
    ],
)
def test_a_wrong_formula_is_named(text, wrong):
    with pytest.raises(ConfigError, match=r"attention\.modelled") as error:
        StepFormula.parse(text)
    assert wrong in str(error.value)


def test_a_modelled_worker_has_no_ffn_side():
    overrides = {"attention.modelled": "base_ms=1", "cluster.topology": "1A1F"}
    with pytest.raises(ConfigError, match="'mono', not 1A1F"):
        resolve_config(None, overrides)
    assert resolve_config(None, overrides | {"cluster.topology": "mono"}).attention.modelled == "base_ms=1"
