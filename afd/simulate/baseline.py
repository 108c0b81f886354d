"""The colocated deployment of the same chips that `--baseline ep` runs the same requests through."""

from __future__ import annotations

import dataclasses
from functools import partial

from afd.errors import ConfigError
from afd.plan.colocated import MICRO_BATCHES, ColocatedModel
from afd.plan.efficiency import Efficiency
from afd.plan.stages import RooflineStages
from afd.simulate.cluster import Simulation
from afd.simulate.colocated import ColocatedPath
from afd.simulate.results import Report
from afd.simulate.scenario import Scenario
from afd.simulate.times import StepTimes
from afd.types import Topology

CONTEXT = 4096
"""Tokens of a request by which the KV cache beside the weights is counted."""


def simulate_baseline(scenario: Scenario, efficiency: Efficiency) -> tuple[str, Report]:
    """(its name, what came out): with one or two micro-batches a step, whichever answers more in time.

    efficiency: the factors, with the imbalance of as many holders of experts as there are chips. ConfigError where the
    deployment has no such equivalent.
    """
    name, model, num_chips = _colocated(scenario, efficiency)
    servers = model.template.replace(topology=Topology(num_chips // model.template.ranks_per_instance, 1))
    context = min(CONTEXT, servers.model.max_context)
    num_tokens = model.capacity(num_chips, context) * context * servers.ranks_per_instance
    settings = scenario.settings
    if num_tokens < settings.block_size:
        raise ConfigError(f"--baseline ep: {servers.model.name} leaves {name} no room for a KV cache")
    reports = []
    for num_streams in MICRO_BATCHES:
        changed = dataclasses.replace(
            settings,
            topology=servers.topology,
            times=StepTimes(RooflineStages(efficiency), servers),
            scheduler=dataclasses.replace(settings.scheduler, num_streams=num_streams),
            num_blocks=num_tokens // settings.block_size,
            auto_streams=0,
        )
        path_of = partial(ColocatedPath, model, num_chips)
        reports.append(Simulation(changed, scenario.arrivals, path_of=path_of).run())
    return name, max(reports, key=lambda report: (report.request_goodput, report.output_throughput))


def _colocated(scenario: Scenario, efficiency: Efficiency) -> tuple[str, ColocatedModel, int]:
    deployment, settings = scenario.deployment, scenario.settings
    chip, num_chips = deployment.attention_chip, deployment.num_chips
    if chip.name != deployment.ffn_chip.name:
        raise ConfigError("--baseline ep: the two roles have different chips, and no one kind of chip does both")
    if not isinstance(scenario.stages, RooflineStages) or settings.times.fabric is not None:
        raise ConfigError("--baseline ep has data-sheet times: leave out --calibrate, --stages, --oversubscription")
    if settings.failures or settings.rollouts or settings.scalings or not settings.pace.steady:
        raise ConfigError("--baseline ep knows no --fail, --rollout, --scale and --slow")
    return f"EP{num_chips} on {num_chips} x {chip.title}", ColocatedModel(deployment, efficiency), num_chips
