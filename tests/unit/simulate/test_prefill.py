"""Prompts cost what prefill costs: a cache is read once for a chunk, not once for each of its rows."""

from __future__ import annotations

import pytest

from afd.plan.calibration import CalibratedStages, Calibration, Point
from afd.plan.catalog import load_chips, load_models
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.request_rate import BatchLimits, RequestShape, served_rate
from afd.plan.stages import Prefill, RooflineStages, ffn_time, transfer_times
from afd.sched.scheduler import SchedulerConfig
from afd.simulate.arrivals import ClosedLoop, Lengths, OpenLoop
from afd.simulate.cluster import Simulation
from afd.simulate.settings import Settings
from afd.simulate.times import StepTimes
from afd.types import Topology

CHIPS, MODELS = load_chips(), load_models()
H800 = CHIPS["h800"]
FACTORS = Efficiency()
STAGES = RooflineStages(FACTORS)
CHUNK, PROMPT = 2048, 32_000


def servers(model: str, topology: str, streams: int = 3) -> Deployment:
    """A deployment whose instances are eight H800 each."""
    return Deployment(
        model=MODELS[model],
        attention_chip=H800,
        ffn_chip=H800,
        topology=Topology.parse(topology),
        streams=streams,
    )


def simulated(deployment: Deployment, arrivals, **changes):
    scheduler = SchedulerConfig(
        max_step_tokens=CHUNK, max_num_seqs=2048, max_context=65_536, num_streams=deployment.streams
    )
    times = StepTimes(STAGES, deployment)
    return Simulation(
        Settings(
            topology=deployment.topology,
            times=times,
            scheduler=scheduler,
            num_blocks=100_000,
            block_size=64,
            transfers="link",
            **changes,
        ),
        arrivals,
    ).run()


@pytest.mark.parametrize(
    ("model", "topology", "flops_per_pair", "kv_width"),
    [
        ("step3", "2A2F", 4 * 64 * 256, 2 * 256),  # 64 heads of 256; one K and one V head
        ("qwen3-235b-a22b", "1A1F", 4 * 64 * 128, 2 * 4 * 128),  # 64 heads of 128; four K and V heads
    ],
)
def test_the_first_token_of_a_long_prompt_by_hand(model, topology, flops_per_pair, kv_width):
    deployment = servers(model, topology)
    shape, layers = deployment.model, deployment.model.num_layers
    kv_bytes = kv_width * (shape.attention[0].kv_bytes)
    peak = H800.peak_flops if shape.attention[0].kv_bytes == 1 else H800.bf16_flops
    alone = deployment.replace(topology=Topology(1, deployment.topology.num_ffn))
    expected_s = 0.0
    for start in range(0, PROMPT, CHUNK):
        rows = min(CHUNK, PROMPT - start)
        pairs = sum(range(start + 1, start + rows + 1))
        width = FACTORS.core_bandwidth(shape.attention[0].kv_bytes)
        read_s = (start + rows) * kv_bytes / (8 * H800.memory_bytes_per_s * width)
        core_s = max(read_s, pairs * flops_per_pair / (8 * peak * FACTORS.core_flops))
        weights_s = shape.linear_weights / H800.memory_bytes_per_s
        linear_s = max(weights_s, rows * 2 * shape.linear_weights / 8 / H800.peak_flops) / FACTORS.gemm / layers
        attention_s = core_s + linear_s + FACTORS.launch_s
        ffn_s = ffn_time(deployment, FACTORS, rows / deployment.attention_ranks)
        expected_s += layers * (attention_s + ffn_s + sum(transfer_times(alone, FACTORS, rows / 8)))
    expected_s *= 1.0 + FACTORS.jitter
    report = simulated(deployment, ClosedLoop(1, 1, Lengths(PROMPT), Lengths(2), seed=0))
    assert report.ttft.mean_ms == pytest.approx(expected_s * 1e3, rel=0.02)
    decode_s = PROMPT * PROMPT / 2 * layers * kv_bytes / (8 * H800.memory_bytes_per_s * width)
    assert decode_s > expected_s, "priced as decodes, the reads alone would take longer"


def test_a_chunk_of_one_row_is_a_decode_and_more_rows_cost_less_than_as_many_decodes():
    deployment = servers("step3", "2A2F")
    one = STAGES.times(deployment, 4096, 0, Prefill(1, 4096, 1, 4096))
    assert one.attention_s == pytest.approx(STAGES.times(deployment, 4096, 1).attention_s)
    assert one.ffn_s == STAGES.times(deployment, 4096, 1).ffn_s
    before_s = one.attention_s
    for rows in (2, 16, 256):
        chunk_s = STAGES.times(deployment, 4096, 0, Prefill(rows, 4096, 1, 4096)).attention_s
        assert before_s <= chunk_s <= STAGES.times(deployment, 4096, rows).attention_s
        before_s = chunk_s


def test_decodes_and_prefill_of_one_step_add_up_and_share_the_weights():
    deployment = servers("step3", "2A2F")
    prefill = Prefill(200, 1000, 1, 2000)
    both, decodes, rows = (
        STAGES.times(deployment, 8000, num, part).attention_s for num, part in ((64, prefill), (64, None), (0, prefill))
    )
    assert max(decodes, rows) < both < decodes + rows


def test_measured_curves_price_rows_by_what_they_attend_to():
    points = [
        Point(tokens, 1e-4 + tokens * (1e-5 + context * 1e-8), context) for tokens in (8, 64) for context in (0, 500)
    ]
    flat = [Point(8, 1e-4), Point(64, 2e-4)]
    shape = servers("smollm2-135m-instruct", "1A1F")
    measured = Calibration(
        schema="afd-calibration/1",
        model="smollm2-135m-instruct",
        topology="1A1F",
        ranks_per_instance=8,
        t_A=points,
        t_F=flat,
        t_C=flat,
    )
    stages = CalibratedStages.of(measured, STAGES, shape)
    mixed = stages.times(shape, 400, 16, Prefill(16, 200, 1, 216))
    assert mixed == stages.times(shape, 300, 32)


@pytest.mark.parametrize(("prompt", "output"), [(128, 60), (1000, 100)])
def test_the_forecast_rate_is_about_what_the_simulation_serves_within_the_target(prompt, output):
    deployment = servers("step3", "2A2F")
    shape = RequestShape(prompt, output)
    served = served_rate(STAGES, FACTORS, deployment, shape, BatchLimits(256, 256), 0.05)
    arrivals = OpenLoop(1200, 0.9 * served.rate, 1.0, Lengths(prompt), Lengths(output), seed=1)
    report = simulated(deployment, arrivals)
    assert report.num_good > 0.97 * 1200
    assert 0.7 * served.tpot_s < report.tpot.p50_ms / 1e3 < served.tpot_s


def test_longer_prompts_cost_rate_and_a_target_that_is_too_tight_has_none():
    deployment = servers("step3", "4A2F")
    rates = [
        served_rate(STAGES, FACTORS, deployment, RequestShape(prompt, 200), BatchLimits(256, 256), 0.05).rate
        for prompt in (1, 128, 1000, 8000, 32_000)
    ]
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0.0
    assert served_rate(STAGES, FACTORS, deployment, RequestShape(128, 200), BatchLimits(256, 256), 0.001) is None
    pure = served_rate(STAGES, FACTORS, deployment, RequestShape(128, 1), BatchLimits(256, 256), 0.001)
    assert pure.num_decodes == 0.0 and pure.rate > rates[1], "answers of one token have no TPOT"
