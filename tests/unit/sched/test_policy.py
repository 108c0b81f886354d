"""Admission: who is let in, what is promised; a worker in virtual time keeps its promises at twice its capacity."""

import random
from dataclasses import dataclass, field

import pytest

from afd.kv.block_pool import BlockPool
from afd.messages.serving import NEVER_S
from afd.sched.forecast import FIRST_GUESS, LengthForecast
from afd.sched.latency import LatencyModel, StepLoad, StepSample
from afd.sched.policy import Admission, Ask
from afd.sched.prefill import PrefillBudget
from afd.sched.scheduler import MAX_PAUSES, Scheduler, SchedulerConfig
from afd.sched.sequence import Sequence
from afd.types import SamplingParams

TPOT_S = 0.05
TTFT_S = 5.0


@dataclass
class Timeline:
    arrived_s: float
    target_s: float
    token_s: list[float] = field(default_factory=list)

    @property
    def tpot_s(self):
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)


class Worker:
    """Scheduler, admission and model of one worker on a device that takes base + token * tokens + context * pairs."""

    def __init__(self, *, policy="enforce", base_s=6e-3, token_s=3e-4, context_s=1e-7, num_blocks=4096, **config):
        limits = {"max_step_tokens": 256, "min_chunk_tokens": 8, "max_num_seqs": 256, "max_context": 4096}
        self.model = LatencyModel(overlap=False)
        pace = PrefillBudget(self.model) if policy == "enforce" else None
        self.scheduler = Scheduler(
            SchedulerConfig(**{**limits, "num_streams": 1, **config}), BlockPool(num_blocks, 16), pace
        )
        self.admission = Admission(self.scheduler, self.model, policy=policy, tpot_s=TPOT_S, ttft_s=TTFT_S)
        self.coefficients = (base_s, token_s, context_s)
        self.now = 0.0
        self.timelines = {}
        self.batches = []

    def ask(self, name, num_prompt=32, max_tokens=64, **fields):
        """Submit; the refusal or None."""
        params = SamplingParams(max_tokens=max_tokens, seed=1)
        refusal = self.admission.judge(Ask(name, num_prompt, params, **fields), self.now)
        if refusal is None:
            num_output, target_s = fields.get("num_output", 0), self.admission.target_of(fields.get("tpot_s", 0.0))
            tokens = [hash((name, i)) % 1000 for i in range(num_prompt + num_output)]
            arrival = len(self.timelines)
            seq = Sequence(name, 0, b"gw", tokens, num_prompt, params, 0, arrival, tpot_s=target_s)
            self.scheduler.add(seq)
            self.timelines[name] = Timeline(self.now, target_s)
        return refusal

    def step(self):
        """One micro-batch in virtual time; False when there is nothing to do."""
        batch = self.scheduler.schedule(0)
        if batch is None:
            return False
        load = StepLoad.of(batch)
        base_s, token_s, context_s = self.coefficients
        took_s = base_s + token_s * load.num_tokens + context_s * load.context_tokens
        self.now += took_s
        self.batches.append(batch)
        for progress in self.scheduler.commit(batch, {i.seq.req_id: 5 for i in batch.items if i.samples}):
            self.timelines[progress.seq.req_id].token_s.append(self.now)
            if progress.finish is not None:
                self.admission.finished(progress.seq)
        self.model.observe(StepSample(0, load, took_s, 0.0, 0.0, 0.0, 0, took_s, [0]))
        return True

    def warm_up(self, count=8):
        """A few requests, one after another: the model has seen prefill and decode steps."""
        for idx in range(count):
            assert self.ask(f"warm{idx}", num_prompt=16 + 24 * idx, max_tokens=8) is None
            while self.step():
                pass
        self.timelines.clear()

    def open_loop(self, rate, seconds, rng, **sizes):
        """Poisson arrivals for so long, no retries -> (admitted, refused)."""
        arrival_s, until_s, refused, count = self.now, self.now + seconds, 0, 0
        while arrival_s < until_s or not self.scheduler.idle:
            while arrival_s <= self.now and arrival_s < until_s:
                refused += self.ask(f"r{count}", **{key: draw(rng) for key, draw in sizes.items()}) is not None
                count += 1
                arrival_s += rng.expovariate(rate)
            if not self.step():
                self.now = arrival_s
        return count - refused, refused

    def attainment(self):
        done = [t for t in self.timelines.values() if len(t.token_s) > 1]
        return sum(t.tpot_s <= t.target_s for t in done) / len(done)


SIZES = {"num_prompt": lambda rng: rng.randrange(8, 200), "max_tokens": lambda rng: rng.randrange(8, 120)}


