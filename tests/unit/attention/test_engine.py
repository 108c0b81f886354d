"""The stream loop over a local exchange: every request gets what the in-process reference gives it."""

import random
from collections import deque

import pytest
import torch

from afd.attention.engine import AttentionEngine
from afd.attention.exchange import LocalExchange
from afd.attention.python_path import PythonPath
from afd.errors import PeerLostError
from afd.kv.block_pool import BlockPool
from afd.kv.cache import KVCache
from afd.kv.windowed_blocks import WindowedBlocks
from afd.model.loading import load_attention_half, load_ffn_half, resolve_model
from afd.model.reference import compare, reference_generate
from afd.model.sharding import ShardSpec
from afd.ops.select import select
from afd.sched import head_slices
from afd.sched.scheduler import Scheduler, SchedulerConfig
from afd.sched.sequence import Sequence
from afd.types import FfnParallel, SamplingParams


@pytest.fixture(scope="module")
def halves():
    torch.set_num_threads(1)
    folder = resolve_model("dummy:step3-tiny")
    attention = load_attention_half(folder, select("cpu", "float32"))
    whole = load_ffn_half(folder, ShardSpec(0, 1, FfnParallel.HYBRID), select("cpu", "float32"))
    pair = [
        load_ffn_half(folder, ShardSpec(rank, 2, FfnParallel.HYBRID), select("cpu", "float32")) for rank in range(2)
    ]
    return attention, whole, pair


def make_engine(
    attention, ffns, *, num_streams=2, num_blocks=128, prefix_cache=True, max_step_tokens=16, exchange=None
):
    scheduler = Scheduler(
        SchedulerConfig(
            max_step_tokens=max_step_tokens,
            min_chunk_tokens=4,
            max_num_seqs=16,
            max_context=256,
            num_streams=num_streams,
        ),
        BlockPool(num_blocks, 8, prefix_cache=prefix_cache),
    )
    cache = KVCache(attention.spec, num_blocks, 8, attention.dtype)
    return AttentionEngine(attention, scheduler, PythonPath(attention, cache, exchange or LocalExchange(ffns)))


def request(idx, rng, vocab, **sampling):
    prompt = [*([idx % 2] * rng.randrange(1, 30)), *(rng.randrange(vocab) for _ in range(rng.randrange(1, 8)))]
    params = SamplingParams(**{"max_tokens": rng.randrange(1, 20), "seed": idx, "temperature": 0.0, **sampling})
    return Sequence(f"r{idx}", 0, b"gw", list(prompt), len(prompt), params, 0, idx)


def run_all(engine, limit=5000, timeout_s=0.0):
    outputs, logprobs = {}, {}
    for _ in range(limit):
        if engine.scheduler.idle:
            break
        for output in engine.run_once(timeout_s):
            outputs.setdefault(output.progress.seq.req_id, []).extend(output.progress.ids)
            logprobs.setdefault(output.progress.seq.req_id, []).append(output.logprobs)
    assert engine.scheduler.idle, "requests did not finish"
    engine.scheduler.check()
    return outputs, logprobs


@pytest.mark.parametrize(
    ("num_streams", "prefix_cache", "num_blocks", "sharded"),
    [(1, True, 128, False), (2, True, 128, True), (3, False, 128, False), (2, True, 12, False)],
)
def test_equals_the_reference(halves, num_streams, prefix_cache, num_blocks, sharded):
    attention, whole, pair = halves
    engine = make_engine(
        attention,
        pair if sharded else [whole],
        num_streams=num_streams,
        num_blocks=num_blocks,
        prefix_cache=prefix_cache,
    )
    rng = random.Random(num_streams)
    seqs = [request(idx, rng, attention.spec.vocab_size) for idx in range(10)]
    for seq in seqs:
        engine.scheduler.add(seq)
    outputs, _ = run_all(engine)
    if num_blocks == 12:
        assert engine.scheduler.num_preemptions, "the small pool was meant to preempt"
    for seq in seqs:
        reference = reference_generate(attention, [whole], seq.prompt_ids(), seq.sampling)
        verdict = compare(reference, outputs[seq.req_id])
        assert verdict.ok, (seq.req_id, verdict)


def test_sampling_is_independent_of_company_and_streams(halves):
    attention, whole, _ = halves
    sampling = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1, "max_tokens": 12}
    seqs = [request(idx, random.Random(idx), attention.spec.vocab_size, **sampling) for idx in range(6)]
    engine = make_engine(attention, [whole], num_streams=3)
    for seq in seqs:
        engine.scheduler.add(seq)
    together, _ = run_all(engine)
    for seq in seqs:
        alone = reference_generate(attention, [whole], seq.prompt_ids(), seq.sampling)
        assert compare(alone, together[seq.req_id]).ok


