"""What a trace says about the pipeline: what of the waiting is exposed, and what the closed form makes of its stages.

Pure. All workers' times are on one clock here, so unlike a worker's own counters this is exact, to the clocks' error.

    cycle = max(sum over streams of A + head + other, sum over gangs of F + answer + other, one stream's way: its own
    A + head + other, F and C of every layer, without waiting for anybody)

C is the way there (dispatch done, until the batch begins at an FFN worker that waited) and back (batch computed, until
an attention worker that waited has noticed). docs/pipeline.md explains it, and `predicted_s`, its refinement.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles

from afd.sched.cycle import cycle_s, equal_streams_cycle_s
from afd.telemetry.ring import Stage
from afd.trace.timeline import ATTENTION, COMPUTING, FFN, Timeline, Worker, hops

OWN = ("embed", "attention", "dispatch", "combine")
HEAD = ("head_slice", "head")
AHEAD = ("look_ahead",)
HALVES = ("embed", "attention", *HEAD, "ffn")
MIN_SAMPLES = 20
PAUSE_S = 5e-3  # a longer gap between two stages of a worker is idleness, and left out

Span = tuple[float, float]


def exposed_spans(timeline: Timeline, worker: Worker) -> list[Span]:
    """When an attention worker waited and no FFN worker computed rows of it; in order, disjoint. FFN workers: never."""
    if worker.role != ATTENTION:
        return []
    waits = [(s.start_s, s.end_s) for s in worker.stages if s.name == "wait"]
    return without(waits, ((h.ffn.start_s, h.ffn.end_s) for h in hops(timeline) if h.attention is worker))


def without(spans: Iterable[Span], covered: Iterable[Span]) -> list[Span]:
    """The parts of `spans` (disjoint, in any order) that no span of `covered` covers."""
    holes = sorted(covered)
    left: list[Span] = []
    at = 0
    for start_s, end_s in sorted(spans):
        while at < len(holes) and holes[at][1] <= start_s:
            at += 1
        for hole_start_s, hole_end_s in holes[at:]:
            if hole_start_s >= end_s:
                break
            if hole_start_s > start_s:
                left.append((start_s, hole_start_s))
            start_s = max(start_s, hole_end_s)
        if start_s < end_s:
            left.append((start_s, end_s))
    return left


def total(spans: Iterable[Span], seconds: float) -> float:
    """Seconds of the spans within 0..seconds."""
    return sum(max(0.0, min(end_s, seconds) - max(start_s, 0.0)) for start_s, end_s in spans)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Means over attention workers of one step of one stream, seconds summed over its layers; shares of the time.

    cycle_s: in which every stream makes one step.
    own_s: combine, attention, dispatch.
    head_s: head and sampling.
    ahead_s: looking ahead, in place of waiting.
    other_s: neither a stage nor waiting.
    ffn_s, answer_s, ffn_other_s: of the FFN worker, for one gang's step.
    transfer_s: both ways.
    idle: neither half computes.
    ffn_rows: rows a batch.
    """

    num_streams: int
    num_layers: int
    cycle_s: float
    own_s: float
    head_s: float
    ahead_s: float
    other_s: float
    ffn_s: float
    answer_s: float
    ffn_other_s: float
    transfer_s: float
    bubble: float
    ffn_bubble: float
    idle: float
    exposed: float
    gang_size: float
    ffn_rows: float

    @property
    def terms(self) -> dict[str, float]:
        """What bounds the cycle, in seconds: the attention worker, the FFN worker, the way of one stream."""
        own_s = self.own_s + self.head_s + self.other_s
        return {
            "attention": self.num_streams * own_s,
            "ffn": self.num_streams * (self.ffn_s + self.answer_s + self.ffn_other_s),
            "latency": own_s + self.ffn_s + self.transfer_s,
        }

    @property
    def closed_form_s(self) -> float:
        """The cycle, if heads cost no more than their own time."""
        *devices_s, way_s = self.terms.values()
        return cycle_s(devices_s, [way_s])

    @property
    def bound(self) -> str:
        return max(self.terms, key=lambda name: self.terms[name])

    @property
    def predicted_s(self) -> float:
        """The cycle, where heads fill the attention worker's waiting. All of the FFN worker's time counts as busy."""
        a_s = (self.own_s + self.other_s) / self.num_layers
        f_s = (self.ffn_s + self.answer_s + self.ffn_other_s) / self.num_layers
        way_s = a_s + (self.ffn_s + self.transfer_s) / self.num_layers
        return equal_streams_cycle_s(self.num_streams, [a_s, f_s], way_s, self.num_layers, self.head_s)