@pytest.mark.parametrize("seed", range(3))
def test_at_twice_the_capacity_every_admitted_request_keeps_its_target(seed):
    worker = Worker()
    worker.warm_up()
    admitted, refused = worker.open_loop(60.0, 20.0, random.Random(seed), **SIZES)
    assert refused > 0.3 * admitted, "this was meant to be an overload"
    assert worker.attainment() >= 0.99
    assert admitted > 200
    worker.scheduler.check()


@pytest.mark.parametrize("num_prompt", [64, 300])
@pytest.mark.parametrize("rate", [1.0, 2.0, 4.0, 6.0])
def test_a_light_load_is_served_whole(rate, num_prompt):
    """A small model on two cores: 64 tokens beside a decode take most of the target, 300 more than all of it."""
    if rate * num_prompt > 600:
        pytest.skip("more than this machine does within the target")
    worker = Worker(base_s=12e-3, token_s=5e-4)
    admitted, refused = worker.open_loop(
        rate, 60.0, random.Random(4), num_prompt=lambda rng: num_prompt, max_tokens=lambda rng: 64
    )
    assert refused <= 0.05 * admitted  # these come again within a second: the gateway's part
    assert worker.attainment() == 1.0
    assert max(t.token_s[0] - t.arrived_s for t in worker.timelines.values()) < TTFT_S


def test_where_weights_bind_more_rows_cost_nothing_and_are_let_in():
    """A plateau of 40 ms, as where reading the weights takes most of the target."""
    worker = Worker(base_s=40e-3, token_s=1e-5)
    admitted, refused = worker.open_loop(
        60.0, 30.0, random.Random(5), num_prompt=lambda rng: 16, max_tokens=lambda rng: 40
    )
    assert refused < 0.1 * admitted  # at first: it begins with one row
    assert worker.attainment() >= 0.99


def test_a_wrong_belief_is_corrected_within_seconds():
    worker = Worker(base_s=12e-3, token_s=5e-4)
    sizes = {"num_prompt": lambda rng: 32, "max_tokens": lambda rng: 48}
    worker.open_loop(6.0, 10.0, random.Random(6), **sizes)
    worker.coefficients = tuple(4 * value for value in worker.coefficients)  # others use the machine for a while
    worker.open_loop(6.0, 10.0, random.Random(7), **sizes)
    worker.coefficients = tuple(value / 4 for value in worker.coefficients)
    worker.open_loop(6.0, 5.0, random.Random(8), **sizes)
    worker.timelines.clear()
    admitted, refused = worker.open_loop(6.0, 20.0, random.Random(9), **sizes)
    assert refused <= 0.02 * admitted and worker.attainment() == 1.0


def test_without_a_policy_the_same_load_misses_the_target():
    worker = Worker(policy="off")
    worker.warm_up()
    _, refused = worker.open_loop(60.0, 10.0, random.Random(0), **SIZES)
    assert refused == 0 and worker.attainment() < 0.2


def test_observe_admits_everyone_and_counts_those_it_would_refuse():
    worker = Worker(policy="observe")
    worker.warm_up()
    _, refused = worker.open_loop(60.0, 5.0, random.Random(0), **SIZES)
    assert refused == 0 and worker.admission.num_refused > 50


def test_a_worker_that_knows_nothing_starts_carefully_and_learns():
    worker = Worker()  # no warm-up: priors of a slower machine
    admitted, _ = worker.open_loop(60.0, 20.0, random.Random(1), **SIZES)
    assert worker.attainment() >= 0.99 and admitted > 200


def test_decodes_come_first_and_the_oldest_prompt_never_stands_still_for_long():
    worker = Worker()
    worker.warm_up()
    worker.batches.clear()
    worker.open_loop(60.0, 10.0, random.Random(2), **SIZES)
    num_pauses, num_chunks, waiting = 0, 0, set()
    for batch in worker.batches:
        decodes = [idx for idx, item in enumerate(batch.items) if item.start >= item.seq.num_prompt]
        chunks = [idx for idx, item in enumerate(batch.items) if item.num_new > 1]
        assert not decodes or not chunks or max(decodes) < min(chunks)
        num_chunks += len(chunks)
        waiting = {seq for seq in waiting | {item.seq for item in batch.items} if seq.num_output == 0}
        num_pauses = 0 if len(decodes) < len(batch.items) or not waiting else num_pauses + 1
        assert num_pauses <= MAX_PAUSES
    assert num_chunks > 100


