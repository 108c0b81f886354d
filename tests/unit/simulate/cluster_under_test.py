"""Small clusters with constant stage times, and their closed forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from afd.plan.catalog import load_chips, load_models
from afd.plan.deployment import Deployment
from afd.plan.stages import StageModel, StageTimes
from afd.sched.scheduler import SchedulerConfig
from afd.simulate.arrivals import Arrivals, ClosedLoop, Lengths
from afd.simulate.cluster import Simulation
from afd.simulate.results import Report
from afd.simulate.settings import Settings
from afd.simulate.times import ConstantStages, StepTimes
from afd.types import Topology

US = 1e-6
LAYERS = 30  # of smollm2-135m-instruct


def stage(
    attention: float, ffn: float, to_ffn: float = 0.0, to_attention: float = 0.0, head: float = 0.0
) -> StageTimes:
    """In microseconds."""
    return StageTimes(attention * US, ffn * US, to_ffn * US, to_attention * US, head * US)


def deployment(topology: str, streams: int = 3) -> Deployment:
    """One rank an instance."""
    chip = load_chips()["h800"]
    return Deployment(
        model=load_models()["smollm2-135m-instruct"],
        attention_chip=chip,
        ffn_chip=chip,
        topology=Topology.parse(topology),
        streams=streams,
        ranks_per_instance=1,
    )


def settings(topology: str, stages: StageModel, *, streams: int = 3, **changes: Any) -> Settings:
    shape = deployment(topology, streams)
    default = Settings(
        topology=shape.topology,
        times=StepTimes(stages, shape),
        scheduler=SchedulerConfig(num_streams=streams, max_num_seqs=64, max_context=2048),
        num_blocks=4000,
        policy="off",
        detail="layers",
    )
    return replace(default, **changes)


def saturated(topology: str, times: StageTimes, *, streams: int, per_stream: int = 2, num_output: int = 50) -> Arrivals:
    """As many decoding requests as all streams hold, all at once, with nothing to prefill."""
    clients = Topology.parse(topology).num_attention * streams * per_stream
    return ClosedLoop(clients, clients, Lengths(1), Lengths(num_output), seed=0)


def run(topology: str, times: StageTimes, *, streams: int = 3, num_output: int = 50, **changes: Any) -> Report:
    """A saturated decode."""
    arrivals = saturated(topology, times, streams=streams, num_output=num_output)
    return Simulation(settings(topology, ConstantStages(times), streams=streams, **changes), arrivals).run()
