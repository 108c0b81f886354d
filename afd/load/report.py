"""A run as a table for people and as one JSON object for programs.

JSON keys are `vllm bench serve`'s where it has them; what it has not stands beside them under names of our own. The
keys and their meaning are listed in docs/bench-client.md.
"""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import msgspec

from afd import __version__
from afd.errors import ConfigError
from afd.load.metrics import Distribution, Goals, Summary
from afd.load.record import RequestRecord
from afd.load.runner import BenchRun, BenchSettings

_TABLE_WIDTH = 50
_LATENCIES = (
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
    ("e2el", "E2EL", "End-to-end Latency"),
)
# Above this share of one core the client is a suspect itself, and on shared cores it takes from the server.
_BUSY_CLIENT_SHARE = 0.8


def result_json(
    run: BenchRun,
    summary: Summary,
    settings: BenchSettings,
    *,
    num_workers: int | None,
    goals: Goals,
    label: str,
    metadata: dict[str, str],
) -> dict[str, Any]:
    """The result as plain values.

    num_workers: overrides what the server says.
    metadata: added where no key of the result has the same name.
    """
    open_loop = settings.rate is not None
    num_workers = num_workers or run.server.num_workers
    result: dict[str, Any] = {
        **metadata,
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat" if settings.endpoint == "chat" else "openai",
        "backend": "openai-chat" if settings.endpoint == "chat" else "openai",
        "label": label,
        "model_id": run.server.model,
        "tokenizer_id": None,
        "num_prompts": summary.num_completed + summary.num_failed + summary.num_interrupted,
        "request_rate": settings.rate if open_loop else "inf",
        "burstiness": settings.burstiness,
        "max_concurrency": settings.concurrency,
        "duration": summary.duration_s,
        "completed": summary.num_completed,
        "failed": summary.num_failed,
        "total_input_tokens": summary.total_input_tokens,
        "total_output_tokens": summary.total_output_tokens,
        "request_throughput": summary.request_throughput,
        "request_goodput": summary.request_goodput,
        "output_throughput": summary.output_throughput,
        "total_token_throughput": summary.total_token_throughput,
        "max_output_tokens_per_s": summary.max_output_tokens_per_s,
        "max_concurrent_requests": summary.max_concurrent_requests,
    }
    for key, _, _ in _LATENCIES:
        result |= _milliseconds(key, getattr(summary, key))
    if open_loop:
        result |= _milliseconds("client_queue_time", summary.client_queue_time)
    result |= _own_keys(run, summary, settings, num_workers, goals)
    return result


def _own_keys(
    run: BenchRun, summary: Summary, settings: BenchSettings, num_workers: int | None, goals: Goals
) -> dict[str, Any]:
    """What `vllm bench serve` does not report."""
    refusals = summary.refusals
    attainment = summary.attainment
    num_chunks = sum(len(record.token_times) for record in run.records)
    steady = summary.steady
    return {
        "interrupted": summary.num_interrupted,
        "outcomes": dict(summary.outcomes),
        "refused": refusals.count,
        "refused_with_retry_after": refusals.num_with_retry_after,
        "min_retry_after_s": refusals.retry_after_min_s,
        "max_retry_after_s": refusals.retry_after_max_s,
        **(_milliseconds("refusal", refusals.latency) if refusals.count else {}),
        "goodput_goals_ms": {goal: limit_s * 1000 for goal, limit_s in goals.limits},
        "slo_attainment": None
        if attainment is None
        else {**dict(attainment.per_goal), "joint": attainment.joint, "joint_of_sent": attainment.joint_of_sent},
        "steady_output_throughput": steady.output_throughput if steady else None,
        "steady_start_s": steady.start_s - run.started_s if steady else None,
        "steady_duration_s": steady.end_s - steady.start_s if steady else None,
        "topology": run.server.topology,
        "num_workers": num_workers,
        "output_throughput_per_worker": summary.output_throughput / num_workers if num_workers else None,
        "steady_output_throughput_per_worker": steady.output_throughput / num_workers
        if steady and num_workers
        else None,
        "total_cached_input_tokens": summary.total_cached_tokens,
        "tokens_per_chunk": summary.total_output_tokens / summary.num_chunks if summary.num_chunks else None,
        "client_cpu_s": run.client_cpu_s,
        "client_cpu_share": run.client_cpu_s / summary.duration_s,
        "client_cpu_us_per_chunk": run.client_cpu_s / num_chunks * 1e6 if num_chunks else None,
        "dataset": str(settings.dataset) if settings.dataset else "random",
        "input_len": settings.input_len,
        "output_len": settings.output_len,
        "range_ratio": settings.range_ratio,
        "seed": settings.seed,
        "temperature": settings.temperature,
        "ignore_eos": settings.ignore_eos,
        "server_version": run.server.version,
        "afd_version": __version__,
        "machine": describe_machine(),
        "run_interrupted": run.interrupted,
    }


def detailed_json(records: list[RequestRecord]) -> dict[str, Any]:
    """One array entry a request, in the order of the prompts (so that two runs can be laid side by side)."""
    ordered = sorted(records, key=lambda record: record.request_idx)
    return {
        "input_lens": [record.num_prompt_tokens for record in ordered],
        "output_lens": [record.num_output_tokens for record in ordered],
        "ttfts": [record.ttft_s or 0.0 for record in ordered],
        "itls": [list(record.gaps_s()) for record in ordered],
        "latencies": [record.e2el_s for record in ordered],
        "start_times": [record.start_s for record in ordered],
        "queue_times": [record.start_s - record.due_s for record in ordered],
        "generated_texts": ["".join(record.texts or ()) for record in ordered],
        "errors": [record.error for record in ordered],
        "retry_afters": [record.retry_after_s for record in ordered],
    }