def test_prefill_beside_decodes_is_held_to_the_target_and_alone_it_is_not():
    worker = Worker(token_s=1e-3)
    worker.warm_up()
    worker.ask("long", num_prompt=1000)
    assert worker.scheduler.full_step() == StepLoad(0, 0, 0)
    worker.step()
    assert worker.batches[-1].num_tokens == 256  # nobody decodes: no TPOT to keep
    while worker.timelines["long"].token_s == []:
        worker.step()
    # As if it had been let in before: what a step holds is decided anew each time.
    seq = Sequence("second", 0, b"gw", list(range(500)), 500, SamplingParams(max_tokens=5, seed=1), 0, 99, tpot_s=0.2)
    worker.scheduler.add(seq)
    worker.step()
    assert [item.num_new for item in worker.batches[-1].items] == [
        1,
        37,
    ]  # (0.9 * 50 ms - base) / 1 ms, less the decode
    worker.scheduler.get("long").tpot_s = 0.2
    worker.step()
    num_prefill = worker.batches[-1].items[1].num_new
    assert 130 < num_prefill < 180  # (0.9 * 200 ms - base) / 1 ms


def test_a_loosened_request_does_not_loosen_the_others():
    worker = Worker()
    worker.warm_up()
    count = 0
    while worker.ask(f"r{count}", num_prompt=16, max_tokens=400) is None:
        count += 1
        worker.step()
        worker.step()
    assert worker.ask("patient", num_prompt=16, max_tokens=400, tpot_s=10.0) is not None
    patient = Worker(num_blocks=10_000)
    patient.warm_up()
    for idx in range(2 * count):
        assert patient.ask(f"p{idx}", num_prompt=16, max_tokens=400, tpot_s=10.0) is None
        patient.step()
    assert "tightest target here is 50 ms" in patient.ask("strict", num_prompt=16).detail


def test_a_tightened_target_is_kept_or_refused():
    worker = Worker()
    worker.warm_up()
    refusal = worker.ask("impossible", tpot_s=0.005)  # a step alone takes longer
    assert refusal is not None and refusal.retry_after_s == NEVER_S and "planned to 90%" in refusal.detail
    assert worker.ask("strict", num_prompt=16, tpot_s=0.02, max_tokens=200) is None
    rng = random.Random(0)
    worker.open_loop(60.0, 5.0, rng, **SIZES)
    assert worker.timelines["strict"].tpot_s <= 0.02


def test_an_idle_worker_takes_the_first_request_however_slow_it_believes_to_be():
    worker = Worker(base_s=0.2)
    worker.warm_up()
    assert worker.model.cycle_s([StepLoad(1, 10, 1)]) > TPOT_S
    assert worker.ask("first") is None
    assert worker.ask("second") is not None


def test_a_request_that_ran_elsewhere_is_refused_for_want_of_kv_only():
    worker = Worker(max_num_seqs=4, num_blocks=64)
    worker.warm_up()
    for idx in range(4):
        worker.ask(f"r{idx}", num_prompt=30, max_tokens=100)
    assert "attention.max_num_seqs" in worker.ask("new", num_prompt=30, max_tokens=100).detail
    assert worker.ask("moved", num_prompt=30, max_tokens=100, num_output=5, resumed=True) is None
    full = worker.ask("moved too", num_prompt=400, max_tokens=400, resumed=True)
    assert "KV cache of 64 blocks" in full.detail


def test_kv_is_promised_for_the_final_length_and_never_twice():
    worker = Worker(num_blocks=40)
    worker.warm_up(4)
    admitted = [worker.ask(f"r{idx}", num_prompt=16, max_tokens=100) is None for idx in range(8)]
    assert admitted == [True] * 5 + [False] * 3  # 8 blocks each
    while worker.step():
        pass
    assert worker.scheduler.num_preemptions == 0


def test_retry_after_says_when_the_place_comes():
    worker = Worker(max_num_seqs=8)
    worker.warm_up()
    for idx in range(8):
        assert worker.ask(f"r{idx}", num_prompt=16, max_tokens=20 * (idx + 1)) is None
        worker.step()
    retry_after_s = worker.ask("next").retry_after_s
    assert worker.admission.outlook().places_s[0] == pytest.approx(retry_after_s, rel=0.2)
    asked_s = worker.now
    while worker.scheduler.num_running == 8:
        worker.step()
    assert worker.now - asked_s == pytest.approx(retry_after_s, rel=0.25)
    assert worker.ask("next") is None


