"""A report for people."""

from __future__ import annotations

from afd.plan.text import table
from afd.simulate.results import Report
from afd.simulate.scenario import Scenario


def report_text(scenario: Scenario, report: Report, took_s: float) -> str:
    """What clients saw, then where workers waited."""
    settings, deployment = scenario.settings, scenario.deployment
    streams = "auto" if settings.auto_streams else str(settings.scheduler.num_streams)
    good = f"{report.num_good / report.num_requests:.1%}" if report.num_requests else "-"
    lines = [
        f"{settings.topology} {deployment.model.title}, {deployment.ranks_per_instance} ranks an instance, "
        f"{streams} streams, SLA {settings.policy}: {scenario.load}",
        f"{report.num_answered} answered, {sum(report.refused.values())} refused, {sum(report.lost.values())} lost in "
        f"{report.duration_s:.1f} s",
        f"{report.request_throughput:.4g} requests/s, {report.output_throughput:,.0f} output tokens/s",
        f"goodput {report.request_goodput:.4g} requests/s ({good} within TPOT {settings.tpot_s * 1e3:g} ms and TTFT "
        f"{settings.ttft_s * 1e3:g} ms)",
        "",
        table(
            ["ms", "mean", "p50", "p90", "p99"],
            [
                [name, *(f"{value:,.1f}" for value in (s.mean_ms, s.p50_ms, s.p90_ms, s.p99_ms))]
                for name, s in (("TTFT", report.ttft), ("TPOT", report.tpot), ("E2EL", report.e2el))
            ],
        ),
        "",
        table(
            ["role", "busy", "bubble"],
            [
                ["attention", f"{report.attention_busy:.1%}", f"{report.attention_bubble:.1%}"],
                ["ffn", f"{report.ffn_busy:.1%}", f"{report.ffn_bubble:.1%}"],
            ],
        ),
        f"gangs of {report.gang_size:.2f} attention workers, {report.gang_tokens:.1f} rows; slowest member "
        f"{report.lockstep_loss:+.1%} over the mean; busiest worker {report.imbalance:.2f} x the mean",
        f"at most {report.max_live} requests live, {report.max_queue} of them queued; {report.migrated} migrated, "
        f"{report.preempted} preempted",
    ]
    if settings.hash_block_tokens:
        share = report.cached_tokens / report.input_tokens if report.input_tokens else 0.0
        lines.append(f"prefix cache: {report.cached_tokens:,} prompt tokens found, {share:.1%}")
    lines += [f"refused: {count} x {code}" for code, count in report.refused.items()]
    lines += [f"lost: {count} x {reason}" for reason, count in report.lost.items()]
    return "\n".join([*lines, f"simulated in {took_s:.1f} s"])