class ScriptedExchange:
    """Each answer is there after so many looks of whatever kind, or as soon as somebody waits for it."""

    ready = True

    def __init__(self, halves, looks):
        self._inner, self._looks = LocalExchange(halves), looks
        self._num_looks, self._due = 0, deque()

    def send(self, stream, step, dispatch):
        self._inner.send(stream, step, dispatch)
        self._due.append(self._num_looks + self._looks)

    def has_news(self):
        self._num_looks += 1
        return bool(self._due) and self._due[0] <= self._num_looks

    def poll(self, timeout_s):
        if not self.has_news() and not (timeout_s and self._due):
            return []
        self._due.popleft()
        return self._inner.poll(0.0)

    def idle(self, stream):
        pass


NEVER = 1 << 30  # looks: only to who waits


@pytest.mark.parametrize("end", [None, 7])
def test_steps_are_prepared_while_the_rows_of_the_one_before_are_away(halves, end, monkeypatch):
    """end: one of the sequences ends early, by a token that nobody foresaw."""
    attention, whole, _ = halves
    engine = make_engine(attention, [whole], num_streams=1, exchange=ScriptedExchange([whole], NEVER))
    built = []
    real = attention.prepare
    monkeypatch.setattr(attention, "prepare", lambda batch: built.append(batch) or real(batch))
    seqs = []
    for idx in range(2):
        greedy = SamplingParams(max_tokens=12, seed=0, temperature=0.0)
        reference = reference_generate(attention, [whole], [idx, 5], greedy)
        if end is not None and idx == 0:
            stops = (reference.token_ids[end],)
            greedy = SamplingParams(max_tokens=12, seed=0, temperature=0.0, stop_token_ids=stops)
        seqs.append(Sequence(f"r{idx}", 0, b"gw", [idx, 5], 2, greedy, 0, idx))
    for seq in seqs:
        engine.scheduler.add(seq)
    outputs, _ = run_all(engine, timeout_s=1.0)
    for seq in seqs:
        assert compare(reference_generate(attention, [whole], seq.prompt_ids(), seq.sampling), outputs[seq.req_id]).ok
    ahead = [stage for stage in engine.stages.ring.snapshot() if stage.name == "look_ahead"]
    assert len(ahead) == 11 and ahead[0].num_tokens == 2 and {stage.stream for stage in ahead} == {0}
    in_vain = 0 if end is None else 1
    assert len(built) == engine.stages.totals.num_steps + in_vain
    assert engine.stages.totals.ahead_s == pytest.approx(sum(stage.end_s - stage.start_s for stage in ahead))


def stages_of_three_streams(halves, monkeypatch, looks):
    """Of heads that can be cut every 64 entries of the vocabulary."""
    attention, whole, _ = halves
    monkeypatch.setattr(head_slices, "MIN_SLICE_ROWS", 64)
    monkeypatch.setattr(head_slices, "SLICE_LOGITS", 64)
    engine = make_engine(attention, [whole], num_streams=3, exchange=ScriptedExchange([whole], looks))
    for idx in range(6):
        engine.scheduler.add(request(idx, random.Random(idx), attention.spec.vocab_size, max_tokens=6))
    run_all(engine, timeout_s=1.0)
    return engine.stages.ring.snapshot()


def test_one_head_at_a_time_and_layers_before_it(halves, monkeypatch):
    last_layer = halves[0].spec.num_layers - 1
    under_way, num_slices, num_gave_way, arrived = None, 0, 0, None
    for stage in stages_of_three_streams(halves, monkeypatch, 4):
        if stage.name in ("head", "head_slice"):
            assert arrived is None, "rows waited for a head"
            assert under_way in (None, stage.stream), "a head began while another one was not finished"
            under_way = stage.stream if stage.name == "head_slice" else None
            num_slices += stage.name == "head_slice"
        elif stage.name == "exchange" and stage.layer < last_layer:
            arrived = stage.stream
        elif stage.name == "attention" and stage.stream == arrived:
            num_gave_way += under_way is not None
            arrived = None
    assert num_slices > 20 and num_gave_way > 20


def test_a_head_that_keeps_nobody_waiting_is_not_cut(halves, monkeypatch):
    stages = stages_of_three_streams(halves, monkeypatch, NEVER)
    names = {stage.name for stage in stages}
    assert "head" in names and "head_slice" not in names


