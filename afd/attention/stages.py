"""Where the attention worker's time goes: sums for metrics and admission, a ring for traces."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from afd.attention.exchange import Combined, Gang
from afd.attention.path import Leg, Spans
from afd.sched.latency import StepLoad, StepSample
from afd.sched.sequence import MicroBatch
from afd.telemetry.ring import Stage, StageBlock, TraceRing

MAX_SAMPLES = 16  # of steps that wait for `deliver`
EMA = 0.2  # weight of the newest step in moving averages


@dataclass(slots=True)
class StageTotals:
    """Seconds and counts since start. wait_s: waiting with work in flight (the bubble).

    exposed_s: of wait_s, what no FFN computed for this worker.
    other_s: between stages while there is work: scheduling, publishing, events, and whatever the operating system does
    with the core.
    ahead_s: preparing next steps while rows are away.
    step_s, step_exposed_s: steps' durations, and what was exposed within them, summed over all streams' steps.
    num_tokens, num_attended, num_sampled: rows computed, KV entries that they read, output tokens.
    """

    attention_s: float = 0.0
    exchange_s: float = 0.0
    ffn_s: float = 0.0
    head_s: float = 0.0
    wait_s: float = 0.0
    exposed_s: float = 0.0
    other_s: float = 0.0
    ahead_s: float = 0.0
    step_s: float = 0.0
    step_exposed_s: float = 0.0
    num_steps: int = 0
    num_tokens: int = 0
    num_attended: float = 0.0
    num_sampled: int = 0
    num_exchanges: int = 0
    num_gang_members: int = 0  # summed over exchanges: / num_exchanges = mean gang size


@dataclass(slots=True)
class _StepSums:
    """Seconds of one stream's step so far.

    among: streams at work at any time of it, itself included.
    """

    among: set[int]
    attention_s: float = 0.0
    head_s: float = 0.0
    exchange_s: float = 0.0
    ffn_s: float = 0.0
    gang_tokens: int = 0
    exposed_before_s: float = 0.0  # StageTotals.exposed_s when it began
    typical: bool = True


class StageClock:
    """Called by the engine at each stage's end; reads the clock once a stage.

    observer: gets every finished step's sums, for the latency model, at the next `deliver`.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._steps: dict[int, _StepSums] = {}  # by stream: the steps in flight
        self._samples: deque[StepSample] = deque(maxlen=MAX_SAMPLES)
        self.observer: Callable[[StepSample], None] | None = None
        self.totals = StageTotals()
        self.ring = TraceRing()
        self.step_s = 0.0  # moving average of one stream's step
        self._ended_s: float | None = None  # of the last stage or wait, while there is work
        self._unanswered_s = 0.0  # waited since the last answer
        self._beside: set[int] = set()  # streams for which something is computed beside this thread
        self._idle_since_s = 0.0  # when the last of it ended

    def book(self, batch: MicroBatch, leg: Leg) -> None:
        """Layers of the batch's step, computed and dispatched, with the answers that were awaited between them."""
        spans, totals, stream = leg.spans, self.totals, leg.stream
        attention_s, num_answered = spans.attention_s, spans.num_answered
        self._span(spans.began_s, spans.ended_s + spans.open_wait_s)
        if leg.first_layer == 0:
            self._steps[stream] = _StepSums(set(self._steps), exposed_before_s=totals.exposed_s)
            for others in self._steps.values():
                others.among.add(stream)
        sums = self._steps[stream]
        totals.attention_s += attention_s
        sums.attention_s += attention_s
        sums.typical &= spans.typical
        totals.other_s += max(0.0, spans.ended_s - spans.began_s - attention_s - spans.wait_s)
        if num_answered:
            self._exchanged(sums, num_answered, spans.wait_s, spans.ffn_s, spans.gang)
            totals.wait_s += spans.wait_s
            totals.exposed_s += spans.exposed_s
        totals.wait_s += spans.open_wait_s
        self._unanswered_s += spans.open_wait_s
        stages = partial(_layer_stages, spans, stream, leg.first_layer, batch.num_tokens, batch.step)
        self.ring.add_block(StageBlock(spans.ended_s, 1 + 2 * (spans.num_layers + num_answered), stages))
        if spans.open_wait_s:
            self.ring.add(Stage("wait", spans.ended_s, spans.ended_s + spans.open_wait_s))
        self._beside.discard(stream)
        self._idle_since_s = spans.ended_s

    def answered(self, sent_s: float, combined: Combined, layer: int, step: int) -> None:
        """One round trip that no leg has awaited; combined.compute_s of it was the FFN's computing."""
        now = self._clock()
        self._exchanged(self._steps[combined.stream], 1, now - sent_s, combined.compute_s, combined.gang)
        if self._unanswered_s:  # it came while another stage ran: what was waited before may have been for it
            self._covered(combined.compute_s)
        tokens, size, gang, epoch = combined.gang
        self.ring.add(Stage("exchange", sent_s, now, combined.stream, layer, tokens, step, gang, size, epoch))
        if combined.local:
            self.ring.add(Stage("ffn", now - combined.compute_s, now, combined.stream, layer, tokens, step))

    def launched(self, stream: int) -> None:
        """Something is computed for the stream beside this thread, until its leg is booked or it has `landed`."""
        self._beside.add(stream)

    def landed(self, stream: int) -> float:
        """What was launched for the stream, and is in no leg, is over: now."""
        self._beside.discard(stream)
        self._idle_since_s = self._clock()
        return self._idle_since_s

    def wait(self, begun_s: float, arrived: Sequence[Combined]) -> None:
        """Nothing was ready although work is in flight. What was computed here or beside meanwhile is no waiting."""
        if self._beside:
            return
        begun_s = max(begun_s, self._idle_since_s)
        local_s = sum(combined.compute_s for combined in arrived if combined.local)
        until_s = self._span(begun_s) - local_s
        self.totals.wait_s += until_s - begun_s
        self._unanswered_s += until_s - begun_s
        if arrived:
            self._covered(sum(combined.compute_s for combined in arrived))
        self.ring.add(Stage("wait", begun_s, until_s))

    def looked_ahead(self, current: MicroBatch, num_tokens: int, begun_s: float) -> None:
        """Inputs of the step after `current`, of so many tokens, were prepared while its rows were away.

        That takes no time of its own beside what was launched.
        """
        if self._beside:
            return
        begun_s = max(begun_s, self._idle_since_s)
        now = self._span(begun_s)
        self.totals.ahead_s += now - begun_s
        self.ring.add(Stage("look_ahead", begun_s, now, current.stream, -1, num_tokens, current.step))

    def combined(self, stream: int, batch: MicroBatch, layer: int, begun_s: float, combined_s: float) -> None:
        """The combine of the last layer, before the head."""
        self._span(begun_s, combined_s)
        self._steps[stream].head_s += combined_s - begun_s
        self.totals.head_s += combined_s - begun_s
        self.ring.add(Stage("combine", begun_s, combined_s, stream, layer, batch.num_tokens, batch.step))

    def head_slice(self, stream: int, batch: MicroBatch, begun_s: float) -> None:
        """A part of the head that others follow."""
        self._head("head_slice", stream, batch, begun_s)

    def finish(self, stream: int, batch: MicroBatch, begun_s: float, started_s: float, *, more: bool) -> None:
        """The rest of the head, sampling and commit; ends a step. more: work is left, in flight or to schedule."""
        now = self._head("head", stream, batch, begun_s)
        if not more:
            self._ended_s = None
        totals = self.totals
        totals.num_steps += 1
        load = StepLoad.of(batch)
        totals.num_tokens += batch.num_tokens
        totals.num_attended += load.context_tokens
        totals.num_sampled += batch.num_samples
        took_s = now - started_s
        self.step_s = took_s if self.step_s == 0.0 else (1 - EMA) * self.step_s + EMA * took_s
        sums = self._steps.pop(stream)
        totals.step_s += took_s
        totals.step_exposed_s += totals.exposed_s - sums.exposed_before_s
        if not sums.typical:
            return
        self._samples.append(
            StepSample(
                stream=stream,
                load=load,
                attention_s=sums.attention_s,
                head_s=sums.head_s,
                ffn_s=sums.ffn_s,
                exchange_s=sums.exchange_s,
                gang_tokens=sums.gang_tokens,
                took_s=took_s,
                in_flight=sums.among,
            )
        )

    def deliver(self) -> None:
        """Hand the samples of finished steps to the observer: called when nothing more urgent is there to do."""
        while self._samples:
            sample = self._samples.popleft()
            if self.observer is not None:
                self.observer(sample)

    def _exchanged(self, sums: _StepSums, number: int, took_s: float, ffn_s: float, gang: Gang) -> None:
        """So many round trips of one step, by what they took together."""
        totals = self.totals
        totals.exchange_s += took_s
        totals.ffn_s += ffn_s
        totals.num_exchanges += number
        totals.num_gang_members += number * gang.size
        sums.exchange_s += took_s
        sums.ffn_s += ffn_s
        sums.gang_tokens = gang.tokens

    def _head(self, name: str, stream: int, batch: MicroBatch, begun_s: float) -> float:
        now = self._span(begun_s)
        self._steps[stream].head_s += now - begun_s
        self.totals.head_s += now - begun_s
        self.ring.add(Stage(name, begun_s, now, stream, -1, batch.num_samples, batch.step))
        return now

    def reset(self) -> None:
        """The steps in flight were lost."""
        self._steps.clear()
        self._ended_s = None
        self._unanswered_s = 0.0
        self._beside.clear()

    def _span(self, begun_s: float, ended_s: float | None = None) -> float:
        """A stage or wait that began then has ended (None: now): when. What lies before it was something else."""
        if self._ended_s is not None:
            self.totals.other_s += begun_s - self._ended_s
        self._ended_s = self._clock() if ended_s is None else ended_s
        return self._ended_s

    def _covered(self, compute_s: float) -> None:
        """An answer has come: all of the waiting for it was exposed, but for the `compute_s` that the FFN computed."""
        self.totals.exposed_s += max(0.0, self._unanswered_s - compute_s)
        self._unanswered_s = 0.0


def _layer_stages(spans: Spans, stream: int, first_layer: int, num_tokens: int, step: int) -> Iterator[Stage]:
    tokens, size, gang, epoch = spans.gang
    for layer, (begun_s, entered_s, computed_s, posted_s, answered_s) in enumerate(spans.laps(), first_layer):
        if begun_s is not None:
            yield Stage("combine" if layer else "embed", begun_s, entered_s, stream, layer - 1, num_tokens, step)
        yield Stage("attention", entered_s, computed_s, stream, layer, num_tokens, step)
        yield Stage("dispatch", computed_s, posted_s, stream, layer, num_tokens, step)
        if answered_s is not None:
            yield Stage("wait", posted_s, answered_s)
            yield Stage("exchange", posted_s, answered_s, stream, layer, tokens, step, gang, size, epoch)
