"""What each sub-command does: arguments to values, one call into the planner, values to text or JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from afd.errors import ConfigError
from afd.plan import text
from afd.plan.advice import advise
from afd.plan.calibration import CalibratedStages, load_calibration
from afd.plan.catalog import find, find_model, load_chips, load_models
from afd.plan.chips import parse_inventory, with_network
from afd.plan.cost import cheapest_split, homogeneous_costs
from afd.plan.deployment import Deployment
from afd.plan.drafts import Drafts
from afd.plan.efficiency import Efficiency
from afd.plan.estimate import Estimate, Estimator, Objective
from afd.plan.hardware import Chip
from afd.plan.limits import feasibility
from afd.plan.memory import max_requests, require_weights_fit
from afd.plan.models import ModelShape
from afd.plan.payload import advice_payload, estimate_payload
from afd.plan.report import REPORT_CHIPS, REPORT_MODELS
from afd.plan.search import SearchSpace
from afd.plan.stages import RooflineStages, StageModel
from afd.types import Topology

EXIT_OK = 0
EXIT_INFEASIBLE = 1
"""The answer is "no": printed as any other answer."""


def run_search(arguments: argparse.Namespace) -> int:
    """`afd plan`: ranked topologies, AFD against colocated EP, TCP, how to start the winner."""
    space = _space(arguments)
    estimator = _estimator(arguments, space)
    advice = advise(space, estimator, _objective(arguments))
    if arguments.json:
        payload = advice_payload(advice, estimator, arguments.model, arguments.top)
        _print_json({**_question(arguments, space.model), **payload, "efficiency": _factors(estimator)})
    else:
        print(text.advice_text(advice, estimator, arguments.model, arguments.top))
        print(f"\n{_assumptions(arguments, estimator)}")
    return EXIT_OK if advice.plans else EXIT_INFEASIBLE


def run_tgs(arguments: argparse.Namespace) -> int:
    """`afd plan tgs`: one topology at its best stream count and batch, or at a given batch."""
    space = _space(arguments)
    if len(space.attention_chips) > 1 or len(space.ffn_chips) > 1:
        raise ConfigError("afd plan tgs takes one --attention and one --ffn chip")
    estimator, objective = _estimator(arguments, space), _objective(arguments)
    topology = Topology.parse(arguments.topology)
    deployments = [
        space.deployment(space.attention_chips[0], space.ffn_chips[0], topology, streams) for streams in space.streams
    ]
    deployments[0].check_context(objective.context)
    require_weights_fit(deployments[0], estimator.efficiency)
    if arguments.batch is not None:
        best = _quickest(deployments, estimator, objective, arguments.batch)
    else:
        best = _best_of(deployments, estimator, objective)
    if arguments.json:
        _print_json({**estimate_payload(best, estimator), "efficiency": _factors(estimator)})
    else:
        print(text.estimate_text(best))
        print(_assumptions(arguments, estimator))
    return EXIT_OK if best.holds_sla else EXIT_INFEASIBLE


def run_cost(arguments: argparse.Namespace) -> int:
    """`afd plan cost`: the report's cost tables, for any model, chip and context."""
    chips = _chips(arguments, arguments.chip or REPORT_CHIPS)
    models = [_model(arguments, name) for name in arguments.model or REPORT_MODELS]
    if arguments.deployment == "afd":
        rows = [cheapest_split(model, chips, context) for model in models for context in arguments.context]
    else:
        rows = homogeneous_costs(models, chips, arguments.context)
    if arguments.json:
        _print_json([asdict(row) for row in rows])
    else:
        print(text.cost_table(rows))
        print("\nUSD per 1e6 decoded tokens; bytes and FLOPs per token. A floor: chips at their peaks, network hidden.")
        for model in models:
            if max(arguments.context) > model.max_context:
                print(f"{model.name} serves {model.max_context} tokens: what it would cost beyond that.")
    return EXIT_OK


def run_limits(arguments: argparse.Namespace) -> int:
    """`afd plan limits`: minimum sparsity and feasibility of chips."""
    model = _model(arguments, arguments.model)
    catalog = load_chips(arguments.hardware_file, arguments.price)
    rows = [
        feasibility(model, find(catalog, name, "chip"), arguments.stage_ms * 1e-3)
        for name in arguments.chip or list(catalog)
    ]
    if arguments.json:
        _print_json([asdict(row) for row in rows])
    else:
        print(text.limits_table(rows))
    return EXIT_OK


def run_figures(arguments: argparse.Namespace) -> int:
    """`afd plan figures`: PNG and SVG files."""
    try:
        from afd.plan.figures import draw_all  # matplotlib is an extra
    except ImportError as error:
        raise ConfigError(f"figures need matplotlib: pip install 'afd[plan]' ({error})") from None
    chips = load_chips(arguments.hardware_file, arguments.price)
    models = load_models(arguments.model_file)
    written = draw_all(models, chips, arguments.out)
    if arguments.json:
        _print_json([str(path) for path in written])
    else:
        print("\n".join(str(path) for path in written))
    return EXIT_OK