def test_logprobs_only_where_asked(halves):
    attention, whole, _ = halves
    engine = make_engine(attention, [whole], num_streams=1)
    rng = random.Random(0)
    plain, asked = request(0, rng, 50, max_tokens=3), request(1, rng, 50, max_tokens=3, logprobs=4)
    for seq in (plain, asked):
        engine.scheduler.add(seq)
    _, logprobs = run_all(engine)
    assert logprobs["r0"] == [None] * 3
    assert all(len(entry.top) == 4 and entry.logprob == entry.top[0][1] for entry in logprobs["r1"])


class FlakyExchange(LocalExchange):
    """Loses every exchange in flight now and then, as a mesh does when an FFN rank drops out."""

    def __init__(self, halves, seed):
        super().__init__(halves)
        self._rng = random.Random(seed)

    def poll(self, timeout_s):
        if self._rng.random() < 0.03:
            raise PeerLostError("ffn/0 is lost: scripted")
        return super().poll(timeout_s)


def test_interrupted_steps_run_again_and_change_nothing(halves):
    attention, whole, _ = halves
    engine = make_engine(attention, [whole], num_streams=2, exchange=FlakyExchange([whole], 5))
    seqs = [request(idx, random.Random(idx), attention.spec.vocab_size) for idx in range(6)]
    for seq in seqs:
        engine.scheduler.add(seq)
    outputs, losses = {}, 0
    for _ in range(20_000):
        if engine.scheduler.idle:
            break
        try:
            for output in engine.run_once(0.0):
                outputs.setdefault(output.progress.seq.req_id, []).extend(output.progress.ids)
        except PeerLostError:
            losses += 1
            engine.fail()
    assert losses > 3
    for seq in seqs:
        assert compare(reference_generate(attention, [whole], seq.prompt_ids(), seq.sampling), outputs[seq.req_id]).ok
    engine.scheduler.check()


@pytest.mark.parametrize("logprobs", [-1, 0])
def test_logits_that_are_not_finite_end_only_their_own_request(halves, logprobs):
    attention, whole, _ = halves
    engine = make_engine(attention, [whole], num_streams=1)
    bad, good = (request(idx, random.Random(idx), 50, max_tokens=3, logprobs=logprobs) for idx in range(2))
    for seq in (bad, good):
        engine.scheduler.add(seq)
    real = attention.head_rows

    def poisoned(x_rows):
        rows = real(x_rows)
        rows[:1] = float("nan")
        return rows

    attention.head_rows = poisoned
    try:
        while not (outputs := engine.run_once(0.0)):
            pass
    finally:
        del attention.head_rows
    [output] = [output for output in outputs if output.error]
    assert output.progress.seq is bad and output.error and output.progress.finish == "error"
    while not engine.scheduler.idle:
        engine.run_once(0.0)
    engine.scheduler.check()
    assert good.num_output == 3


@pytest.mark.parametrize(("num_blocks", "num_windowed"), [(128, 24), (16, 16)])
def test_windowed_layers_with_blocks_of_their_own_equal_the_reference(num_blocks, num_windowed):
    """The reference keeps everything. Contexts beyond the window, shared prefixes, preemption."""
    folder = resolve_model("dummy:step3.5-flash-tiny")  # window 24
    attention = load_attention_half(folder, select("cpu", "float32"))
    whole = load_ffn_half(folder, ShardSpec(), select("cpu", "float32"))
    config = SchedulerConfig(max_step_tokens=16, min_chunk_tokens=4, max_num_seqs=4, max_context=256, num_streams=2)
    windowed = WindowedBlocks(BlockPool(num_windowed, 8), folder.spec.max_window, 16)
    scheduler = Scheduler(config, BlockPool(num_blocks, 8), windowed=windowed)
    cache = KVCache(folder.spec, num_blocks, 8, attention.dtype, num_window_blocks=num_windowed)
    engine = AttentionEngine(attention, scheduler, PythonPath(attention, cache, LocalExchange([whole])))
    rng = random.Random(4)
    shared = [rng.randrange(500) for _ in range(50)]
    prompts = [[*shared[: rng.randrange(20, 50)], *(rng.randrange(500) for _ in range(3))] for _ in range(6)]
    params = SamplingParams(max_tokens=30, seed=0, temperature=0.0)
    seqs = [Sequence(f"r{i}", 0, b"gw", list(p), len(p), params, 0, i) for i, p in enumerate(prompts)]
    for seq in seqs:
        scheduler.add(seq)
    outputs, _ = run_all(engine)
    for seq, prompt in zip(seqs, prompts, strict=True):
        verdict = compare(reference_generate(attention, [whole], prompt, params), outputs[seq.req_id])
        assert verdict.ok, (seq.req_id, verdict)
    assert (scheduler.num_preemptions > 0) == (num_blocks == 16)
    assert windowed.pool.num_free == num_windowed