def test_the_outlook_of_a_full_worker_tells_when_each_place_comes():
    worker = Worker(max_num_seqs=8)
    worker.warm_up()
    assert worker.admission.outlook().places_s == ()
    for idx in range(8):
        assert worker.ask(f"r{idx}", num_prompt=16, max_tokens=40 * (idx + 1)) is None
        worker.step()
    outlook, asked_s, waited_s = worker.admission.outlook(), worker.now, []
    for idx in range(6):
        while worker.ask(f"next{idx}", num_prompt=16, max_tokens=400) is not None:
            worker.step()
        waited_s.append(worker.now - asked_s)
    assert list(outlook.places_s[:6]) == pytest.approx(waited_s, rel=0.25)
    assert 0.0 < worker.admission.cycle_s <= TPOT_S
    assert 0.0 < outlook.prefill_token_s <= TPOT_S * (MAX_PAUSES + 1) / 8


@pytest.mark.parametrize("asks_again", [True, False])
def test_small_requests_do_not_pass_a_large_one_for_as_long_as_it_asks(asks_again):
    worker = Worker(token_s=6e-4)
    worker.warm_up()
    large, small, count = {"num_prompt": 60, "max_tokens": 60}, {"num_prompt": 2, "max_tokens": 60}, 0
    while worker.ask(f"large{count}", **large) is None:
        count += 1
        worker.step()
    if asks_again:
        assert worker.ask(f"large{count}", **large) is not None
    # It would fit, and has to wait only where somebody does come again.
    first = None if worker.ask("small", **small) is not None else "small"
    while first is None:
        worker.step()
        if worker.ask("small", **small) is None:
            first = "small"
        elif asks_again and worker.ask(f"large{count}", **large) is None:
            first = "large"
    assert first == ("large" if asks_again else "small")


@pytest.mark.parametrize("num_streams", [1, 2, 3])
def test_streams_share_what_is_admitted(num_streams):
    worker = Worker(num_streams=num_streams)
    for tokens in (1, 30, 60, 120):
        for _ in range(30):
            took_s = 6e-3 + 3e-4 * tokens
            worker.model.observe(StepSample(0, StepLoad(tokens, 0, tokens), took_s, 0.0, 0.0, 0.0, 0, took_s, [0]))
    count = 0
    while worker.ask(f"r{count}", num_prompt=1, max_tokens=20) is None:
        count += 1
    # num_streams steps of 6 ms + 0.3 ms a token in 45 ms: every stream costs its base.
    assert count == pytest.approx((0.045 - num_streams * 6e-3) / 3e-4, rel=0.1)


def test_lengths_are_planned_from_the_answers_that_ended():
    lengths = LengthForecast()
    open_ended = SamplingParams(max_tokens=4000, seed=1, stop_token_ids=(2,))
    assert lengths.final_output(open_ended, 0) == FIRST_GUESS
    assert lengths.final_output(SamplingParams(max_tokens=4000, seed=1), 0) == 4000  # it cannot stop early
    rng = random.Random(0)
    for _ in range(300):
        lengths.add(rng.randrange(50, 151))
    planned = lengths.final_output(open_ended, 0)
    assert 110 <= planned <= 150
    assert lengths.final_output(open_ended, 400) == 500  # overdue
    assert lengths.final_output(SamplingParams(max_tokens=60, seed=1, stop_token_ids=(2,)), 0) == 60


def test_a_worker_that_is_too_slow_for_two_tells_the_second_when_it_will_be_idle():
    """Not "never": whoever comes then is let in."""
    worker = Worker(base_s=0.06)
    worker.warm_up()
    assert worker.ask("first", num_prompt=16, max_tokens=40) is None
    worker.step()
    asked_s, refusal = worker.now, worker.ask("second", num_prompt=16)
    assert "a token would take" in refusal.detail
    while worker.scheduler.num_running:
        worker.step()
    assert refusal.retry_after_s == pytest.approx(worker.now - asked_s, rel=0.25)
    assert worker.ask("second", num_prompt=16) is None


def test_the_plans_limit_for_a_step_bounds_prefill_and_refuses_nobody():
    worker = Worker()
    worker.warm_up()
    worker.scheduler.limit_step(16)
    for idx in range(20):
        assert worker.ask(f"r{idx}", num_prompt=1, max_tokens=200) is None
        worker.step()
    assert worker.scheduler.num_running == 20


def test_a_full_worker_that_has_room_again_says_so_at_once():
    worker = Worker(max_num_seqs=2)
    worker.warm_up()
    for idx in range(2):
        assert worker.ask(f"r{idx}", num_prompt=16, max_tokens=30) is None
    for _ in range(5):
        worker.step()
        assert worker.admission.outlook().places_s
    while worker.scheduler.num_running:
        worker.step()
    assert worker.admission.outlook().places_s == ()
    assert worker.ask("new", num_prompt=16, max_tokens=30) is None
