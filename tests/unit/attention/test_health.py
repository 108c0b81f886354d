"""What an attention worker exports of its pipeline."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from afd.attention.exchange import Combined, Gang
from afd.attention.health import RecentAttention
from afd.attention.metrics import AttentionMetrics
from afd.attention.modelled import ModelledEngine, StepFormula
from afd.attention.python_path import leg_of_one
from afd.kv.block_pool import BlockPool
from afd.sched.latency import LatencyModel
from afd.sched.policy import Admission
from afd.sched.scheduler import Scheduler, SchedulerConfig
from afd.sched.sequence import MicroBatch


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_bubble_exposed_transfer_and_gang_size_are_exported() -> None:
    clock = Clock()
    limits = {"max_step_tokens": 32, "min_chunk_tokens": 8, "max_num_seqs": 8, "max_context": 128, "num_streams": 1}
    scheduler = Scheduler(SchedulerConfig(**limits), BlockPool(8, 8))
    engine = ModelledEngine(StepFormula(1.0), scheduler, 10, wait=lambda _: None, clock=clock)
    latency, registry = LatencyModel(), CollectorRegistry()
    admission = Admission(scheduler, latency, policy="off", tpot_s=0.05, ttft_s=5.0)
    recent = RecentAttention(engine.stages.totals, clock)
    AttentionMetrics(registry, engine, None, admission, latency, recent)

    batch = MicroBatch(stream=0, step=1, items=[])
    clock.now = 1.0
    engine.stages.book(batch, leg_of_one(0, 0, (0.0, 0.0, 1.0, 1.0)))
    clock.now = 5.0
    answer = Combined(0, (), gang=Gang(size=2), compute_s=3.0)
    engine.stages.wait(1.0, [answer])
    engine.stages.answered(1.0, answer, 0, 1)
    clock.now = 10.0
    engine.stages.finish(0, batch, 6.0, started_s=0.0, more=False)

    def sample(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert sample("afd_bubble_ratio", role="attention") == 0.4
    assert sample("afd_exposed_transfer_seconds_total") == 1.0
    assert sample("afd_exposed_transfer_ratio") == 0.1
    assert sample("afd_gang_size", role="attention") == 2.0
    by_stage = {"attention": 1.0, "wait": 4.0, "other": 1.0, "head": 4.0, "ffn": 3.0}
    for stage, seconds in by_stage.items():
        assert sample("afd_stage_seconds_total", role="attention", stage=stage) == seconds