def _quickest(deployments: Sequence[Deployment], estimator: Estimator, objective: Objective, batch: int) -> Estimate:
    """The depth with the shortest step among those over which `batch` divides; ConfigError when there is none."""
    found, refusal = [], None
    for deployment in deployments:
        try:
            found.append(estimator.at_batch(deployment, objective, batch))
        except ConfigError as error:
            refusal = refusal or error
    if not found and refusal is not None:
        raise refusal
    return min(found, key=lambda estimate: estimate.tpot_s)


def _best_of(deployments: Sequence[Deployment], estimator: Estimator, objective: Objective) -> Estimate:
    """The stream count with the highest throughput under the SLA, else the least bad one at one token."""
    found = [e for d in deployments if (e := estimator.best(d, objective)) is not None]
    if found:
        return max(found, key=lambda estimate: estimate.tgs)
    fitting = [d for d in deployments if max_requests(d, estimator.efficiency, objective.context) >= d.streams]
    if not fitting:
        chip = deployments[0].attention_chip
        raise ConfigError(
            f"{deployments[0].topology}: a {chip.title} does not hold {deployments[0].streams} requests of "
            f"{objective.context} tokens beside its weights"
        )
    return min((estimator.estimate(d, objective, 1) for d in fitting), key=lambda estimate: estimate.tpot_s)


def _space(arguments: argparse.Namespace) -> SearchSpace:
    if arguments.model is None:
        raise ConfigError("say which model: --model NAME or --model PATH (to a config.json)")
    catalog = with_network(load_chips(arguments.hardware_file, arguments.price), arguments.network_gbit)
    inventory = {}
    if getattr(arguments, "inventory", None) is not None:
        inventory = parse_inventory(arguments.inventory, catalog)
    attention = arguments.attention or list(inventory) or ["h800"]
    ffn = arguments.ffn or list(inventory) or ["h800"]
    if getattr(arguments, "heterogeneous", False):
        attention = ffn = list(dict.fromkeys((*attention, *ffn, *REPORT_CHIPS)))
    if inventory and (missing := {*attention, *ffn} - {*inventory}):
        raise ConfigError(f"--inventory has no {', '.join(sorted(missing))}")
    return SearchSpace(
        model=_model(arguments, arguments.model).weighted(arguments.weight_dtype),
        attention_chips=[find(catalog, name, "chip") for name in attention],
        ffn_chips=[find(catalog, name, "chip") for name in ffn],
        max_chips=sum(inventory.values()) or getattr(arguments, "max_gpus", 1 << 30),
        inventory=inventory,
        streams=tuple(arguments.streams),
        kv_dtype=arguments.attention_dtype,
        ranks_per_instance=arguments.ranks_per_instance,
        dispatch=arguments.dispatch,
        drafts=Drafts.of(arguments.mtp, arguments.mtp_acceptance),
    )


def _estimator(arguments: argparse.Namespace, space: SearchSpace) -> Estimator:
    efficiency = Efficiency().with_overrides(arguments.efficiency)
    stages: StageModel = RooflineStages(efficiency)
    if arguments.calibrate is not None:
        if len(space.pairs()) > 1:
            raise ConfigError("--calibrate: the measured times belong to one --attention and one --ffn chip")
        probe = space.deployment(*space.pairs()[0], Topology(1, 1), space.streams[0])
        stages = CalibratedStages.of(load_calibration(arguments.calibrate), stages, probe)
    return Estimator(stages, efficiency)


def _objective(arguments: argparse.Namespace) -> Objective:
    return Objective(arguments.context, arguments.sla_tpot_ms * 1e-3, arguments.pipeline)


def _model(arguments: argparse.Namespace, name: str) -> ModelShape:
    return find_model(load_models(arguments.model_file), name)


def _chips(arguments: argparse.Namespace, names: Sequence[str]) -> list[Chip]:
    catalog = load_chips(arguments.hardware_file, arguments.price)
    return [find(catalog, name, "chip") for name in names]


def _question(arguments: argparse.Namespace, model: ModelShape) -> dict[str, Any]:
    return {"model": model.name, "context": arguments.context, "sla_tpot_ms": arguments.sla_tpot_ms}


def _factors(estimator: Estimator) -> dict[str, float]:
    return {name: getattr(estimator.efficiency, name) for name in Efficiency.__struct_fields__}


def _assumptions(arguments: argparse.Namespace, estimator: Estimator) -> str:
    if arguments.calibrate is not None:
        return f"stage times measured: {arguments.calibrate}"
    return text.efficiency_line(estimator.efficiency)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1))
