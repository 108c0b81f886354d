"""Makes what is simulated of flags: deployment, stage times, limits, arrivals. ConfigError says what does not fit."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from afd.errors import ConfigError
from afd.plan.calibration import CalibratedStages, load_calibration
from afd.plan.catalog import find, find_model, load_chips, load_models
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.memory import max_requests, require_weights_fit
from afd.plan.pipeline import PipelineKind
from afd.plan.request_rate import BatchLimits, RequestShape, served_rate
from afd.plan.search import SearchSpace
from afd.plan.stages import RooflineStages, StageModel
from afd.sched.scheduler import SchedulerConfig
from afd.simulate.arrivals import Arrivals, ClosedLoop, Lengths, OpenLoop
from afd.simulate.failures import Failure
from afd.simulate.settings import Settings
from afd.simulate.times import ConstantStages, StepTimes
from afd.simulate.traces import Trace, TraceLimits
from afd.types import Topology

RANK_NUM_SEQS = RANK_STEP_TOKENS = 256  # the service's defaults
AUTO_STREAMS = 3
NUM_REQUESTS = 1000


@dataclass(frozen=True, slots=True)
class Scenario:
    """What one run of `afd simulate` simulates.

    load: the arrivals in words.
    rate: requests/s; 0 = a closed loop or a trace.
    """

    deployment: Deployment
    settings: Settings
    arrivals: Arrivals
    load: str
    rate: float

    def payload(self) -> dict[str, Any]:
        """What was simulated, as JSON."""
        settings = self.settings
        return {
            "topology": str(settings.topology),
            "model": self.deployment.model.name,
            "ranks_per_instance": self.deployment.ranks_per_instance,
            "streams": (settings.auto_streams and "auto") or settings.scheduler.num_streams,
            "sla_policy": settings.policy,
            "sla_tpot_ms": settings.tpot_s * 1e3,
            "sla_ttft_ms": settings.ttft_s * 1e3,
            "detail": settings.detail,
            "load": self.load,
            "rate": self.rate or None,
        }


def scenario_of(arguments: argparse.Namespace) -> Scenario:
    """Flags as a scenario."""
    deployment = _deployment(arguments)
    efficiency = Efficiency().with_overrides(arguments.efficiency)
    require_weights_fit(deployment, efficiency)
    stages = _stages(arguments, deployment, efficiency)
    ranks, limit = deployment.ranks_per_instance, deployment.model.max_context
    arrivals, rate, load = _arrivals(arguments, deployment, stages, efficiency)
    if arguments.min_chunk_tokens > (arguments.max_step_tokens or RANK_STEP_TOKENS * ranks):
        raise ConfigError("--min-chunk-tokens must not exceed --max-step-tokens")
    settings = Settings(
        topology=deployment.topology,
        times=StepTimes(stages, deployment),
        scheduler=SchedulerConfig(
            max_step_tokens=arguments.max_step_tokens or RANK_STEP_TOKENS * ranks,
            min_chunk_tokens=arguments.min_chunk_tokens,
            max_num_seqs=arguments.max_num_seqs or RANK_NUM_SEQS * ranks,
            max_context=limit,
            num_streams=arguments.streams or AUTO_STREAMS,
        ),
        num_blocks=arguments.kv_blocks or _num_blocks(deployment, efficiency, arguments.block_size),
        block_size=arguments.block_size,
        hash_block_tokens=arguments.hash_block_tokens
        if isinstance(arrivals, Trace) and arrivals.shares_prefixes
        else 0,
        auto_streams=0 if arguments.streams else AUTO_STREAMS,
        policy=arguments.sla_policy,
        tpot_s=arguments.sla_tpot_ms / 1e3,
        ttft_s=arguments.sla_ttft_ms / 1e3,
        max_queue=arguments.max_queue,
        gang_window_s=arguments.gang_window_ms / 1e3,
        recovery_timeout_s=arguments.recovery_timeout_s,
        stops_early=arguments.max_tokens is not None,
        max_tokens=arguments.max_tokens or 0,
        transfers=arguments.transfers or ("link" if arguments.calibrate is None else "delay"),
        detail=arguments.detail,
        failures=tuple(Failure.parse(text, deployment.topology) for text in arguments.fail),
    )
    return Scenario(deployment, settings, arrivals, load, rate)


def _deployment(arguments: argparse.Namespace) -> Deployment:
    chips, topology = load_chips(arguments.hardware_file, []), Topology.parse(arguments.topology)
    attention, ffn = find(chips, arguments.attention, "chip"), find(chips, arguments.ffn, "chip")
    streams = arguments.streams or AUTO_STREAMS
    space = SearchSpace(
        model=find_model(load_models(arguments.model_file), arguments.model).weighted(arguments.weight_dtype),
        attention_chips=[attention],
        ffn_chips=[ffn],
        max_chips=1 << 30,
        streams=(streams,),
        kv_dtype=arguments.attention_dtype,
        ranks_per_instance=arguments.ranks_per_instance,
    )
    return space.deployment(attention, ffn, topology, streams)


def _stages(arguments: argparse.Namespace, deployment: Deployment, efficiency: Efficiency) -> StageModel:
    if arguments.stages is not None:
        return ConstantStages.parse(arguments.stages)
    roofline = RooflineStages(efficiency)
    if arguments.calibrate is None:
        return roofline
    return CalibratedStages.of(load_calibration(arguments.calibrate), roofline, deployment)


def _num_blocks(deployment: Deployment, efficiency: Efficiency, block_size: int) -> int:
    """KV blocks that the chips of an instance hold beside weights and workspace."""
    context = min(deployment.model.max_context, 4096)
    num_tokens = max_requests(deployment, efficiency, context) * context * deployment.ranks_per_instance
    if num_tokens < block_size:
        raise ConfigError(f"a {deployment.attention_chip.title} holds no KV cache beside its weights")
    return num_tokens // block_size


def _arrivals(
    arguments: argparse.Namespace, deployment: Deployment, stages: StageModel, efficiency: Efficiency
) -> tuple[Arrivals, float, str]:
    """(arrivals, requests/s or 0, in words)"""
    limit, allowed = deployment.model.max_context, arguments.max_tokens or 0
    if arguments.trace is not None:
        limits = TraceLimits(
            max_context=limit,
            num_requests=arguments.requests or 0,
            max_tokens=allowed,
            skip_long=arguments.skip_long,
            speed=arguments.trace_speed,
            hash_block_tokens=arguments.hash_block_tokens,
        )
        trace = Trace(arguments.trace, limits)
        return trace, 0.0, f"{trace.summary}, {trace.mean_prompt:.0f} tokens in, {trace.mean_output:.0f} out on average"
    num_requests = arguments.requests or NUM_REQUESTS
    prompt = Lengths(arguments.input_len, arguments.range_ratio)
    output = Lengths(arguments.output_len, arguments.range_ratio)
    longest = prompt.longest + max(output.longest, allowed)
    if longest > limit:
        raise ConfigError(f"requests of {longest} tokens are past the limit of {deployment.model.name}: {limit} tokens")
    if allowed and allowed < output.longest:
        raise ConfigError(f"--max-tokens {allowed} is below the longest answer: {output.longest} tokens")
    sizes = f"{num_requests} requests, {prompt.mean} tokens in, {output.mean} out"
    if arguments.concurrency:
        closed = ClosedLoop(num_requests, arguments.concurrency, prompt, output, arguments.seed)
        return closed, 0.0, f"{sizes}, {arguments.concurrency} clients"
    rate, share = arguments.rate or 0.0, ""
    if not rate:
        rate = arguments.load * _capacity(arguments, deployment, stages, efficiency)
        share = f" ({arguments.load:.0%} of the forecast)"
    arrivals = OpenLoop(num_requests, rate, arguments.burstiness, prompt, output, arguments.seed)
    return arrivals, rate, f"{sizes}, {rate:.4g} requests/s{share}"


def _capacity(
    arguments: argparse.Namespace, deployment: Deployment, stages: StageModel, efficiency: Efficiency
) -> float:
    """Requests/s of the busiest steady state within the TPOT target and the limits of the service."""
    if arguments.stages is not None:
        raise ConfigError("--stages are constant, so no batch is the best: give --rate or --concurrency")
    ranks = deployment.ranks_per_instance
    served = served_rate(
        stages,
        efficiency,
        deployment,
        RequestShape(arguments.input_len, arguments.output_len),
        BatchLimits(
            (arguments.max_num_seqs or RANK_NUM_SEQS * ranks) / ranks,
            (arguments.max_step_tokens or RANK_STEP_TOKENS * ranks) / ranks,
        ),
        arguments.sla_tpot_ms / 1e3,
        PipelineKind.CONSERVATIVE if arguments.transfers == "sender" else PipelineKind.OPTIMISTIC,
    )
    if served is None:
        raise ConfigError(
            f"{deployment.topology} does not hold a TPOT of {arguments.sla_tpot_ms:g} ms at any batch: "
            f"give --rate or --concurrency"
        )
    return served.rate
