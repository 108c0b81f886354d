"""What the attention engine writes down when both halves are in one process: all its time, each moment once."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from afd.attention.engine import AttentionEngine
from afd.attention.exchange import LocalExchange
from afd.attention.python_path import PythonPath
from afd.kv.block_pool import BlockPool
from afd.kv.cache import KVCache
from afd.model.loading import load_attention_half, load_ffn_half, resolve_model
from afd.model.sharding import ShardSpec
from afd.ops.select import select
from afd.sched.scheduler import Scheduler, SchedulerConfig
from afd.sched.sequence import Sequence
from afd.types import FfnParallel, SamplingParams


@pytest.mark.parametrize("num_streams", [1, 2])
def test_mono_computes_where_it_would_wait(num_streams):
    torch.set_num_threads(1)
    folder = resolve_model("dummy:step3-tiny")
    half = load_attention_half(folder, select("cpu", "float32"))
    whole = load_ffn_half(folder, ShardSpec(0, 1, FfnParallel.HYBRID), select("cpu", "float32"))
    scheduler = Scheduler(
        SchedulerConfig(
            max_step_tokens=16, min_chunk_tokens=4, max_num_seqs=4, max_context=64, num_streams=num_streams
        ),
        BlockPool(32, 8),
    )
    path = PythonPath(half, KVCache(half.spec, 32, 8, half.dtype), LocalExchange([whole]))
    engine = AttentionEngine(half, scheduler, path)
    rng = random.Random(0)
    for idx in range(4):
        prompt = [rng.randrange(folder.spec.vocab_size) for _ in range(5)]
        params = SamplingParams(max_tokens=3, seed=0, temperature=0.0)
        scheduler.add(Sequence(f"r{idx}", 0, b"gw", prompt, len(prompt), params, 0, idx))
    for _ in range(1000):
        if scheduler.idle:
            break
        engine.run_once(0.0)
    assert scheduler.idle

    stages = engine.stages.ring.snapshot()
    by_name = {name: [s for s in stages if s.name == name] for name in {s.name for s in stages}}
    waits = {"wait"} if num_streams == 1 else set()  # with two, the other one is always ready
    assert set(by_name) == {"embed", "attention", "dispatch", "exchange", "ffn", "combine", "head"} | waits
    num_steps, num_layers = len(by_name["head"]), folder.spec.num_layers
    assert num_steps == len(by_name["embed"]) == engine.stages.totals.num_steps
    for name in ("attention", "dispatch", "exchange", "ffn", "combine"):
        assert len(by_name[name]) == num_steps * num_layers
        assert {s.layer for s in by_name[name]} == set(range(num_layers))
    assert {s.stream for s in by_name["head"]} == set(range(num_streams))
    # The main thread does one thing at a time; computing the FFN half is none of its waiting.
    own = sorted((s for s in stages if s.name != "exchange"), key=lambda s: (s.start_s, s.end_s))
    assert all(before.end_s <= after.start_s for before, after in pairwise(own))
    waited_s = sum(s.end_s - s.start_s for s in by_name.get("wait", ()))
    computed_s = sum(s.end_s - s.start_s for s in by_name["ffn"])
    totals = engine.stages.totals
    assert 0.0 <= waited_s < computed_s
    assert abs(totals.ffn_s - computed_s) < 1e-6 and abs(totals.wait_s - waited_s) < 1e-6
