"""What `afd simulate` does: one run, several seeds, or a run beside its baseline; text or JSON."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from typing import Any

from afd.errors import ConfigError
from afd.simulate.advice import Advice, limits_of
from afd.simulate.baseline import simulate_baseline
from afd.simulate.cluster import Simulation
from afd.simulate.outcomes import outcome_file
from afd.simulate.results import Report
from afd.simulate.scenario import Scenario, efficiency_of, scenario_of
from afd.simulate.seeds import check_seeds, intervals
from afd.simulate.text import baseline_text, report_text, seeds_text


def run(arguments: argparse.Namespace) -> int:
    """Simulate and print; returns the exit code."""
    if arguments.seeds is not None:
        _run_seeds(arguments)
        return 0
    scenario = scenario_of(arguments)
    begun_s = time.perf_counter()
    with nullcontext() if arguments.per_request is None else outcome_file(arguments.per_request) as watch:
        advice = _advice(arguments, scenario)
        report = Simulation(scenario.settings, scenario.arrivals, watch, advice=advice).run()
    payload, text = _payload(scenario, report), report_text(scenario, report)
    if advice is not None:
        payload["autoscale"] = advice.text()
        text += "\n" + advice.text()
    if arguments.baseline is not None:
        deployment = scenario.deployment
        efficiency = efficiency_of(arguments, deployment.model, deployment.num_chips)
        name, other = simulate_baseline(scenario, efficiency)
        usd_per_mtok = scenario.usd_per_mtok(other)
        payload["baseline"] = {"name": name, **other.payload(), "usd_per_mtok": usd_per_mtok}
        text += "\n" + baseline_text(name, report, other, usd_per_mtok)
    took_s = time.perf_counter() - begun_s
    if arguments.json:
        print(json.dumps({**payload, "simulated_in_s": round(took_s, 2)}, indent=1))
    else:
        print(f"{text}\nsimulated in {took_s:.1f} s")
    return 0


def _advice(arguments: argparse.Namespace, scenario: Scenario) -> Advice | None:
    if arguments.autoscale is not None:
        return Advice(scenario.settings, limits_of(arguments.autoscale), follow=arguments.autoscale_apply)
    if arguments.autoscale_apply:
        raise ConfigError("--autoscale-apply follows what --autoscale MIN:MAX advises: give that, too")
    return None


def _run_seeds(arguments: argparse.Namespace) -> None:
    """`--seeds N`: the seeds from `--seed` on."""
    check_seeds(arguments.seeds)
    if arguments.trace is not None:
        raise ConfigError("--seeds: a trace is the same with every seed")
    if any(value is not None for value in (arguments.per_request, arguments.baseline, arguments.autoscale)):
        raise ConfigError("--seeds: --per-request, --baseline and --autoscale are of one run, give --seed")
    runs = []
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        scenario = scenario_of(argparse.Namespace(**{**vars(arguments), "seed": seed}))
        report = Simulation(scenario.settings, scenario.arrivals).run()
        runs.append({"seed": seed, **_payload(scenario, report)})
    found = intervals(runs)
    if arguments.json:
        spread = {name: {"mean": interval.mean, "ci95": interval.ci95} for name, interval in found.items()}
        print(json.dumps({"seeds": len(runs), "intervals": spread, "runs": runs}, indent=1))
    else:
        print(seeds_text(scenario, found, len(runs)))


def _payload(scenario: Scenario, report: Report) -> dict[str, Any]:
    return {**scenario.payload(), **report.payload(), "usd_per_mtok": scenario.usd_per_mtok(report)}