def _milliseconds(key: str, values: Distribution) -> dict[str, float]:
    result = {
        f"mean_{key}_ms": values.mean * 1000,
        f"median_{key}_ms": values.median * 1000,
        f"std_{key}_ms": values.std * 1000,
        f"max_{key}_ms": values.max * 1000,
    }
    return result | {f"p{p:g}_{key}_ms": value * 1000 for p, value in values.percentiles}


def describe_machine() -> str:
    """The client's processor and cores: a figure without its hardware says little."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux
    return f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def render_table(result: dict[str, Any], summary: Summary, errors: list[str]) -> str:
    """The table of `vllm bench serve`, with the lines that it lacks.

    errors: some of the failures' reasons.
    """
    lines = [_heading(" Serving Benchmark Result ", "=")]
    lines += [_row("Successful requests:", result["completed"]), _row("Failed requests:", result["failed"])]
    if result["refused"]:
        lines.append(_row("  of these refused (503, 429):", result["refused"]))
        lines.append(_row("  refused with Retry-After:", result["refused_with_retry_after"]))
        lines.append(_row("  P99 time to refusal (ms):", _p99(summary.refusals.latency) * 1000))
    if result["interrupted"]:
        lines.append(_row("Interrupted requests:", result["interrupted"]))
    if result["request_rate"] != "inf":
        lines.append(_row("Request rate configured (RPS):", float(result["request_rate"])))
    lines += [
        _row("Maximum request concurrency:", result["max_concurrency"]),
        _row("Benchmark duration (s):", result["duration"]),
        _row("Total input tokens:", result["total_input_tokens"]),
        _row("Total generated tokens:", result["total_output_tokens"]),
        _row("Request throughput (req/s):", result["request_throughput"]),
    ]
    if result["request_goodput"] is not None:
        lines.append(_row("Request goodput (req/s):", result["request_goodput"]))
    lines += [
        _row("Output token throughput (tok/s):", result["output_throughput"]),
        _row("Steady output token throughput (tok/s):", result["steady_output_throughput"]),
        _row("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"]),
        _row("Peak concurrent requests:", result["max_concurrent_requests"]),
        _row("Total token throughput (tok/s):", result["total_token_throughput"]),
    ]
    if result["num_workers"]:
        of = f" of {result['topology']}" if result["topology"] else f" of {result['num_workers']}"
        lines.append(_row(f"Output tokens/s per worker{of}:", result["output_throughput_per_worker"]))
    for key, short, title in _LATENCIES:
        lines += _latency_rows(getattr(summary, key), short, title)
    if result["request_rate"] != "inf":
        lines += _latency_rows(summary.client_queue_time, "delay", "Client-side Delay of Sending")
    if summary.attainment is not None:
        lines.append(_heading("SLO Attainment", "-"))
        for goal, share in summary.attainment.per_goal:
            limit_ms = result["goodput_goals_ms"][goal]
            lines.append(_row(f"{goal.upper()} <= {limit_ms:g} ms (%):", share * 100))
        lines.append(_row("All goals (%):", summary.attainment.joint * 100))
        lines.append(_row("All goals, of all requests sent (%):", summary.attainment.joint_of_sent * 100))
    lines.append(_heading("Client", "-"))
    lines.append(_row("CPU per chunk (us):", result["client_cpu_us_per_chunk"]))
    lines.append(_row("CPU share of one core (%):", result["client_cpu_share"] * 100))
    lines.append("=" * _TABLE_WIDTH)
    if result["client_cpu_share"] > _BUSY_CLIENT_SHARE:
        lines.append("The client nearly filled a core: its own delays are part of these latencies.")
    if errors:
        lines += ["Failures:", *(f"  {error}" for error in errors)]
    return "\n".join(lines)


def failure_reasons(records: list[RequestRecord], limit: int = 5) -> list[str]:
    """The commonest reasons, with how often each came."""
    counts: dict[str, int] = {}
    for record in records:
        if record.failed:
            reason = f"{record.outcome.value}: {record.error}"
            counts[reason] = counts.get(reason, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    lines = [f"{count} x {reason}" for reason, count in ordered[:limit]]
    if len(ordered) > limit:
        lines.append(f"and {len(ordered) - limit} other reasons")
    return lines


def check_writable(path: Path) -> None:
    """ConfigError before the run rather than a lost result after it."""
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise ConfigError(f"--save-result {path}: {error.strerror}") from None


def save_result(path: Path, result: dict[str, Any]) -> None:
    """One line of JSON, as `vllm bench serve --save-result` writes it."""
    path.write_bytes(msgspec.json.encode(result) + b"\n")


def _latency_rows(values: Distribution, short: str, title: str) -> list[str]:
    rows = [_heading(title, "-")]
    rows.append(_row(f"Mean {short} (ms):", values.mean * 1000))
    rows.append(_row(f"Median {short} (ms):", values.median * 1000))
    return rows + [_row(f"P{p:g} {short} (ms):", value * 1000) for p, value in values.percentiles if p != 50]


def _p99(values: Distribution) -> float:
    return dict(values.percentiles).get(99.0, values.max)


def _heading(title: str, fill: str) -> str:
    return f"{title:{fill}^{_TABLE_WIDTH}}"


def _row(name: str, value: float | int | None) -> str:
    shown = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{name:<40} {shown:<10}".rstrip()
