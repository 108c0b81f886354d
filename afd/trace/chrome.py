"""The timeline as Chrome's trace-event JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open. Pure.

A process for each worker, a track for each of its streams, one for its waits; arrows follow the rows from dispatch to
the FFN's batch and back. Times in microseconds. Every stage is written with all it knows, so that the file can be read
back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from afd.telemetry.ring import Stage
from afd.trace.errors import TraceError
from afd.trace.timeline import ATTENTION, Timeline, Worker, gang_name, gang_of_name, hops, lanes

FORMAT = "afd-trace-1"
MAIN_TRACK = 0  # of stages without a stream
MAX_STREAMS = 64
TRACKS_PER_STREAM = 16  # the stream's own and those for what overlaps on it


def to_chrome(timeline: Timeline) -> Iterator[str]:
    """The file, in pieces."""
    pids = {worker.name: pid for pid, worker in enumerate(timeline.workers, 1)}
    about = {
        "format": FORMAT,
        "title": timeline.title,
        "seconds": timeline.seconds,
        "missing": list(timeline.missing),
        "workers": [
            {
                "name": worker.name,
                "pid": worker.pid,
                "clock_error_us": round(worker.clock_error_s * 1e6, 3),
                "complete_from_us": round(worker.complete_from_s * 1e6, 3),
            }
            for worker in timeline.workers
        ],
    }
    yield f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(about)},\n"traceEvents": ['
    separator = "\n"
    for event in _events(timeline, pids):
        yield separator + json.dumps(event, separators=(",", ":"))
        separator = ",\n"
    yield "\n]}\n"


def _events(timeline: Timeline, pids: dict[str, int]) -> Iterator[dict[str, Any]]:
    places: dict[tuple[str, Stage], int] = {}
    for worker in timeline.workers:
        pid = pids[worker.name]
        names = {"process_name": {"name": worker.name}, "process_sort_index": {"sort_index": pid}}
        for name, args in names.items():
            yield {"ph": "M", "name": name, "pid": pid, "args": args}
        for tid, title, stages in _tracks(worker):
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": title}}
            yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
            for stage in stages:
                places[worker.name, stage] = tid
                yield _slice(stage, pid, tid)
    arrow = 0
    for hop in hops(timeline):
        a, f = hop.attention.name, hop.ffn_worker.name
        for begin, end, source, target in ((hop.dispatch, hop.ffn, a, f), (hop.answer, hop.combine, f, a)):
            if begin is not None and end is not None:
                arrow += 1
                for ph, worker_name, stage in (("s", source, begin), ("f", target, end)):
                    yield {
                        "ph": ph,
                        "bp": "e",
                        "id": arrow,
                        "name": "rows",
                        "cat": "rows",
                        "pid": pids[worker_name],
                        "tid": places[worker_name, stage],
                        "ts": _us(stage.start_s),
                    }


def _tracks(worker: Worker) -> Iterator[tuple[int, str, list[Stage]]]:
    """(tid, title, stages) such that no two stages of a track overlap: viewers would nest them."""
    by_stream: dict[int, list[Stage]] = {}
    for stage in worker.stages:
        by_stream.setdefault(stage.stream, []).append(stage)
    for stream, stages in sorted(by_stream.items()):
        tid = MAIN_TRACK if stream < 0 else 1 + stream * TRACKS_PER_STREAM
        title = f"stream {stream}" if stream >= 0 else "waiting"
        by_lane: dict[int, list[Stage]] = {}
        for stage, lane in zip(stages, lanes(stages), strict=True):
            by_lane.setdefault(min(lane, TRACKS_PER_STREAM - 1), []).append(stage)
        for lane, group in sorted(by_lane.items()):
            yield tid + lane, title if lane == 0 else f"{title} ({lane + 1})", group


def _slice(stage: Stage, pid: int, tid: int) -> dict[str, Any]:
    args: dict[str, Any] = {"stage": stage.name}
    if stage.stream >= 0:
        args |= {"stream": stage.stream, "layer": stage.layer, "tokens": stage.num_tokens, "step": stage.step}
    if stage.gang_size:
        args |= {"gang": gang_name(stage.gang_id), "gang_size": stage.gang_size, "epoch": stage.epoch}
    return {
        "ph": "X",
        "name": stage.name if stage.layer < 0 else f"{stage.name} {stage.layer}",
        "cat": "waiting" if stage.name in ("wait", "gang_wait", "exchange") else "computing",
        "pid": pid,
        "tid": tid,
        "ts": _us(stage.start_s),
        "dur": round(_us(stage.end_s) - _us(stage.start_s), 3),
        "args": args,
    }


def _us(seconds: float) -> float:
    """Whole nanoseconds: instants that are equal stay equal, so that neighbours do not overlap."""
    return round(seconds * 1e9) / 1e3


def from_chrome(text: str | bytes, source: str) -> Timeline:
    """What `to_chrome` wrote. TraceError, naming `source`, for any other file."""
    try:
        document = json.loads(text)
        about = document["otherData"]
        if about["format"] != FORMAT:
            raise TraceError(f"{source}: format {about['format']!r} is not {FORMAT}")
        stages: dict[int, list[Stage]] = {}
        for event in document["traceEvents"]:
            if event["ph"] == "X":
                stages.setdefault(event["pid"], []).append(_stage(event))
        workers = []
        for pid, entry in enumerate(about["workers"], 1):
            role, _, rank = str(entry["name"]).partition("/")
            own = sorted(stages.get(pid, []), key=lambda s: (s.start_s, s.end_s))
            error_s, complete_from_s = entry["clock_error_us"] / 1e6, entry["complete_from_us"] / 1e6
            workers.append(Worker(role, int(rank), int(entry["pid"]), tuple(own), error_s, complete_from_s))
        workers.sort(key=lambda worker: (worker.role != ATTENTION, worker.role, worker.rank))
        return Timeline(tuple(workers), float(about["seconds"]), str(about["title"]), tuple(about["missing"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TraceError(f"{source} is not a trace that `afd trace` wrote ({type(error).__name__}: {error})") from None


def _stage(event: dict[str, Any]) -> Stage:
    args = event["args"]
    stream = int(args.get("stream", -1))
    if not -1 <= stream < MAX_STREAMS:
        raise ValueError(f"stream {stream}")
    start_us = float(event["ts"])
    return Stage(
        str(args["stage"]),
        round(start_us * 1e3) / 1e9,
        round((start_us + float(event["dur"])) * 1e3) / 1e9,
        stream,
        int(args.get("layer", -1)),
        int(args.get("tokens", 0)),
        int(args.get("step", 0)),
        gang_of_name(args.get("gang", "")),
        int(args.get("gang_size", 0)),
        int(args.get("epoch", 0)),
    )
