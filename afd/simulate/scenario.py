"""Makes what is simulated of flags: deployment, stage times, limits, arrivals. ConfigError says what does not fit."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import msgspec

from afd.errors import ConfigError
from afd.plan.calibration import CalibratedStages, load_calibration
from afd.plan.catalog import find, find_model, load_chips, load_models
from afd.plan.chips import with_network
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.memory import max_requests, require_weights_fit
from afd.plan.models import ModelShape
from afd.plan.search import SearchSpace
from afd.plan.stages import RooflineStages, StageModel
from afd.sched.scheduler import SchedulerConfig
from afd.simulate.arrivals import Arrivals
from afd.simulate.experts import expert_imbalance
from afd.simulate.fabric import Fabric
from afd.simulate.loading import LoadTimes
from afd.simulate.offered_load import RANK_NUM_SEQS, RANK_STEP_TOKENS, arrivals_of
from afd.simulate.planned import Failure, PlannedRollout, PlannedScaling
from afd.simulate.results import Report
from afd.simulate.settings import Settings
from afd.simulate.slowdowns import Pace, Slowdown
from afd.simulate.times import ConstantStages, StepTimes
from afd.types import Topology

AUTO_STREAMS = 3


@dataclass(frozen=True, slots=True)
class Scenario:
    """What one run of `afd simulate` simulates.

    load: the arrivals in words.
    rate: requests/s; 0 = a closed loop or a trace.
    """

    deployment: Deployment
    stages: StageModel
    settings: Settings
    arrivals: Arrivals
    load: str
    rate: float

    def usd_per_mtok(self, report: Report) -> float | None:
        """Rent of the chips while they were there, over its output; None where a price or output is missing."""
        deployment = self.deployment
        if deployment.usd_per_hour is None or not report.output_tokens:
            return None
        more = (report.attention_workers - deployment.topology.num_attention) * deployment.ranks_per_instance
        rent = deployment.usd_per_hour + more * deployment.attention_chip.price
        return rent / 3600 * report.duration_s / report.output_tokens * 1e6

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
    efficiency = efficiency_of(arguments, deployment.model, deployment.topology.num_ffn)
    require_weights_fit(deployment, efficiency)
    stages = _stages(arguments, deployment, efficiency)
    ranks, limit = deployment.ranks_per_instance, deployment.model.max_context
    arrivals, rate, words = arrivals_of(arguments, deployment, stages, efficiency)
    if arguments.min_chunk_tokens > (arguments.max_step_tokens or RANK_STEP_TOKENS * ranks):
        raise ConfigError("--min-chunk-tokens must not exceed --max-step-tokens")
    load = LoadTimes.of(deployment, efficiency, arguments.load_gb_per_s, arguments.start_s)
    settings = Settings(
        topology=deployment.topology,
        times=StepTimes(stages, deployment, _fabric(arguments, deployment, efficiency)),
        scheduler=SchedulerConfig(
            max_step_tokens=arguments.max_step_tokens or RANK_STEP_TOKENS * ranks,
            min_chunk_tokens=arguments.min_chunk_tokens,
            max_num_seqs=arguments.max_num_seqs or RANK_NUM_SEQS * ranks,
            max_context=limit,
            num_streams=arguments.streams or AUTO_STREAMS,
        ),
        num_blocks=arguments.kv_blocks or _num_blocks(deployment, efficiency, arguments.block_size),
        block_size=arguments.block_size,
        hash_block_tokens=arguments.hash_block_tokens if arrivals.shares_prefixes else 0,
        advises=arguments.autoscale is not None,
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
        failures=tuple(Failure.parse(text, deployment.topology, load) for text in arguments.fail),
        rollouts=tuple(PlannedRollout.parse(text) for text in arguments.rollout),
        scalings=tuple(PlannedScaling.parse(text) for text in arguments.scale),
        load=load,
        drain_s=arguments.drain_s,
        pace=Pace(
            tuple(Slowdown.parse(text, deployment.topology) for text in arguments.slow), deployment.topology.num_ffn
        ),
    )
    return Scenario(deployment, stages, settings, arrivals, words, rate)


def _deployment(arguments: argparse.Namespace) -> Deployment:
    chips, topology = load_chips(arguments.hardware_file, arguments.price), Topology.parse(arguments.topology)
    chips = with_network(chips, arguments.network_gbit)
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
        dispatch=arguments.dispatch,
    )
    return space.deployment(attention, ffn, topology, streams)


def efficiency_of(arguments: argparse.Namespace, model: ModelShape, num_holders: int) -> Efficiency:
    """The factors, with the imbalance that skewed experts make among so many FFN instances, or chips."""
    efficiency = Efficiency().with_overrides(arguments.efficiency)
    if not arguments.expert_skew:
        return efficiency
    if arguments.stages is not None or arguments.calibrate is not None:
        raise ConfigError("--expert-skew changes data-sheet times: measured and constant ones have what they have")
    if efficiency.expert_imbalance != Efficiency().expert_imbalance:
        raise ConfigError("--expert-skew and --efficiency expert_imbalance=... say the same: give one")
    if not model.max_top_k:
        raise ConfigError(f"--expert-skew: {model.name} has no experts")
    imbalance = expert_imbalance(model, num_holders, arguments.expert_skew, arguments.seed)
    return msgspec.structs.replace(efficiency, expert_imbalance=imbalance)


def _fabric(arguments: argparse.Namespace, deployment: Deployment, efficiency: Efficiency) -> Fabric | None:
    if arguments.oversubscription is None:
        return None
    if arguments.stages is not None or arguments.calibrate is not None or arguments.transfers in ("sender", "delay"):
        raise ConfigError("--oversubscription needs data-sheet links: leave out --stages, --calibrate and --transfers")
    return Fabric.of(deployment, efficiency, arguments.oversubscription)


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
