"""The load that flags ask for: arrivals, and the rate of an open loop. ConfigError says what does not fit."""

from __future__ import annotations

import argparse

from afd.errors import ConfigError
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.pipeline import PipelineKind
from afd.plan.request_rate import BatchLimits, RequestShape, served_rate
from afd.plan.stages import StageModel
from afd.simulate.arrivals import Arrivals, ClosedLoop, Lengths, OpenLoop
from afd.simulate.traces import Trace, TraceLimits

NUM_REQUESTS = 1000
RANK_NUM_SEQS = RANK_STEP_TOKENS = 256  # the service's defaults


def arrivals_of(
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
