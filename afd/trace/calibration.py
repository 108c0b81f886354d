"""Stage times of a running cluster as the planner and the simulator read them (`--calibrate FILE`). Pure.

Seconds are what a stage keeps its worker from doing anything else, everything around it (scheduling, messages, the
operating system) counted with the stage that follows; so the sums over a busy worker's stages are the time that passed.
What is computed for several layers at once (topology mono) tells nothing of a wire: it is refused.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from afd.telemetry.ring import Stage
from afd.trace.errors import TraceError
from afd.trace.timeline import ATTENTION, FFN, Hop, Timeline, Worker, hops

SCHEMA = "afd-calibration/1"  # of afd/plan/calibration.py
BIN_RATIO = 1.25  # sizes within it count as one
MIN_SAMPLES = 20  # in a bin, where there is a bin with so many at all
MAX_GAP_S = 5e-3  # a longer one between two stages is idleness, not overhead
AT_ONCE_S = 2e-4  # an answer noticed so soon after a wait was waited for
SMALLEST_S = 1e-7

Sample = tuple[int, float]  # tokens, seconds


def calibration(timeline: Timeline, *, model: str, topology: str, context: int = 0) -> dict[str, Any]:
    """What `--calibrate` takes.

    context: mean cached tokens of a decoding request; 0 = not known, and not separated.

    TraceError when the trace lacks a kind of stage.
    """
    timeline = _complete(timeline)
    attention: list[Sample] = []
    head: list[Sample] = []
    for worker in timeline.of_role(ATTENTION):
        for stage, seconds in _own_times(worker):
            (head if stage.name == "head" else attention).append((stage.num_tokens, seconds))
    batches = list(_batches(timeline))
    t_A, t_head, t_F = points(attention), points(head), points(_ffn_times(batches))
    t_C = _transfer_points(timeline, batches)
    for found, what in ((t_A, "attention"), (t_F, "FFN"), (t_C, "exchange"), (t_head, "head")):
        if not found:
            raise TraceError(f"the trace has no {what} stages to calibrate with: record it while the cluster works")
    return {
        "schema": SCHEMA,
        "model": model,
        "topology": topology,
        "ranks_per_instance": 1,
        "t_A": [{**point, "context": context} for point in t_A],
        "t_F": t_F,
        "t_C": t_C,
        "t_head": t_head,
        "machine": f"{sum(len(worker.stages) for worker in timeline.workers)} stages in {timeline.seconds:g} s",
    }


def _complete(timeline: Timeline) -> Timeline:
    """The part that every worker has all stages of: so that a machine's moods count alike for all of them."""
    from_s = max((worker.complete_from_s for worker in timeline.workers), default=0.0)
    workers = [
        replace(worker, stages=tuple(stage for stage in worker.stages if stage.start_s >= from_s))
        for worker in timeline.workers
    ]
    return replace(timeline, workers=tuple(workers))


def points(samples: Iterable[Sample]) -> list[dict[str, float | int]]:
    """Means of like sizes, in rising order; bins with few samples are left out unless all have few."""
    bins: dict[int, list[Sample]] = defaultdict(list)
    for tokens, seconds in samples:
        if tokens > 0:
            bins[round(math.log(tokens) / math.log(BIN_RATIO))].append((tokens, seconds))
    enough = min(MIN_SAMPLES, max((len(found) for found in bins.values()), default=0))
    return [
        {
            "tokens": max(1, round(sum(tokens for tokens, _ in found) / len(found))),
            "seconds": max(SMALLEST_S, sum(seconds for _, seconds in found) / len(found)),
        }
        for _, found in sorted(bins.items())
        if len(found) >= enough
    ]


def _own_times(worker: Worker) -> Iterator[tuple[Stage, float]]:
    """Each layer's last own stage ("dispatch") and each head, with the time since the worker did something else.

    Time without a stage is work around them while a step is in flight, and idleness beyond MAX_GAP_S when none is.
    """
    previous_s: float | None = None
    in_flight: set[int] = set()
    sliced_s: dict[int, float] = defaultdict(float)  # by stream: earlier slices of its head
    for stage in sorted((s for s in worker.stages if s.name != "exchange"), key=lambda s: s.end_s):
        if stage.name == "wait":
            previous_s = stage.end_s
            continue
        if previous_s is None and stage.name not in ("embed", "combine"):
            continue  # its begin is not known
        if previous_s is None or (not in_flight and stage.start_s - previous_s > MAX_GAP_S):
            previous_s = stage.start_s
        in_flight.add(stage.stream)
        if stage.name not in ("dispatch", "head_slice", "head"):
            continue  # counted with what follows it
        own_s = stage.end_s - previous_s
        previous_s = stage.end_s
        if stage.name == "dispatch":
            yield stage, own_s
        elif stage.name == "head_slice":
            sliced_s[stage.stream] += own_s
        else:
            yield stage, own_s + sliced_s.pop(stage.stream, 0.0)
            in_flight.discard(stage.stream)


