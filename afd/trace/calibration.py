"""Stage times of a running cluster as the planner and the simulator read them (`--calibrate FILE`). Pure.

Seconds are what a stage keeps its worker from doing anything else, everything around it (scheduling, messages, the
operating system) counted with the stage that follows; so the sums over a busy worker's stages are the time that passed.
What is computed for several layers at once (topology mono) tells nothing of a wire: it is refused.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from afd.events import Stage
from afd.trace.errors import TraceError
from afd.trace.timeline import ATTENTION, FFN, Timeline, Worker

SCHEMA = "afd-calibration/1"  # of afd/plan/calibration.py
BIN_RATIO = 1.25  # sizes within it count as one
MIN_SAMPLES = 20  # in a bin, where there is a bin with so many at all
MAX_GAP_S = 5e-3  # a longer one between two stages is idleness, not overhead
AT_ONCE_S = 2e-4  # an answer noticed so soon after a wait was waited for
SMALLEST_S = 1e-7

Sample = tuple[int, float]  # tokens, seconds


def calibration(timeline: Timeline, *, model: str, topology: str, context: int = 0) -> dict[str, Any]:
    """What `--calibrate` takes. context: mean cached tokens of a decoding request; 0 = not known, and not separated.

    TraceError when the trace lacks a kind of stage.
    """
    attention: list[Sample] = []
    head: list[Sample] = []
    for worker in timeline.of_role(ATTENTION):
        for stage, seconds in _own_times(worker):
            (head if stage.name == "head" else attention).append((stage.num_tokens, seconds))
    ffn = [sample for worker in timeline.of_role(FFN) for sample in _ffn_times(worker)]
    transfer = list(_transfer_times(timeline))
    for samples, what in ((attention, "attention"), (ffn, "FFN"), (transfer, "exchange"), (head, "head")):
        if not samples:
            raise TraceError(f"the trace has no {what} stages to calibrate with: record it while the cluster works")
    return {
        "schema": SCHEMA,
        "model": model,
        "topology": topology,
        "ranks_per_instance": 1,
        "t_A": [{**point, "context": context} for point in points(attention)],
        "t_F": points(ffn),
        "t_C": points(transfer),
        "t_head": points(head),
        "machine": f"{sum(len(worker.stages) for worker in timeline.workers)} stages in {timeline.seconds:g} s",
    }


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
    """Each layer's last own stage ("dispatch") and each head, with the time since the worker did something else."""
    previous_s: float | None = None
    sliced_s: dict[int, float] = defaultdict(float)  # by stream: earlier slices of its head
    for stage in sorted((s for s in worker.stages if s.name != "exchange"), key=lambda s: s.end_s):
        if stage.name in ("embed", "combine"):
            if previous_s is None or stage.start_s - previous_s > MAX_GAP_S:
                previous_s = stage.start_s
        elif stage.name == "wait":
            previous_s = stage.end_s
        elif stage.name in ("dispatch", "head_slice", "head") and previous_s is not None:
            own_s = stage.end_s - previous_s
            previous_s = stage.end_s
            if stage.name == "head_slice":
                sliced_s[stage.stream] += own_s
            else:
                yield stage, own_s + (sliced_s.pop(stage.stream, 0.0) if stage.name == "head" else 0.0)


def _ffn_times(worker: Worker) -> Iterator[Sample]:
    """Each batch from where the worker was free for it, if it was here then, else from its begin, to its answers."""
    free_s, first_s, begun_s = math.inf, math.inf, math.inf
    for stage in sorted(worker.stages, key=lambda s: s.end_s):
        if stage.name == "gang_wait":
            first_s = stage.start_s
        elif stage.name == "ffn":
            was_here = first_s < free_s <= stage.start_s and stage.start_s - free_s <= MAX_GAP_S
            begun_s = free_s if was_here and stage.gang_size == 1 else stage.start_s
        elif stage.name == "combine" and begun_s < stage.end_s:
            yield stage.num_tokens, stage.end_s - begun_s
            free_s, begun_s = stage.end_s, math.inf


def _transfer_times(timeline: Timeline) -> Iterator[Sample]:
    """What an exchange takes beyond its batch's stay at the FFN, of gangs of one; where the worker waited for it, if
    there are enough: else the time until a busy worker noticed the answer is in it."""
    stays: dict[tuple[int, int, int], float] = {}
    for worker in timeline.of_role(FFN):
        arrived_s: dict[tuple[int, int, int], float] = {}
        for stage in sorted(worker.stages, key=lambda s: s.end_s):
            key = (stage.stream, stage.layer, stage.gang_id)
            if stage.gang_size != 1 or not stage.gang_id:
                continue
            if stage.name == "gang_wait":
                arrived_s[key] = stage.start_s
            elif stage.name == "combine" and key in arrived_s:
                stays[key] = max(stays.get(key, 0.0), stage.end_s - arrived_s[key])
    awaited, noticed = [], []
    for worker in timeline.of_role(ATTENTION):
        waited_until_s, rows = -math.inf, 0
        for stage in sorted(worker.stages, key=lambda s: s.end_s):
            if stage.name == "wait":
                waited_until_s = stage.end_s
            elif stage.name == "dispatch":
                rows = stage.num_tokens
            elif stage.name == "exchange":
                stay_s = stays.get((stage.stream, stage.layer, stage.gang_id))
                if stay_s is None:
                    continue
                sample = (stage.num_tokens or rows, max(0.0, stage.end_s - stage.start_s - stay_s))
                noticed.append(sample)
                if stage.end_s - waited_until_s <= AT_ONCE_S:
                    awaited.append(sample)
    if len(awaited) >= MIN_SAMPLES:
        yield from awaited
    else:  # the quickest of them, which hardly waited
        noticed.sort(key=lambda sample: sample[1])
        yield from noticed[: max(1, len(noticed) // 4)]
