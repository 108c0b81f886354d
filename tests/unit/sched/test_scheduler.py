"""Scheduler: what a step holds, what a commit does, and that no schedule changes what a request gets."""

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.attention.look_ahead import LookAhead
from afd.kv.block_pool import BlockPool, chain_hash
from afd.sched.scheduler import Scheduler, SchedulerConfig
from afd.sched.sequence import Sequence
from afd.types import FinishReason, SamplingParams

EOS = 7


def make(num_blocks=64, block_size=4, prefix_cache=True, **config):
    defaults = {"max_step_tokens": 16, "min_chunk_tokens": 4, "max_num_seqs": 8, "max_context": 64, "num_streams": 2}
    return Scheduler(
        SchedulerConfig(**{**defaults, **config}), BlockPool(num_blocks, block_size, prefix_cache=prefix_cache)
    )


def sequence(name, prompt, max_tokens=4, *, arrival=0, priority=0, output=(), **sampling):
    params = SamplingParams(max_tokens=max_tokens, seed=1, temperature=0.0, **sampling)
    return Sequence(name, 0, b"gw", [*prompt, *output], len(prompt), params, priority, arrival)


def next_token(tokens):
    """A model: the next token is a hash of all tokens before it."""
    return hashlib.blake2b(repr(tokens).encode(), digest_size=1).digest()[0] % 50


