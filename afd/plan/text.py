"""Results as text for people: aligned tables and sentences. No numbers are made here."""

from __future__ import annotations

from collections.abc import Sequence

from afd.plan.advice import Advice, Comparison, describe
from afd.plan.cost import CostRow
from afd.plan.deployment import Deployment
from afd.plan.efficiency import Efficiency
from afd.plan.estimate import Estimate
from afd.plan.limits import Feasibility
from afd.plan.payload import deploy_payload
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
    headers = ["topology", "chips", "streams", "batch", "tok/s/chip", "TPOT ms", "A us", "F us", "net us", "bound"]
    names = {chip.name for p in plans for chip in (p.deployment.attention_chip, p.deployment.ffn_chip)}
    rows = []
    for plan in plans:
        deployment = plan.deployment
        name = f"{deployment.topology} {deployment.attention_chip.title}+{deployment.ffn_chip.title}"
        rows.append(
            [
                name if len(names) > 1 else str(deployment.topology),
                str(deployment.num_chips),
                str(deployment.streams),
                str(plan.batch),
                f"{plan.tgs:,.0f}",
                f"{plan.tpot_s * 1e3:.1f}",
                f"{plan.stage.attention_s * 1e6:.0f}",
                f"{plan.stage.ffn_s * 1e6:.0f}",
                f"{plan.stage.transfer_s * 1e6:.0f}",
                str(plan.bound),
                _usd(plan.usd_per_mtok),
            ]
        )
    return table([*headers, "USD/Mtok"], rows)


def estimate_text(estimate: Estimate) -> str:
    """One deployment in a few lines."""
    cycle_s, stage = estimate.cycle.seconds, estimate.stage
    busy = ", ".join(
        f"{name} {seconds * 1e6:.0f} us ({seconds / cycle_s:.0%})"
        for name, seconds in (("A", stage.attention_s), ("F", stage.ffn_s), ("network", stage.transfer_s))
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
            f"per layer: {busy}; {estimate.cycle.kind} pipeline, bound by {estimate.bound}",
        ]
    )


def advice_text(advice: Advice, model_argument: str, top: int) -> str:
    """The whole answer of `afd plan`."""
    if not advice.plans:
        lines = [advice.reason]
        if advice.colocated is not None:
            other = advice.colocated
            lines.append(
                f"colocated EP on {other.num_chips} x {other.chip} would: {other.tgs:,.0f} tokens/s per chip "
                f"at {other.tpot_s * 1e3:.1f} ms"
            )
        return "\n".join(lines)
    best = advice.plans[0]
    parts = [plans_table(advice.plans[:top]), estimate_text(best)]
    if advice.analytic_ratio is not None:
        x, y = best.deployment.topology.num_attention, best.deployment.topology.num_ffn
        parts.append(f"A:F ratio {x / y:.2f}; the closed form without an SLA says {advice.analytic_ratio:.2f}")
    parts.append(_comparison_text(advice))
    parts.append("\n".join(tcp_sentence(fallback) for fallback in advice.tcp))
    deploy = deploy_payload(best, model_argument)
    parts.append(f"start it:    {deploy['command']}\nHelm values:\n{deploy['helm_yaml'].rstrip()}")
    note = _engine_note(best.deployment)
    return "\n\n".join([*parts, note] if note else parts)


def _comparison_text(advice: Advice) -> str:
    comparison = advice.comparison
    if comparison is None:
        return f"colocated EP: no size holds the SLA, so AFD is the only way here ({advice.plans[0].tgs:,.0f} tokens/s)"
    best, verdict = comparison.colocated, "pays" if comparison.gain > 1 else "does not pay"
    lines = [
        f"AFD {verdict}: {comparison.gain:.2f} x colocated EP ({best.num_chips} x {best.chip}, "
        f"{best.requests_per_chip} requests per chip, {best.tgs:,.0f} tokens/s per chip, {best.tpot_s * 1e3:.1f} ms)"
    ]
    deployment = advice.plans[0].deployment
    if deployment.attention_chip.name == deployment.ffn_chip.name == best.chip:
        lines.append(
            f"  = {comparison.batch_ratio:.2f} (requests per attention chip) x {comparison.attention_share:.2f} (share "
            f"of attention chips) x {comparison.step_ratio:.2f} (step time); breaks even at a batch ratio of "
            f"{comparison.break_even_batch_ratio:.2f}"
        )
    return "\n".join([*lines, "  " + _break_even_text(comparison), _curve_table(comparison)])


def _curve_table(comparison: Comparison) -> str:
    headers = ["context", "AFD", "tok/s/chip", "USD/Mtok", "EP tok/s/chip", "USD/Mtok"]
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


def _engine_note(deployment: Deployment) -> str:
    if deployment.ranks_per_instance == 1:
        return ""
    return (
        f"note: the plan's instances are servers of {deployment.ranks_per_instance} chips; `afd up` starts instances "
        "of one rank so far (ranks_per_instance = 1)"
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
