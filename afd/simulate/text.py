"""Reports for people."""

from __future__ import annotations

from collections.abc import Mapping

from afd.plan.text import table
from afd.simulate.results import Report
from afd.simulate.scenario import Scenario
from afd.simulate.seeds import Interval

_SEED_ROWS = (
    ("requests/s", "request_throughput"),
    ("output tokens/s", "output_throughput"),
    ("goodput, requests/s", "request_goodput"),
    ("TTFT p50, ms", "median_ttft_ms"),
    ("TTFT p99, ms", "p99_ttft_ms"),
    ("TPOT p50, ms", "median_tpot_ms"),
    ("TPOT p99, ms", "p99_tpot_ms"),
    ("E2EL p50, ms", "median_e2el_ms"),
    ("USD/Mtok", "usd_per_mtok"),
)


def report_text(scenario: Scenario, report: Report) -> str:
    """What clients saw, then where workers waited, then what happened."""
    settings = scenario.settings
    lines = [_title(scenario), *_served(scenario, report, scenario.usd_per_mtok(report)), "", _latencies(report), ""]
    lines += [
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
    lines += [f"{at_s:8.1f} s  {what}" for at_s, what in report.timeline]
    lines += [f"refused: {count} x {code}" for code, count in report.refused.items()]
    lines += [f"lost: {count} x {reason}" for reason, count in report.lost.items()]
    return "\n".join(lines)


def baseline_text(name: str, report: Report, other: Report, usd_per_mtok: float | None) -> str:
    """The same requests without AFD, and the ratio."""
    ratio = report.request_goodput / other.request_goodput if other.request_goodput else float("inf")
    cost = "" if usd_per_mtok is None else f", {usd_per_mtok:.3f} USD/Mtok"
    num_refused, tpot_ms, other_ms = sum(other.refused.values()), report.tpot.mean_ms, other.tpot.mean_ms
    return "\n".join(
        [
            "",
            f"the same requests on {name}:",
            f"{other.num_answered} answered, {num_refused} refused in {other.duration_s:.1f} s; goodput "
            f"{other.request_goodput:.4g} requests/s, {other.output_throughput:,.0f} output tokens/s{cost}",
            _latencies(other),
            f"AFD's goodput is {ratio:.2f} x that, its mean TPOT {tpot_ms:.1f} ms against {other_ms:.1f}",
        ]
    )


def seeds_text(scenario: Scenario, found: Mapping[str, Interval], num_seeds: int) -> str:
    """Means over the seeds with their 95 % confidence intervals."""
    rows = [
        [title, f"{found[name].mean:,.4g}", f"+- {found[name].ci95:.2g}"] for title, name in _SEED_ROWS if name in found
    ]
    return "\n".join([_title(scenario), f"{num_seeds} seeds, 95 % confidence:", "", table(["", "mean", ""], rows)])


def _title(scenario: Scenario) -> str:
    settings, deployment = scenario.settings, scenario.deployment
    streams = "auto" if settings.auto_streams else str(settings.scheduler.num_streams)
    return (
        f"{settings.topology} {deployment.model.title}, {deployment.ranks_per_instance} ranks an instance, "
        f"{streams} streams, SLA {settings.policy}: {scenario.load}"
    )


def _served(scenario: Scenario, report: Report, usd_per_mtok: float | None) -> list[str]:
    settings = scenario.settings
    good = f"{report.num_good / report.num_requests:.1%}" if report.num_requests else "-"
    cost = "" if usd_per_mtok is None else f", {usd_per_mtok:.3f} USD/Mtok"
    return [
        f"{report.num_answered} answered, {sum(report.refused.values())} refused, {sum(report.lost.values())} lost in "
        f"{report.duration_s:.1f} s",
        f"{report.request_throughput:.4g} requests/s, {report.output_throughput:,.0f} output tokens/s{cost}",
        f"goodput {report.request_goodput:.4g} requests/s ({good} within TPOT {settings.tpot_s * 1e3:g} ms and TTFT "
        f"{settings.ttft_s * 1e3:g} ms)",
    ]


def _latencies(report: Report) -> str:
    spreads = (("TTFT", report.ttft), ("TPOT", report.tpot), ("E2EL", report.e2el))
    return table(
        ["ms", "mean", "p50", "p90", "p99"],
        [[name, *(f"{value:,.1f}" for value in (s.mean_ms, s.p50_ms, s.p90_ms, s.p99_ms))] for name, s in spreads],
    )
