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
from afd.plan.mixed import Counts, MixedSearch, parse_counts
from afd.plan.models import ModelShape
from afd.plan.payload import advice_payload, estimate_payload
from afd.plan.report import REPORT_CHIPS, REPORT_MODELS
from afd.plan.request_rate import RequestShape
from afd.plan.search import SearchSpace
from afd.plan.stages import RooflineStages, StageModel
from afd.plan.traffic import Traffic, serve
from afd.plan.traffic_report import traffic_payload, traffic_text
from afd.types import Topology

DEFAULT_CONTEXT = 4096

EXIT_OK = 0
EXIT_INFEASIBLE = 1
"""The answer is "no": printed as any other answer."""


def run_search(arguments: argparse.Namespace) -> int:
    """`afd plan`: ranked topologies, AFD against colocated EP, TCP, how to start the winner."""
    space = _space(arguments)
    estimator, objective, traffic = _estimator(arguments, space), _objective(arguments), _traffic(arguments)
    advice = advise(space, estimator, objective)
    served = None
    if traffic is not None:
        served = serve(space, estimator, objective, traffic, advice.plans, advice.today)
    if arguments.json:
        payload = advice_payload(advice, estimator, arguments.model, arguments.top)
        payload["traffic"] = None if served is None else traffic_payload(served)
        _print_json({**_question(arguments, space.model), **payload, "efficiency": _factors(estimator)})
    else:
        if served is not None:
            print(f"{traffic_text(served)}\n")
        print(text.advice_text(advice, estimator, arguments.model, arguments.top))
        print(f"\n{_assumptions(arguments, estimator)}")
    if served is not None:
        return EXIT_OK if served.enough else EXIT_INFEASIBLE
    return EXIT_OK if advice.plans else EXIT_INFEASIBLE


def run_tgs(arguments: argparse.Namespace) -> int:
    """`afd plan tgs`: one topology at its best stream count and batch, or at a given batch."""
    space = _space(arguments)
    estimator, objective = _estimator(arguments, space), _objective(arguments)
    topology = Topology.parse(arguments.topology)
    deployments = _deployments(arguments, space, MixedSearch(space, estimator, objective), topology)
    deployments[0].check_context(objective.longest)
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


def _deployments(
    arguments: argparse.Namespace, space: SearchSpace, mixed: MixedSearch, topology: Topology
) -> list[Deployment]:
    """The topology at each depth, with the given instances of each chip; ConfigError where they do not add up."""
    attention, ffn = (_counts(arguments, role, topology) for role in ("attention", "ffn"))
    if len(attention) == len(ffn) == 1:
        return [space.deployment(space.attention_chips[0], space.ffn_chips[0], topology, m) for m in space.streams]
    if arguments.calibrate is not None:
        raise ConfigError("--calibrate: the measured times belong to one chip a role")
    found = [shape for streams in space.streams for shape in mixed.shapes(attention, ffn, streams)]
    if not found:
        raise ConfigError(f"{topology}: one kind of its attention chips does not hold a request beside its weights")
    return found


def _counts(arguments: argparse.Namespace, role: str, topology: Topology) -> Counts:
    names, total = (
        getattr(arguments, role) or ["h800"],
        topology.num_attention if role == "attention" else topology.num_ffn,
    )
    counts = parse_counts(names, f"--{role}")
    if not counts and len(names) > 1:
        raise ConfigError(f"afd plan tgs takes one --{role} chip, or instances of each: --{role} h20:4,h800:1")
    if counts and sum(counts.values()) != total:
        raise ConfigError(f"--{role} {','.join(names)}: {sum(counts.values())} instances, but {topology} has {total}")
    return tuple(counts.items()) or ((names[0], total),)


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
    attention, ffn = (
        list(parse_counts(names, option) or names)
        for names, option in (
            (arguments.attention or list(inventory) or ["h800"], "--attention"),
            (arguments.ffn or list(inventory) or ["h800"], "--ffn"),
        )
    )
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
    requests = _requests(arguments)
    context = arguments.context or (DEFAULT_CONTEXT if requests is None else requests.context)
    return Objective(context, arguments.sla_tpot_ms * 1e-3, arguments.pipeline, requests)


def _requests(arguments: argparse.Namespace) -> RequestShape | None:
    """Lengths, where they are given; ConfigError where they make no sense together."""
    prompt, output = arguments.input_len, arguments.output_len
    if prompt is None and output is None:
        return None
    if prompt is None or output is None:
        raise ConfigError("--input-len and --output-len go together")
    if arguments.context is not None:
        raise ConfigError("--context follows from --input-len and --output-len: leave it out")
    if output < 2:
        raise ConfigError("--output-len 1: an answer of one token comes from prefill alone, there is nothing to decode")
    return RequestShape(prompt, output)


def _traffic(arguments: argparse.Namespace) -> Traffic | None:
    requests = _requests(arguments)
    if requests is None:
        if arguments.rate is not None:
            raise ConfigError("--rate needs the lengths of requests: --input-len and --output-len")
        return None
    if not 0.0 < arguments.utilisation < 1.0:
        raise ConfigError(f"--utilisation {arguments.utilisation:g}: expected a share between 0 and 1, such as 0.8")
    return Traffic(requests, arguments.rate or 0.0, arguments.sla_ttft_ms * 1e-3, arguments.utilisation)


def _model(arguments: argparse.Namespace, name: str) -> ModelShape:
    return find_model(load_models(arguments.model_file), name)


def _chips(arguments: argparse.Namespace, names: Sequence[str]) -> list[Chip]:
    catalog = load_chips(arguments.hardware_file, arguments.price)
    return [find(catalog, name, "chip") for name in names]


def _question(arguments: argparse.Namespace, model: ModelShape) -> dict[str, Any]:
    context = _objective(arguments).context
    return {"model": model.name, "context": context, "sla_tpot_ms": arguments.sla_tpot_ms}


def _factors(estimator: Estimator) -> dict[str, float]:
    return {name: getattr(estimator.efficiency, name) for name in Efficiency.__struct_fields__}


def _assumptions(arguments: argparse.Namespace, estimator: Estimator) -> str:
    if arguments.calibrate is not None:
        return f"stage times measured: {arguments.calibrate}"
    return text.efficiency_line(estimator.efficiency)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1))
