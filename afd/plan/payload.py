"""Results as plain values: the JSON of `--json`, and what to type to deploy a plan."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import msgspec

from afd.plan.accuracy import Accuracy, accuracy_of
from afd.plan.advice import Advice
from afd.plan.colocated import Colocated
from afd.plan.deploy import deploy_payload
from afd.plan.deployment import Part
from afd.plan.estimate import Estimate, Estimator


def estimate_payload(estimate: Estimate, estimator: Estimator) -> dict[str, Any]:
    """One deployment. Times in the unit of their name; bytes and tokens are per chip where the name says so."""
    deployment, stage = estimate.deployment, estimate.stage
    cycle_s = estimate.cycle.seconds
    memory = estimator.memory_report(estimate)
    usd_per_hour = deployment.usd_per_hour
    return {
        "tgs": estimate.tgs,
        "tpot_ms": estimate.tpot_s * 1e3,
        "batch": estimate.batch,
        "bound": str(estimate.bound),
        "feasible": estimate.holds_sla,
        "model": deployment.model.name,
        "topology": str(deployment.topology),
        "attention_chip": deployment.attention_chip.name,
        "ffn_chip": deployment.ffn_chip.name,
        "attention_parts": [_part_payload(part) for part in deployment.attention_parts],
        "ffn_parts": [_part_payload(part) for part in deployment.ffn_parts],
        "chips": deployment.num_chips,
        "ranks_per_instance": deployment.ranks_per_instance,
        "context": estimate.objective.context,
        "tokens_per_s": estimate.tgs * deployment.num_chips,
        "usd_per_hour": usd_per_hour,
        "weight_bytes": msgspec.structs.asdict(deployment.model.weights),
        "drafts": {"count": deployment.drafts.count, "emitted": deployment.drafts.emitted},
        "forecast_range": None if estimator.measured else _range_payload(accuracy_of(estimate)),
        "prefill": prefill_payload(estimate, estimator),
        "attention_dtype": str(deployment.kv_dtype),
        "streams": deployment.streams,
        "micro_batch": estimate.micro_batch,
        "tokens_per_attention_chip": estimate.num_tokens,
        "requests_per_attention_chip": estimate.requests_per_chip,
        "pipeline": str(estimate.cycle.kind),
        "min_streams_to_hide_transfer": estimate.cycle.min_streams,
        "stage_us": {
            "attention": stage.attention_s * 1e6,
            "ffn": stage.ffn_s * 1e6,
            "to_ffn": stage.to_ffn_s * 1e6,
            "to_attention": stage.to_attention_s * 1e6,
            "head": stage.head_s * 1e6,
            "cycle": cycle_s * 1e6,
            "budget": estimate.stage_budget_s * 1e6,
        },
        "utilisation": {
            "attention": stage.attention_s / cycle_s,
            "ffn": stage.ffn_s / cycle_s,
            "network": max(stage.to_ffn_s, stage.to_attention_s) / cycle_s,
        },
        "headroom": {
            "sla": estimate.headroom,
            "attention_memory_bytes": memory["attention"]["free_bytes"],
            "ffn_memory_bytes": memory["ffn"]["free_bytes"],
        },
        "memory": memory,
        "tpot_ms_with_step_barrier": estimate.barrier_tpot_s * 1e3,
        "sla_tpot_ms": estimate.objective.sla_tpot_s * 1e3,
        "usd_per_mtok": estimate.usd_per_mtok,
    }


def _part_payload(part: Part) -> dict[str, Any]:
    return {"chip": part.chip.name, "instances": part.instances, "load": part.load}


def prefill_payload(estimate: Estimate, estimator: Estimator) -> dict[str, Any] | None:
    """Prompts in the steps of the decodes; None = elsewhere. TTFT is that of an empty queue."""
    prefill = estimate.prefill
    if prefill is None:
        return None
    return {
        "rows_per_attention_chip": prefill.num_tokens,
        "share": estimator.prefill_share(estimate),
        "requests_per_s": estimate.requests_per_s,
        "ttft_ms": estimate.ttft_s * 1e3,
    }


def advice_payload(advice: Advice, estimator: Estimator, model_argument: str, top: int) -> dict[str, Any]:
    """The search's answer: `plans` best first (at most `top`), how the winner compares, and how to start it."""
    best = advice.plans[0] if advice.plans else None
    return {
        "plans": [estimate_payload(plan, estimator) for plan in advice.plans[:top]],
        "num_plans": len(advice.plans),
        "reason": advice.reason,
        "today": estimate_payload(advice.today[0], estimator) if advice.today else None,
        "inventory": inventory_payload(advice),
        "baselines": [colocated_payload(c) for c in advice.baselines],
        "colocated": None if advice.colocated is None else colocated_payload(advice.colocated),
        "comparison": comparison_payload(advice),
        "analytic_ratio": advice.analytic_ratio,
        "tcp": [asdict(fallback) for fallback in advice.tcp],
        "deploy": None if best is None else deploy_payload(best, estimator, model_argument),
    }


def colocated_payload(colocated: Colocated) -> dict[str, Any]:
    return {
        "layout": colocated.layout,
        "chip": colocated.chip.name,
        "chips": colocated.num_chips,
        "micro_batches": colocated.micro_batches,
        "requests_per_chip": colocated.requests_per_chip,
        "tgs": colocated.tgs,
        "tpot_ms": colocated.tpot_s * 1e3,
        "usd_per_mtok": colocated.usd_per_mtok,
    }


def inventory_payload(advice: Advice) -> dict[str, Any] | None:
    """All chips of an inventory: copies of the best plan, and what they do without AFD."""
    if not advice.copies:
        return None
    best, others = advice.plans[0] if advice.plans else None, advice.all_chips
    return {
        "copies": advice.copies,
        "tokens_per_s": 0.0 if best is None else advice.copies * best.tgs * best.deployment.num_chips,
        "chips_used": 0 if best is None else advice.copies * best.deployment.num_chips,
        "colocated_tokens_per_s": None if others is None else others.tokens_per_s,
        "colocated": None if others is None else others.text,
        "afd_gain": advice.inventory_gain,
    }


def _range_payload(accuracy: Accuracy) -> dict[str, Any]:
    return {
        "tgs": [accuracy.low_tgs, accuracy.high_tgs],
        "tpot_ms": [accuracy.low_tpot_s * 1e3, accuracy.high_tpot_s * 1e3],
        "reason": accuracy.reason,
    }


def comparison_payload(advice: Advice) -> dict[str, Any] | None:
    comparison = advice.comparison
    if comparison is None:
        return None
    return {
        "afd_gain": comparison.gain,
        "worth_it": (advice.inventory_gain or comparison.gain) > 1.0,
        "batch_ratio": comparison.batch_ratio,
        "attention_share": comparison.attention_share,
        "step_ratio": comparison.step_ratio,
        "break_even_batch_ratio": comparison.break_even_batch_ratio,
        "break_even_context": comparison.break_even_context,
        "other_kv": None if advice.other_kv is None else dict(zip(("dtype", "afd_gain"), advice.other_kv, strict=True)),
        "by_context": [{**asdict(point), "afd_ahead": point.afd_ahead} for point in comparison.curve],
    }