def pipeline_of(timeline: Timeline) -> Pipeline | None:
    """The pipeline of a stretch of steady decoding; None when it holds no whole step, or only one of the two sides."""
    attention, ffn, seconds = timeline.of_role(ATTENTION), timeline.of_role(FFN), timeline.seconds
    num_layers = 1 + max((s.layer for w in attention for s in w.stages if s.name == "dispatch"), default=-1)
    num_steps = sum(_count(w, "dispatch") for w in attention) / max(1, num_layers)
    batches = sum(_count(w, "ffn") for w in ffn)
    num_gang_steps = batches / max(1, num_layers)
    streams = {s.stream for w in attention for s in w.stages if s.name == "dispatch"}
    if num_steps < 1 or not batches:
        return None
    own_s, head_s, ahead_s, wait_s = (_seconds(attention, seconds, names) for names in (OWN, HEAD, AHEAD, ("wait",)))
    ffn_s, answer_s, ffn_wait_s = (_seconds(ffn, seconds, (name,)) for name in ("ffn", "combine", "wait"))
    exposed_s = sum(total(exposed_spans(timeline, worker), seconds) for worker in attention)
    passed_s, ffn_passed_s = (sum(_worked_s(w, seconds) for w in workers) for workers in (attention, ffn))
    computed = [s for w in ffn for s in w.stages if s.name == "ffn"]
    return Pipeline(
        num_streams=len(streams),
        num_layers=num_layers,
        cycle_s=passed_s * len(streams) / num_steps,
        own_s=own_s / num_steps,
        head_s=head_s / num_steps,
        ahead_s=ahead_s / num_steps,
        other_s=(passed_s - own_s - head_s - ahead_s - wait_s) / num_steps,
        ffn_s=ffn_s / num_gang_steps,
        answer_s=answer_s / num_gang_steps,
        ffn_other_s=(ffn_passed_s - ffn_s - answer_s - ffn_wait_s) / num_gang_steps,
        transfer_s=num_layers * layer_transfer_s(timeline),
        bubble=wait_s / passed_s,
        ffn_bubble=ffn_wait_s / ffn_passed_s,
        idle=_idle_s(timeline) / max(_worked_s(w, seconds) for w in (*attention, *ffn)),
        exposed=exposed_s / passed_s,
        gang_size=fmean(s.gang_size for s in computed),
        ffn_rows=fmean(s.num_tokens for s in computed),
    )


def layer_transfer_s(timeline: Timeline) -> float:
    """C of one layer: there, for a batch that found its FFN worker waiting, and back, to a worker that waited for it.

    Means; where too few were so, the lower quartile of all (the quickest hardly queued).
    """
    found = list(hops(timeline))
    waited_for = {s for w in timeline.of_role(ATTENTION) for s in _after_waiting(w, "exchange")}
    met_waiting = {s for w in timeline.of_role(FFN) for s in _after_waiting(w, "ffn")}
    last_sent_s: dict[Stage, float] = {}
    for hop in found:
        if hop.dispatch is not None:
            last_sent_s[hop.ffn] = max(hop.dispatch.end_s, last_sent_s.get(hop.ffn, 0.0))
    there = [(ffn.start_s - sent_s, ffn in met_waiting) for ffn, sent_s in last_sent_s.items()]
    back = [(hop.exchange.end_s - hop.ffn.end_s, hop.exchange in waited_for) for hop in found]
    return _typical(there) + _typical(back)


def _after_waiting(worker: Worker, name: str) -> Iterator[Stage]:
    """Its stages of that name before which it had nothing to do."""
    before = ""
    for stage in sorted(worker.stages, key=lambda s: s.end_s):
        if stage.name == name and before == "wait":
            yield stage
        if stage.name in COMPUTING or stage.name == "wait":
            before = stage.name


def _typical(samples: Sequence[tuple[float, bool]]) -> float:
    """(seconds, counts in full) -> seconds."""
    full = [seconds for seconds, counts in samples if counts]
    if len(full) >= MIN_SAMPLES:
        return fmean(full)
    return quantiles([seconds for seconds, _ in samples], n=4)[0] if len(samples) > 1 else 0.0


def _worked_s(worker: Worker, seconds: float) -> float:
    """The time but for pauses."""
    main = ((s.start_s, s.end_s) for s in worker.stages if s.name in COMPUTING or s.name == "wait")
    gaps = [span for span in without([(0.0, seconds)], main) if span[1] - span[0] > PAUSE_S]
    return seconds - total(gaps, seconds)


def _idle_s(timeline: Timeline) -> float:
    """Seconds in which no worker computed: with one stream, whose halves have all cores, what those are lost by."""
    spans = ((s.start_s, s.end_s) for w in timeline.workers for s in w.stages if s.name in HALVES)
    gaps = without([(0.0, timeline.seconds)], spans)
    return sum(end_s - start_s for start_s, end_s in gaps if end_s - start_s <= PAUSE_S)


def _count(worker: Worker, name: str) -> int:
    return sum(stage.name == name for stage in worker.stages)


def _seconds(workers: Sequence[Worker], seconds: float, names: Collection[str]) -> float:
    return sum(total(((s.start_s, s.end_s) for s in w.stages if s.name in names), seconds) for w in workers)
