"""Results as text for people: aligned tables and sentences. No numbers are made here."""

from __future__ import annotations

from collections.abc import Sequence

from afd.plan.accuracy import accuracy_of
from afd.plan.advice import RANKS_TODAY, Advice, Comparison, describe, role_chips
from afd.plan.colocated import Colocated
from afd.plan.cost import CostRow
from afd.plan.deploy import deploy_payload
from afd.plan.deployment import Deployment, Part
from afd.plan.efficiency import Efficiency
from afd.plan.estimate import Estimate, Estimator
from afd.plan.limits import Feasibility
from afd.plan.tcp import TcpFallback


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the first left-aligned, the others right-aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(headers, *rows, strict=True)]
    lines = []
    for row in (headers, *rows):
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _usd(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def plans_table(plans: Sequence[Estimate]) -> str:
    headers = ["topology", "chips", "streams", "batch", "tok/s/chip", "TPOT ms", "A us", "F us", "link us", "bound"]
    several = len({name for plan in plans for name in plan.deployment.chips}) > 1
    rows = []
    for plan in plans:
        deployment = plan.deployment
        name = f"{deployment.topology} {_short(deployment.attention_parts)}+{_short(deployment.ffn_parts)}"
        rows.append(
            [
                name if several else str(deployment.topology),
                str(deployment.num_chips),
                str(deployment.streams),
                str(plan.batch),
                f"{plan.tgs:,.0f}",
                f"{plan.tpot_s * 1e3:.1f}",
                f"{plan.stage.attention_s * 1e6:.0f}",
                f"{plan.stage.ffn_s * 1e6:.0f}",
                f"{max(plan.stage.to_ffn_s, plan.stage.to_attention_s) * 1e6:.0f}",
                str(plan.bound),
                _usd(plan.usd_per_mtok),
            ]
        )
    return table([*headers, "USD/Mtok"], rows)


def _short(parts: Sequence[Part]) -> str:
    return parts[0].chip.title if len(parts) == 1 else f"({role_chips(parts)})"


def estimate_text(estimate: Estimate) -> str:
    """One deployment in a few lines."""
    cycle_s, stage = estimate.cycle.seconds, estimate.stage
    busy = ", ".join(
        f"{name} {seconds * 1e6:.0f} us ({seconds / cycle_s:.0%})"
        for name, seconds in (
            ("A", stage.attention_s),
            ("F", stage.ffn_s),
            ("out", stage.to_ffn_s),
            ("back", stage.to_attention_s),
        )
    )
    verdict = "holds" if estimate.holds_sla else "misses"
    cost = "" if estimate.usd_per_mtok is None else f", {estimate.usd_per_mtok:.3f} USD per 1e6 tokens"
    return "\n".join(
        [
            f"{describe(estimate.deployment)}, context {estimate.objective.context}: "
            f"{estimate.tgs:,.0f} tokens/s per chip{cost}",
            f"TPOT {estimate.tpot_s * 1e3:.1f} ms {verdict} {estimate.objective.sla_tpot_s * 1e3:g} ms "
            f"({estimate.headroom:+.1%}); batch {estimate.batch} = {estimate.deployment.streams} micro-batches of "
            f"{estimate.micro_batch}, {estimate.num_tokens} tokens per attention chip",
            f"per layer: {busy} of a cycle of {cycle_s * 1e6:.0f} us (budget {estimate.stage_budget_s * 1e6:.0f} us); "
            f"bound by {estimate.bound}",
            *_loads_text(estimate),
            *_prefill_text(estimate),
            _precision_text(estimate.deployment),
        ]
    )


def _loads_text(estimate: Estimate) -> list[str]:
    """What each kind of a role does, where there are several."""
    deployment, lines = estimate.deployment, []
    if deployment.attention_more:
        shares = ", ".join(f"{p.load * estimate.num_tokens:.0f} on {p.chip.title}" for p in deployment.attention_parts)
        lines.append(f"tokens of an attention chip and micro-batch: {shares}")
    if deployment.ffn_more:
        shares = ", ".join(
            f"{p.load / deployment.topology.num_ffn:.1%} on {p.chip.title}" for p in deployment.ffn_parts
        )
        lines.append(f"of the FFN, each instance: {shares}")
    return lines


def _prefill_text(estimate: Estimate) -> list[str]:
    requests, prefill = estimate.objective.requests, estimate.prefill
    if requests is None or prefill is None or estimate.requests_per_s is None:
        return []
    return [
        f"prompts of {requests.prompt:g} tokens in the same steps: {prefill.num_tokens:.1f} rows of an attention chip "
        f"and micro-batch, {estimate.requests_per_s:,.1f} requests/s with a full batch; a prompt alone takes "
        f"{estimate.ttft_s * 1e3:.0f} ms to its first token"
    ]


def _precision_text(deployment: Deployment) -> str:
    width = deployment.kv_dtype.bytes_per_element
    widths = sorted({group.kv_bytes if width is None else width for group in deployment.model.attention})
    kv = " and ".join(f"{8 * value:g}" for value in widths)
    drafts = deployment.drafts
    text = f"{deployment.model.weights.text}, KV cache of {kv} bits"
    if not drafts.count:
        return text
    return f"{text}; MTP of {drafts.count}: {drafts.emitted:.2f} tokens a step out of {drafts.rows} rows"


def _range_text(estimate: Estimate) -> str:
    """The error bar of a forecast from data sheets."""
    accuracy = accuracy_of(estimate)
    return (
        f"forecast range: {accuracy.low_tgs:,.0f} to {accuracy.high_tgs:,.0f} tokens/s per chip, TPOT "
        f"{accuracy.low_tpot_s * 1e3:.0f} to {accuracy.high_tpot_s * 1e3:.0f} ms ({accuracy.reason})"
    )


def advice_text(advice: Advice, estimator: Estimator, model_argument: str, top: int) -> str:
    """The whole answer of `afd plan`."""
    if not advice.plans:
        lines = [advice.reason]
        if advice.baselines:
            lines.append(f"without AFD: {_colocated_text(advice.baselines[0])} would")
        return "\n".join(lines)
    best = advice.plans[0]
    parts = [_today_text(advice), plans_table(advice.plans[:top])]
    parts.append("\n".join([estimate_text(best), *([] if estimator.measured else [_range_text(best)])]))
    if advice.copies:
        parts.append(_inventory_text(advice, best))
    if advice.analytic_ratio is not None:
        x, y = best.deployment.topology.num_attention, best.deployment.topology.num_ffn
        parts.append(f"A:F ratio {x / y:.2f}; the closed form without an SLA says {advice.analytic_ratio:.2f}")
    parts.append(_comparison_text(advice))
    parts.append("\n".join(tcp_sentence(fallback) for fallback in advice.tcp))
    deploy = deploy_payload(best, estimator, model_argument)
    if deploy["obstacles"]:
        parts.append("AFD cannot run this plan as it is:\n" + "\n".join(f"  - {one}" for one in deploy["obstacles"]))
    else:
        parts.append(f"start it:    {deploy['command']}\nHelm values:\n{deploy['helm_yaml'].rstrip()}")
    return "\n\n".join(parts)


def _today_text(advice: Advice) -> str:
    """What can be started, before what could be."""
    best, today = advice.plans[0].deployment, advice.today[0] if advice.today else None
    if best.ranks_per_instance == RANKS_TODAY and not best.mixed:
        return "instances of one chip, as `afd up` and the chart start them today:"
    wanted = f"the plans below need instances of {best.ranks_per_instance} chips, which `afd up` does not start yet"
    if best.ranks_per_instance == RANKS_TODAY:
        wanted = "the first plan below has several kinds of chips in a role, which the chart does not place"
    if today is None:
        return f"runs today (instances of one chip): nothing holds the SLA; {wanted}"
    gain = ""
    if advice.colocated is not None:
        gain = f", {today.tgs / advice.colocated.tgs:.2f} x {advice.colocated.layout} on {advice.colocated.chip.title}"
    return (
        f"runs today (instances of one chip): {describe(today.deployment)}, {today.deployment.streams} streams: "
        f"{today.tgs:,.0f} tokens/s per chip{gain}; {wanted}"
    )


def _inventory_text(advice: Advice, best: Estimate) -> str:
    deployment, copies = best.deployment, advice.copies
    total = copies * deployment.num_chips * best.tgs
    usd = deployment.usd_per_hour
    rent = "" if usd is None else f" for {copies * usd:,.2f} USD an hour"
    lines = [
        f"your chips: {copies} x {deployment.topology} = {copies * deployment.num_chips} chips, "
        f"{total:,.0f} tokens/s in all{rent}"
    ]
    if advice.all_chips is not None:
        other = advice.all_chips
        lines.append(
            f"without AFD: {other.text}: {other.tokens_per_s:,.0f} tokens/s in all; AFD gives "
            f"{advice.inventory_gain:.2f} x that"
        )
    return "\n".join(lines)


def _colocated_text(c: Colocated) -> str:
    return (
        f"{c.layout} on {c.num_chips} x {c.chip.title}, {c.requests_per_chip:,.0f} requests per chip: "
        f"{c.tgs:,.0f} tokens/s per chip at {c.tpot_s * 1e3:.1f} ms"
    )


def _comparison_text(advice: Advice) -> str:
    comparison = advice.comparison
    if comparison is None:
        return f"without AFD no layout holds the SLA here ({advice.plans[0].tgs:,.0f} tokens/s per chip with it)"
    best, whole = comparison.colocated, advice.inventory_gain
    verdict = "pays" if (whole or comparison.gain) > 1 else "does not pay"
    said = f"{comparison.gain:.2f} x {best.layout} on {best.chip.title}"
    if whole is not None:
        unit = "chip" if best.usd_per_mtok is None else "USD"
        said = f"{whole:.2f} x all your chips without it, {said} for each {unit}"
    lines = [f"AFD {verdict}: {said}. Without AFD:"]
    lines += [f"  {_colocated_text(c)}" for c in advice.baselines]
    if advice.other_kv is not None:
        width, gain = advice.other_kv
        changes = "" if (gain > 1) == (comparison.gain > 1) else ": the verdict depends on it"
        lines.append(f"  with a KV cache in {width} on both sides AFD gives {gain:.2f} x{changes}")
    deployment = advice.plans[0].deployment
    if deployment.attention_chip.name == deployment.ffn_chip.name == best.chip.name:
        lines.append(
            f"  = {comparison.batch_ratio:.2f} (requests per attention chip) x {comparison.attention_share:.2f} (share "
            f"of attention chips) x {comparison.step_ratio:.2f} (step time); breaks even at a batch ratio of "
            f"{comparison.break_even_batch_ratio:.2f}"
        )
    return "\n".join([*lines, "  " + _break_even_text(comparison), _curve_table(comparison)])


def _curve_table(comparison: Comparison) -> str:
    headers = [
        "context",
        "AFD",
        "tok/s/chip",
        "USD/Mtok",
        f"colocated on {comparison.colocated.chip.title}",
        "USD/Mtok",
    ]
    rows = [
        [
            str(point.context),
            point.topology or "-",
            f"{point.afd_tgs:,.0f}",
            _usd(point.afd_usd_per_mtok),
            f"{point.colocated_tgs:,.0f}",
            _usd(point.colocated_usd_per_mtok),
        ]
        for point in comparison.curve
    ]
    return table(headers, rows)


def _break_even_text(comparison: Comparison) -> str:
    tried = [point.context for point in comparison.curve]
    ahead = [point.context for point in comparison.curve if point.afd_ahead]
    if not ahead:
        return f"on these chips colocated EP is ahead at every context from {tried[0]} to {tried[-1]}"
    span = str(ahead[0]) if len(ahead) == 1 else f"{ahead[0]} to {ahead[-1]}"
    return f"on these chips AFD is ahead at contexts of {span} tokens ({tried[0]} to {tried[-1]} tried)"


def tcp_sentence(fallback: TcpFallback) -> str:
    """One line of the report about one link rate."""
    rate = f"TCP at {fallback.gbit_per_s:g} Gbit/s per chip"
    if fallback.holds:
        return f"{rate}: holds ({fallback.tpot_ms:.1f} ms)"
    if not fallback.micro_batch:
        return f"{rate}: cannot hold the SLA at any micro-batch ({fallback.tpot_ms:.0f} ms at the plan's)"
    return (
        f"{rate}: cannot hold the SLA ({fallback.tpot_ms:.0f} ms); it could with a micro-batch of "
        f"{fallback.micro_batch} tokens, {fallback.tgs:,.0f} tokens/s per chip"
    )


def cost_table(rows: Sequence[CostRow]) -> str:
    headers = ["model", "chip", "context", "attention", "FFN", "total", "KV bytes", "attention FLOP", "linear", "FFN"]
    cells = [
        [
            row.model,
            row.chip,
            str(row.context),
            f"{row.attention_usd_per_mtok:.3f}",
            f"{row.ffn_usd_per_mtok:.3f}",
            f"{row.total_usd_per_mtok:.3f}",
            f"{row.kv_bytes:.3g}",
            f"{row.attention_flops:.3g}",
            f"{row.linear_flops:.3g}",
            f"{row.ffn_flops:.3g}",
        ]
        for row in rows
    ]
    return table(headers, cells)


def limits_table(rows: Sequence[Feasibility]) -> str:
    headers = [
        "chip",
        "min sparsity",
        "model's",
        "hides network",
        "attention",
        "KV tokens/chip",
        "FFN servers",
        "chips",
    ]
    cells = [
        [
            row.chip,
            f"{row.min_sparsity:.3f}",
            f"{row.sparsity:.3f}",
            "yes" if row.sparse_enough else "no",
            "yes" if row.attention_feasible else "impossible",
            f"{row.kv_tokens_per_chip:,}" if row.attention_feasible else "-",
            str(row.ffn_servers),
            str(row.ffn_chips),
        ]
        for row in rows
    ]
    return table(headers, cells)


def efficiency_line(efficiency: Efficiency) -> str:
    """The factors behind a forecast: a number comes with its assumptions."""
    e = efficiency
    return (
        f"factors: core {e.core_16bit:g} (16 bit) {e.core_8bit:g} (8 bit) {e.core_flops:g} (FLOPs), gemm {e.gemm:g}, "
        f"network {e.network:g}, launch {e.launch_s * 1e6:g} us, exposed collectives {e.collective_exposed:g}, "
        f"jitter {e.jitter:g}"
    )
