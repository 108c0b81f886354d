"""The scheduler with a pool of its own for sliding-window layers: no schedule changes what a request gets."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.attention.look_ahead import LookAhead
from afd.kv.block_pool import BlockPool
from afd.kv.windowed_blocks import WindowedBlocks, kept
from afd.sched.scheduler import Scheduler, SchedulerConfig
from afd.sched.sequence import Sequence
from afd.types import SamplingParams

SIZE, WINDOW, STEP = 4, 6, 16


def make(num_blocks, num_windowed, num_streams=2):
    config = SchedulerConfig(max_step_tokens=STEP, min_chunk_tokens=4, max_num_seqs=8, max_context=64,
                             num_streams=num_streams)  # fmt: skip
    windowed = WindowedBlocks(BlockPool(num_windowed, SIZE), WINDOW, STEP)
    return Scheduler(config, BlockPool(num_blocks, SIZE), windowed=windowed)


def sequence(name, prompt, max_tokens, arrival):
    params = SamplingParams(max_tokens=max_tokens, seed=1, temperature=0.0)
    return Sequence(name, 0, b"gw", list(prompt), len(prompt), params, 0, arrival)


def next_token(tokens):
    return hashlib.blake2b(repr(tokens).encode(), digest_size=1).digest()[0] % 50


def compute(batch, full, windowed):
    """A model of two layers: one reads every earlier slot, the other its window's. Slots remember their prefix."""
    for item in batch.items:
        tokens = item.seq.tokens
        for position in range(item.start, item.start + item.num_new):
            for cache, blocks in ((full, item.seq.blocks), (windowed, item.seq.window_blocks)):
                cache[blocks[position // SIZE], position % SIZE] = tuple(tokens[: position + 1])
        for position in range(item.start, item.start + item.num_new):
            for seen in range(position + 1):
                at = seen // SIZE, seen % SIZE
                assert full[item.seq.blocks[at[0]], at[1]] == tuple(tokens[: seen + 1])
                if position - seen < WINDOW:
                    assert windowed[item.seq.window_blocks[at[0]], at[1]] == tuple(tokens[: seen + 1])
    return {i.seq.req_id: next_token(i.seq.tokens) for i in batch.items if i.samples and not i.seq.doomed}


def places(items):
    """What a batch is made from: every token's place, and the blocks that it sees in either layer."""
    found = []
    for item in items:
        first, last = max(0, item.start - WINDOW + 1) // SIZE, (item.start + item.num_new - 1) // SIZE
        seen = item.seq.blocks[: last + 1], item.seq.window_blocks[first : last + 1]
        found.append((item.seq, item.start, item.num_new, *seen))
    return found


def run(scheduler, seqs, order, caches=None):
    """caches: (full, windowed) of an earlier run, to go on with."""
    full, windowed = caches or ({}, {})
    outputs = {seq.req_id: [] for seq in seqs}
    waiting, flying = list(seqs), {}
    look_ahead = LookAhead(scheduler, lambda stream, items: places(items))
    for step in range(2000):
        if waiting:
            scheduler.add(waiting.pop(0))
        stream = order[step % len(order)] % scheduler.num_streams
        if stream in flying:
            batch = flying.pop(stream)
            for progress in scheduler.commit(batch, compute(batch, full, windowed)):
                outputs[progress.seq.req_id].extend(progress.ids)
        else:
            batch = scheduler.schedule(stream)
            if batch is not None:
                assert look_ahead.batch(batch) == places(batch.items)
                flying[stream] = batch
                look_ahead.prepare(batch)
        scheduler.check()
        if scheduler.idle and not waiting:
            return outputs
    raise AssertionError("requests did not finish")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    prompts=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=7),
    sizes=st.sampled_from([(64, 64), (20, 12), (14, 14), (40, 12)]),
    order=st.lists(st.integers(0, 1), min_size=1, max_size=8).filter(lambda o: len(set(o)) == 2),
)
def test_any_schedule_gives_every_request_its_tokens(prompts, sizes, order):
    """Shared prefixes, preemption, either pool too small; stale or dropped slots would be seen."""
    scheduler = make(*sizes)
    seqs = [
        sequence(f"r{i}", [*([kind] * length), i], num_tokens, i)
        for i, (kind, length, num_tokens) in enumerate(prompts)
    ]
    outputs = run(scheduler, seqs, order)
    for seq in seqs:
        tokens = seq.prompt_ids()
        for token in outputs[seq.req_id]:
            assert token == next_token(tokens)
            tokens.append(token)
        assert len(tokens) == len(seq.tokens)
    assert scheduler.windowed.pool.num_free == sizes[1]


def test_a_long_context_costs_windowed_layers_its_window():
    scheduler = make(32, 8, num_streams=1)
    seq = sequence("r", range(50), 10, 0)
    scheduler.add(seq)
    full, windowed = {}, {}
    while not scheduler.idle:
        batch = scheduler.schedule(0)
        scheduler.commit(batch, compute(batch, full, windowed))
        if not scheduler.idle:
            assert len(kept(seq.window_blocks)) <= -(-WINDOW // SIZE) + 1
            assert len(seq.blocks) == len(seq.window_blocks)


@pytest.mark.parametrize("num_windowed", [64, 10])
def test_a_second_turn_goes_on_from_the_first(num_windowed):
    """With room, all of a finished conversation is found; when newer text took the windowed blocks, less or nothing."""
    scheduler, caches = make(64, num_windowed, num_streams=1), ({}, {})
    first = sequence("first", range(37), 1, 0)
    run(scheduler, [first], [0], caches)
    if num_windowed == 10:
        run(scheduler, [sequence("other", range(100, 140), 1, 1)], [0], caches)
    second = sequence("second", [*range(37), 90, 91], 1, 2)
    outputs = run(scheduler, [second], [0], caches)
    assert second.num_cached == (36 if num_windowed == 64 else 0)
    assert outputs["second"] == [next_token([*range(37), 90, 91])]