def run_batch(scheduler, batch, kv):
    """Compute a micro-batch with the toy model; `kv` mirrors the cache: block slot -> the prefix it was made from."""
    size = scheduler.pool.block_size
    for item in batch.items:
        for position in range(item.start, item.start + item.num_new):
            kv[item.seq.blocks[position // size], position % size] = tuple(item.seq.tokens[: position + 1])
        for position in range(item.start + item.num_new):  # attention reads every earlier slot
            assert kv[item.seq.blocks[position // size], position % size] == tuple(item.seq.tokens[: position + 1])
    return {
        item.seq.req_id: next_token(item.seq.tokens) for item in batch.items if item.samples and not item.seq.doomed
    }


def places(scheduler, items):
    """What a batch is made from: every token's place, and those of what it attends to."""
    return [
        (item.seq, item.start, item.num_new, item.seq.blocks[: scheduler.pool.blocks_for(item.start + item.num_new)])
        for item in items
    ]


def expected(prompt, max_tokens, stops=()):
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def test_decodes_come_before_prefill_and_prefill_is_chunked():
    scheduler = make(num_streams=1)
    scheduler.add(sequence("short", [1, 2], arrival=0))
    batch = scheduler.schedule(0)
    scheduler.commit(batch, {"short": 3})
    scheduler.add(sequence("long", list(range(30)), arrival=1))
    batch = scheduler.schedule(0)
    assert [(i.seq.req_id, i.start, i.num_new, i.samples) for i in batch.items] == [
        ("short", 2, 1, True),
        ("long", 0, 15, False),
    ]
    scheduler.commit(batch, {"short": 3})
    assert [(i.start, i.num_new, i.samples) for i in scheduler.schedule(0).items] == [(3, 1, True), (15, 15, True)]


def test_every_prefill_gets_its_minimum_chunk():
    scheduler = make(num_streams=1)
    scheduler.add(sequence("a", list(range(40)), arrival=0))
    scheduler.add(sequence("b", list(range(100, 140)), arrival=1))
    assert [i.num_new for i in scheduler.schedule(0).items] == [12, 4]


def test_sequences_spread_over_streams_and_move_when_one_empties():
    scheduler = make(num_streams=2)
    for idx in range(4):
        scheduler.add(sequence(f"r{idx}", [idx + 1], max_tokens=1 if idx % 2 else 9, arrival=idx))
    first, second = scheduler.schedule(0), scheduler.schedule(1)
    assert {i.seq.req_id for i in first.items} == {"r0", "r2"}
    scheduler.commit(second, {"r1": 1, "r3": 1})  # both end
    scheduler.commit(first, {"r0": 1, "r2": 1})
    assert len(scheduler.schedule(0).items) == 1 and len(scheduler.schedule(1).items) == 1


def stream_sizes(first_stream, num_sequences, num_streams):
    scheduler = make(num_streams=num_streams, first_stream=first_stream)
    for i in range(num_sequences):
        scheduler.add(sequence(f"r{i}", [1, 2, 3], arrival=i))
    for stream in range(num_streams):
        scheduler.schedule(stream)
    return [sum(seq.stream == stream for seq in scheduler.sequences()) for stream in range(num_streams)]


def test_what_does_not_divide_by_the_streams_goes_to_another_one_at_each_worker():
    """3A1F: three workers of 4 equal sequences over 3 streams make gangs of 4, not of 6 and 3."""
    sizes = [stream_sizes(rank, 4, 3) for rank in range(3)]
    assert sizes == [[2, 1, 1], [1, 2, 1], [1, 1, 2]]
    assert [stream_sizes(rank, 1, 3) for rank in range(3)] == [[1, 0, 0]] * 3, "few sequences meet in one gang"


def test_a_new_limit_counts_from_the_next_micro_batch_on():
    scheduler = make(num_streams=1, max_step_tokens=8, min_chunk_tokens=4)
    scheduler.add(sequence("a", list(range(20))))
    batch = scheduler.schedule(0)
    scheduler.limit_step(5)
    assert batch.num_tokens == 8
    scheduler.commit(batch, {})
    assert scheduler.schedule(0).num_tokens == 5
    scheduler.limit_step(1000)
    assert scheduler.max_step_tokens == 8


def test_a_limit_is_one_of_prefill_and_holds_no_decode_back():
    scheduler = make(num_streams=1, max_step_tokens=16, min_chunk_tokens=4)
    for name in "abcdef":
        scheduler.add(sequence(name, [1]))
    batch = scheduler.schedule(0)
    scheduler.commit(batch, {item.seq.req_id: 1 for item in batch.items})
    scheduler.add(sequence("long", list(range(20))))
    scheduler.limit_step(3)
    batch = scheduler.schedule(0)
    assert [item.num_new for item in batch.items] == [1] * 6 + [4], "all decodes, and the least chunk"


@pytest.mark.parametrize(
    ("token", "max_tokens", "min_tokens", "finish"),
    [
        (EOS, 5, 0, FinishReason.STOP),
        (EOS, 5, 1, None),
        (1, 1, 0, FinishReason.LENGTH),
        (1, 5, 0, None),
        (EOS, 1, 0, FinishReason.STOP),
    ],
)
def test_finish_reasons(token, max_tokens, min_tokens, finish):
    scheduler = make(num_streams=1)
    scheduler.add(sequence("r", [1], max_tokens, stop_token_ids=(EOS,), min_tokens=min_tokens))
    [progress] = scheduler.commit(scheduler.schedule(0), {"r": token})
    assert (progress.first_idx, progress.ids, progress.finish) == (0, (token,), finish)
    assert scheduler.idle == (finish is not None)
    scheduler.check()


def test_resubmitted_output_counts_as_output():
    scheduler = make(num_streams=1)
    scheduler.add(sequence("r", [1, 2], 3, output=[5, 6]))
    [progress] = scheduler.commit(scheduler.schedule(0), {"r": 9})
    assert (progress.first_idx, progress.finish) == (2, FinishReason.LENGTH)


def test_abort_in_flight_returns_the_blocks_at_commit():
    scheduler = make(num_streams=1)
    scheduler.add(sequence("r", [1, 2, 3]))
    batch = scheduler.schedule(0)
    free = scheduler.pool.num_free
    assert scheduler.abort("r") is not None
    assert scheduler.pool.num_free == free and scheduler.idle
    assert scheduler.commit(batch, {}) == []
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    assert scheduler.abort("r") is None


def test_a_lost_exchange_books_nothing():
    scheduler = make(num_streams=1)
    scheduler.add(sequence("r", [1, 2, 3]))
    scheduler.fail_stream(scheduler.schedule(0))
    batch = scheduler.schedule(0)
    assert [(i.start, i.num_new) for i in batch.items] == [(0, 3)]


def test_victim_is_never_older_or_more_urgent_than_the_requester():
    scheduler = make(num_blocks=4, num_streams=1, max_context=16)
    scheduler.add(sequence("old", [1] * 7, 8, arrival=0))
    scheduler.add(sequence("young", [2] * 7, 8, arrival=1))
    batch = scheduler.schedule(0)
    scheduler.commit(batch, {"old": 5, "young": 5})
    batch = scheduler.schedule(0)  # both 8 tokens: still two blocks each
    scheduler.commit(batch, {"old": 5, "young": 5})
    batch = scheduler.schedule(0)  # "old" needs a third block: "young" gives way
    assert [i.seq.req_id for i in batch.items] == ["old"]
    assert scheduler.num_preemptions == 1 and scheduler.num_waiting == 1


def test_urgent_newcomer_does_not_lose_its_blocks_to_an_older_less_urgent_one():
    scheduler = make(num_blocks=4, num_streams=1, max_context=16)
    scheduler.add(sequence("old", [1] * 7, 8, arrival=0, priority=5))
    scheduler.add(sequence("urgent", [2] * 7, 8, arrival=1, priority=0))
    for _ in range(2):
        scheduler.commit(scheduler.schedule(0), {"old": 5, "urgent": 5})
    assert [i.seq.req_id for i in scheduler.schedule(0).items] == ["urgent"]


def test_what_is_foreseen_is_what_comes():
    scheduler = make(num_streams=1)
    scheduler.add(sequence("late", [1, 2, 3], max_tokens=9, arrival=1))
    scheduler.add(sequence("first", [4, 5, 6], max_tokens=9, arrival=0, priority=1))
    batch = scheduler.schedule(0)
    for _ in range(5):
        foreseen = scheduler.foresee(batch)
        blocks = [list(item.seq.blocks) for item in foreseen]
        scheduler.commit(batch, {"first": 3, "late": 3})
        batch = scheduler.schedule(0)
        assert batch.items == foreseen
        assert [item.seq.blocks for item in batch.items] == blocks
        scheduler.check()


@pytest.mark.parametrize("case", ["prompt left", "last token", "aborted", "newcomer", "few blocks"])
def test_nothing_is_foreseen_where_something_else_is_to_be_expected(case):
    scheduler = make(num_streams=1, num_blocks=3 if case == "few blocks" else 16, max_num_seqs=2)
    scheduler.add(sequence("a", list(range(20 if case == "prompt left" else 3)), 1 if case == "last token" else 5))
    scheduler.add(sequence("b", [7] * 3, 5, arrival=1))
    batch = scheduler.schedule(0)
    if case == "aborted":
        scheduler.abort("b")
    if case == "newcomer":
        scheduler.add(sequence("c", [1], arrival=2))
    num_free = scheduler.pool.num_free
    assert scheduler.foresee(batch) is None
    assert scheduler.pool.num_free == num_free


def test_refusal_names_the_limit():
    scheduler = make(num_blocks=4, block_size=4, max_context=64)
    assert scheduler.refusal(10, 6) is None
    assert "KV cache of 16 tokens" in scheduler.refusal(10, 7)
    assert "context of 64" in scheduler.refusal(60, 5)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_blocks=st.sampled_from([16, 24, 64]),
    streams=st.integers(1, 3),
    prefix=st.booleans(),
)
def test_any_interleaving_gives_each_request_what_it_gets_alone(seed, num_blocks, streams, prefix):
    """Random arrivals, aborts, lost exchanges, stream-count changes, preemption by a small pool, looks ahead."""
    rng = random.Random(seed)
    scheduler = make(num_blocks=num_blocks, num_streams=streams, prefix_cache=prefix)
    look_ahead = LookAhead(scheduler, lambda stream, items: places(scheduler, items))
    kv, flying, outputs, aborted, requests = {}, {}, {}, set(), {}
    for round_idx in range(400):
        if len(requests) < 12 and rng.random() < 0.3:
            name, base = f"r{len(requests)}", [rng.randrange(2)] * rng.randrange(1, 20)
            prompt = [*base, *(rng.randrange(9) for _ in range(rng.randrange(1, 6)))]
            requests[name] = (prompt, rng.randrange(1, 12))
            outputs[name] = []
            scheduler.add(
                sequence(name, *requests[name], arrival=round_idx, priority=rng.randrange(2), stop_token_ids=(EOS,))
            )
        if rng.random() < 0.03 and outputs:
            name = rng.choice(list(outputs))
            if scheduler.abort(name):
                aborted.add(name)
        if rng.random() < 0.02:
            scheduler.set_num_streams(rng.randrange(1, 4))
        stream = rng.randrange(3)
        if stream in flying:
            batch = flying.pop(stream)
            if rng.random() < 0.05:
                scheduler.fail_stream(batch)
            else:
                for progress in scheduler.commit(batch, run_batch(scheduler, batch, kv)):
                    assert progress.first_idx == len(outputs[progress.seq.req_id])
                    outputs[progress.seq.req_id].extend(progress.ids)
        elif stream < scheduler.num_streams:
            batch = scheduler.schedule(stream)
            if batch is not None:
                assert batch.num_tokens <= scheduler.config.max_step_tokens
                assert look_ahead.batch(batch) == places(scheduler, batch.items)
                flying[stream] = batch
        if flying and rng.random() < 0.5:
            look_ahead.prepare(rng.choice(list(flying.values())))
        scheduler.check()
        if len(requests) == 12 and scheduler.idle and not flying:
            break
    else:
        raise AssertionError("requests did not finish: somebody starves")
    for name, (prompt, max_tokens) in requests.items():
        want = expected(prompt, max_tokens, {EOS})
        got = outputs[name]
        assert got == want[: len(got)]
        assert name in aborted or got == want
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


@pytest.fixture
def num_hashed(monkeypatch):
    """Blocks that were hashed so far."""
    counted = []

    def counting(parent, token_ids):
        counted.append(None)
        return chain_hash(parent, token_ids)

    monkeypatch.setattr("afd.kv.block_pool.chain_hash", counting)
    return lambda: len(counted)


def decode(scheduler):
    """One step of stream 0."""
    batch = scheduler.schedule(0)
    scheduler.commit(batch, {item.seq.req_id: 9 for item in batch.items if item.samples})
    scheduler.check()


def test_the_head_of_the_line_is_hashed_once_however_long_it_waits(num_hashed):
    """Its prefix is cached, but there is no room for the rest: it is looked at again in every step."""
    scheduler = make(num_blocks=10, num_streams=1, max_step_tokens=64)
    scheduler.add(sequence("runs", [1] * 24, 15))
    decode(scheduler)
    decode(scheduler)
    scheduler.add(sequence("waits", [1] * 24 + [2] * 14, 2, arrival=1))
    before = num_hashed()
    for _ in range(12):
        decode(scheduler)
        assert scheduler.num_waiting == 1
    assert num_hashed() - before == 7 + 3, "its prefix and the first miss; and what the running one filled"
    for _ in range(4):
        if not scheduler.idle:
            decode(scheduler)
    assert scheduler.idle and scheduler.prefix_hits == 24, "it did get its cached prefix"


def test_a_preempted_sequence_is_not_hashed_again(num_hashed):
    scheduler = make(num_blocks=8, num_streams=1, max_step_tokens=64)
    for idx in range(2):
        scheduler.add(sequence(f"r{idx}", [idx] * 12, 12, arrival=idx))
    for _ in range(60):
        if not scheduler.idle:
            decode(scheduler)
    assert scheduler.idle and scheduler.num_preemptions
    assert num_hashed() <= 2 * (24 // 4)
