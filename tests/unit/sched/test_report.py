"""What a worker tells the coordinator of its pipeline."""

import pytest

from afd.attention.stages import StageTotals
from afd.kv.block_pool import BlockPool
from afd.messages.codec import encode
from afd.messages.membership import SyncRequest, sync_request_decoder
from afd.sched.latency import LatencyModel, StepLoad, StepSample
from afd.sched.report import CostReporter
from afd.sched.scheduler import Scheduler, SchedulerConfig
from afd.sched.sequence import Sequence
from afd.types import SamplingParams


def measured() -> LatencyModel:
    model = LatencyModel()
    for step in range(200):
        load = StepLoad(16, 1600, 16)
        model.observe(StepSample(step % 2, load, 5e-3, 1e-3, 4e-3, 6e-3, 32, 12e-3, (0, 1)))
    return model


def busy() -> Scheduler:
    scheduler = Scheduler(SchedulerConfig(num_streams=2), BlockPool(64, 16))
    for i in range(4):
        scheduler.add(Sequence(f"r{i}", 0, b"", [1] * 10, 10, SamplingParams(max_tokens=5, seed=0), 0, i))
    for stream in (0, 1):
        batch = scheduler.schedule(stream)
        scheduler.commit(batch, {item.seq.req_id: 7 for item in batch.items})
    return scheduler


def test_curves_and_load_are_the_models_and_the_schedulers():
    model, scheduler = measured(), busy()
    costs = CostReporter(model, scheduler, StageTotals()).report(0.0)
    assert (costs.attention, costs.head, costs.ffn) == tuple(
        curve.coefficients for curve in (model.attention, model.head, model.ffn)
    )
    assert costs.num_steps == model.num_steps
    assert costs.corrections == model.corrections(scheduler.full_step()) != {}
    assert (costs.tokens, costs.context, costs.rows, costs.num_streams) == (4, 4 * 11, 4, 2)
    sent = SyncRequest("attention", "a", 1, costs=costs)
    assert sync_request_decoder.decode(encode(sent)) == sent


def test_waits_and_gang_sizes_are_those_since_the_last_report():
    totals = StageTotals(wait_s=1.0, num_exchanges=100, num_gang_members=100)
    reporter = CostReporter(measured(), busy(), totals)
    assert reporter.report(10.0).gang_size == 1.0
    totals.wait_s, totals.num_exchanges, totals.num_gang_members = 1.5, 110, 125
    costs = reporter.report(12.0)
    assert costs.gang_size == pytest.approx(2.5) and costs.wait_share == pytest.approx(0.25)
    assert reporter.report(12.0).gang_size == pytest.approx(2.5), "no exchange, no news"
