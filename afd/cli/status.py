"""`afd status`, `afd drain`, `afd stop`: what the coordinator knows, and what an operator may ask of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

import msgspec

from afd.cli.locate import add_locate_flags, locate
from afd.errors import CoordinatorError
from afd.messages.membership import ControlRequest, Forecast, MemberStatus, StatusReply
from afd.telemetry.log import printable

NUM_EVENTS = 8
_PIPELINE = {
    "bubble": ("BUBBLE", ".1%"),
    "exposed": ("EXPOSED TRANSFER", ".1%"),
    "gang_size": ("GANG", ".2f"),
    "straggler": ("WORST STRAGGLER", ".1%"),
}
"""Stats of the pipeline's table: title and format. docs/pipeline.md says what they mean."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = commands.add_parser("status", help="members, epoch and load of a running cluster")
    add_locate_flags(status)
    status.add_argument("--json", action="store_true", help="everything, as one JSON object")
    status.set_defaults(func=run_status)
    drain = commands.add_parser("drain", help="let one attention worker or gateway finish its work and leave")
    drain.add_argument("target", help='such as "attention/1"')
    add_locate_flags(drain)
    drain.set_defaults(func=lambda args: run_control(args, ControlRequest("drain", args.target)))
    stop = commands.add_parser("stop", help="drain the whole cluster and stop it")
    add_locate_flags(stop)
    stop.set_defaults(func=lambda args: run_control(args, ControlRequest("shutdown")))


def run_status(args: argparse.Namespace) -> int:
    """Exit code 0 when the cluster is formed and every member ready, else 1."""
    place = locate(args)
    with place.client() as client:
        reply = client.status()
    if args.json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(reply)) + b"\n")
    else:
        print(status_text(reply, url=place.url))
    return 0 if reply.view.formed and all(status.member.ready for status in reply.members) else 1


def run_control(args: argparse.Namespace, request: ControlRequest) -> int:
    with locate(args).client() as client:
        reply = client.control(request)
    if not reply.ok:
        raise CoordinatorError(reply.error)
    return 0


def status_text(reply: StatusReply, *, url: str = "") -> str:
    """The view, a table of members, the newest events."""
    view = reply.view
    topology = f"{view.num_attention}A{view.num_ffn}F" if view.num_ffn else "mono"
    formed = "shutting down" if view.shutdown else "formed" if view.formed else "waiting for workers"
    lines = [
        f"{topology}  {view.model}  {formed}, epoch {view.epoch}" + (f"  {url}" if url else ""),
        f"cluster {view.cluster_id[:8]}  {view.plan.text}",
        *map(_forecast, reply.forecasts),
        "",
    ]
    rows: list[tuple[str, ...]] = [("MEMBER", "STATE", "SEEN", "PROCESS", "METRICS")]
    rows += [_row(status, reply.view.num_ffn) for status in reply.members]
    lines += _table(rows)
    lines += _load(reply.members)
    lines += _pipeline(reply.members)
    lines += _silent_experts(reply.members)
    if reply.events:
        lines += ["", *reply.events[-NUM_EVENTS:]]
    return printable("\n".join(lines), keep="\n")  # members' words are in it


def _forecast(forecast: Forecast) -> str:
    """What so many streams would cost, as the coordinator sees it."""
    streams = f"{forecast.num_streams} stream" + ("s" if forecast.num_streams > 1 else " ")
    return (
        f"  {streams}: cycle {forecast.cycle_s * 1e3:.1f} ms predicted (attention {forecast.attention_s * 1e3:.1f}, "
        f"FFN {forecast.ffn_s * 1e3:.1f}, one stream's way {forecast.latency_s * 1e3:.1f}; "
        f"gangs {forecast.gang_size:.1f} of {forecast.num_workers})"
    )


def _row(status: MemberStatus, num_ffn: int) -> tuple[str, ...]:
    member = status.member
    if member.draining:
        state = "draining"
    elif member.ready:
        state = "on standby" if member.info.role == "ffn" and member.rank >= num_ffn else "ready"
    elif status.loading < 1.0 and member.info.role != "gateway":  # which loads nothing
        state = f"loading {status.loading:.0%}"
    else:
        state = "connecting"
    return (
        f"{member.info.role}/{member.rank}",
        state,
        f"{status.age_s:.1f} s ago",
        f"{member.info.host} pid {member.info.pid}",
        member.info.metrics or "-",
    )


def _load(members: Sequence[MemberStatus]) -> list[str]:
    """A line for each member that does something: what matters of its stats, in words."""
    rows = [(f"{m.member.info.role}/{m.member.rank}", load_text(m.stats)) for m in members]
    rows = [row for row in rows if row[1]]
    return ["", *_table([("LOAD", ""), *rows])] if rows else []


def load_text(stats: Mapping[str, float]) -> str:
    """The stats of one member; those of the last minute where it is a gateway."""
    parts = [f"{stats[key]:.0f} {key}" for key in ("running", "waiting", "queued") if key in stats]
    if "kv_free" in stats:
        parts.append(f"KV {1.0 - stats['kv_free']:.0%}")
    if stats.get("step_ms"):
        parts.append(f"step {stats['step_ms']:.1f} ms")
    if stats.get("refused"):
        parts.append(f"{stats['refused']:.0f} refused")
    if stats.get("over_sla"):
        parts.append(f"{stats['over_sla']:.0f} beyond the SLA (admitted)")
    if stats.get("batches"):
        parts.append(f"{stats['batches']:.0f} batches of {stats['tokens'] / stats['batches']:.1f} rows")
    if stats.get("finished"):
        parts.append(f"TPOT p99 {stats['tpot_p99_ms']:.1f} ms, TTFT p99 {stats['ttft_p99_ms']:.0f} ms")
    return ", ".join(parts)


def _pipeline(members: Sequence[MemberStatus]) -> list[str]:
    """A row for each worker that says how its side of the pipeline has run recently."""
    rows: list[tuple[str, ...]] = [("PIPELINE (last 10 s)", *(title for title, _ in _PIPELINE.values()))]
    for status in members:
        if "bubble" in status.stats:
            cells = (_cell(status.stats.get(key), pattern) for key, (_, pattern) in _PIPELINE.items())
            rows.append((f"{status.member.info.role}/{status.member.rank}", *cells))
    return ["", *_table(rows)] if len(rows) > 1 else []


def _cell(value: float | None, pattern: str) -> str:
    return "-" if value is None else format(value, pattern)


def _silent_experts(members: Sequence[MemberStatus]) -> list[str]:
    """A line for each layer with experts that receive tokens and give nothing."""
    by_layer: dict[int, set[int]] = {}
    for layer, expert in (found for status in members for found in status.silent_experts):
        by_layer.setdefault(layer, set()).add(expert)
    lines = [f"layer {layer}: {', '.join(map(str, sorted(by_layer[layer])))}" for layer in sorted(by_layer)]
    return ["", "silent experts (receive tokens, give nothing; see `afd inspect`):", *lines] if lines else []


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; the last one free."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