@dataclass(frozen=True, slots=True)
class _Batch:
    """What an FFN worker computed at once.

    sent_s: when the last of its rows had left their worker; inf = not known.
    free_s: when the worker had answered the batch before.
    rows: of the member that was the last.
    """

    ffn: Stage
    answered_s: float
    free_s: float
    sent_s: float
    rows: int

    @property
    def was_awaited(self) -> bool:
        """The worker had nothing to do when its rows left: what passed then is the wire and the wake-up."""
        return self.free_s <= self.sent_s


def _batches(timeline: Timeline) -> Iterator[_Batch]:
    """All of known members but a step's first ones, which may wait for members that are not there."""
    members: dict[int, list[Hop]] = defaultdict(list)
    for hop in hops(timeline):
        members[id(hop.ffn)].append(hop)
    for worker in timeline.of_role(FFN):
        free_s, begun = math.inf, None
        for stage in sorted(worker.stages, key=lambda s: s.end_s):
            if stage.name == "ffn":
                begun = stage
            elif stage.name == "combine" and begun is not None:
                sent = [hop.dispatch for hop in members[id(begun)] if hop.dispatch is not None]
                if sent and len(sent) == begun.gang_size and begun.layer > 0 and free_s < math.inf:
                    last = max(sent, key=lambda dispatch: dispatch.end_s)
                    yield _Batch(begun, stage.end_s, free_s, last.end_s, last.num_tokens)
                free_s, begun = stage.end_s, None


def _ffn_times(batches: Iterable[_Batch]) -> Iterator[Sample]:
    """Each batch's stay: from its begin where it was awaited, else from where the worker was free for it."""
    for batch in batches:
        yield batch.ffn.num_tokens, batch.answered_s - (batch.ffn.start_s if batch.was_awaited else batch.free_s)


def _ways_there(batches: Iterable[_Batch]) -> Iterator[tuple[int, float, bool]]:
    """(rows, seconds, was awaited): from when the last rows left, or a busy worker was free, to the batch's begin."""
    for batch in batches:
        yield batch.rows, batch.ffn.start_s - max(batch.sent_s, batch.free_s), batch.was_awaited


def _ways_back(timeline: Timeline) -> Iterator[tuple[int, float, bool]]:
    """(rows, seconds, was awaited): from when it was answered, or a busy worker was free, to where it was noticed."""
    answered_s: dict[tuple[int, int, int], float] = {}
    for worker in timeline.of_role(FFN):
        for stage in worker.stages:
            if stage.name == "combine" and stage.gang_id:
                key = (stage.stream, stage.layer, stage.gang_id)
                answered_s[key] = max(answered_s.get(key, 0.0), stage.end_s)
    for worker in timeline.of_role(ATTENTION):
        rows: dict[int, int] = {}  # by stream
        free_s, wait = math.inf, (math.inf, math.inf)
        for stage in sorted(worker.stages, key=lambda s: s.end_s):
            if stage.name == "wait":
                wait = (stage.start_s, stage.end_s)
            elif stage.name == "exchange":
                at_s = answered_s.get((stage.stream, stage.layer, stage.gang_id))
                if at_s is None or stage.stream not in rows or free_s > stage.end_s:
                    continue
                was_awaited = wait[0] <= at_s and stage.end_s - wait[1] <= AT_ONCE_S
                yield rows[stage.stream], stage.end_s - (at_s if was_awaited else max(at_s, free_s)), was_awaited
            else:
                free_s = stage.end_s
                if stage.name == "dispatch":
                    rows[stage.stream] = stage.num_tokens


def _transfer_points(timeline: Timeline, batches: Iterable[_Batch]) -> list[dict[str, float | int]]:
    """Both ways, each at its own sizes: where one was not seen at a size, its nearest one counts."""
    there, back = (points(_awaited(ways)) for ways in (_ways_there(batches), _ways_back(timeline)))
    if not there or not back:
        return []
    sizes = sorted({point["tokens"] for point in (*there, *back)})
    return [{"tokens": size, "seconds": _nearest(there, size) + _nearest(back, size)} for size in sizes]


def _awaited(ways: Iterable[tuple[int, float, bool]]) -> list[Sample]:
    """Ways to workers that had nothing else to do. If there are too few, others: what is left of a way after a busy
    worker was free, for the rest of it was hidden."""
    found = [(rows, max(0.0, seconds), awaited) for rows, seconds, awaited in ways]
    samples = [(rows, seconds) for rows, seconds, awaited in found if awaited]
    return samples if len(samples) >= MIN_SAMPLES else [(rows, seconds) for rows, seconds, _ in found]


def _nearest(found: Sequence[dict[str, float | int]], size: float) -> float:
    return min(found, key=lambda point: abs(point["tokens"] - size))["seconds"]
