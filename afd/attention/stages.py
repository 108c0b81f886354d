"""Where the attention worker's time goes: sums for metrics and admission, a ring for traces."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

from afd.attention.exchange import Combined
from afd.kernels.relay import Relayed
from afd.sched.latency import StepLoad, StepSample
from afd.sched.sequence import MicroBatch
from afd.telemetry.ring import Stage, StageBlock, TraceRing

MAX_SAMPLES = 16  # of steps that wait for `deliver`
EMA = 0.2  # weight of the newest step in moving averages


@dataclass(slots=True)
class StageTotals:
    """Seconds and counts since start. wait_s: waiting with work in flight (the bubble).

    exposed_s: of wait_s, what no FFN computed for this worker.  other_s: between stages while there is work:
    scheduling, publishing, events, and whatever the operating system does with the core.
    ahead_s: preparing next steps while rows are away.
    step_s, step_exposed_s: steps' durations, and what was exposed within them, summed over all streams' steps.
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
    num_exchanges: int = 0
    num_gang_members: int = 0  # summed over exchanges: / num_exchanges = mean gang size


@dataclass(slots=True)
class _StepSums:
    """Seconds of one stream's step so far.  among: streams at work at any time of it, itself included."""

    among: set[int]
    attention_s: float = 0.0
    head_s: float = 0.0
    exchange_s: float = 0.0
    ffn_s: float = 0.0
    gang_tokens: int = 0
    exposed_before_s: float = 0.0  # StageTotals.exposed_s when it began


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

    def attention(
        self, stream: int, layer: int, batch: MicroBatch, begun_s: float, entered_s: float, computed_s: float
    ) -> float:
        """One layer and its dispatch; until entered_s, combine (layer 0: embedding), if that is a call of its own."""
        now = self._span(begun_s)
        self.totals.attention_s += now - begun_s
        if layer == 0:
            self._begin(stream)
        self._steps[stream].attention_s += now - begun_s
        num_tokens, step, add = batch.num_tokens, batch.step, self.ring.add
        add(Stage("combine" if layer else "embed", begun_s, entered_s, stream, layer - 1, num_tokens, step))
        add(Stage("attention", entered_s, computed_s, stream, layer, num_tokens, step))
        add(Stage("dispatch", computed_s, now, stream, layer, num_tokens, step))
        return now

    def embedded(self, stream: int, batch: MicroBatch, begun_s: float, embedded_s: float) -> None:
        """The embedding of a step whose layers native code goes through, from 0 on."""
        self._span(begun_s, embedded_s)
        self._begin(stream)
        self.totals.attention_s += embedded_s - begun_s
        self._steps[stream].attention_s += embedded_s - begun_s
        self.ring.add(Stage("embed", begun_s, embedded_s, stream, -1, batch.num_tokens, batch.step))

    def relayed(self, stream: int, batch: MicroBatch, layer: int, done: Relayed, gang: Combined) -> None:
        """Layers from `layer` on that native code went through. gang: any exchange of this step; before the first
        answer of no account.
        """
        sums, totals, attention_s = self._steps[stream], self.totals, done.compute_s + done.post_s
        self._span(done.began_s, done.ended_s + done.open_wait_s)
        totals.attention_s += attention_s
        totals.exchange_s += done.wait_s
        totals.ffn_s += done.ffn_s
        totals.wait_s += done.wait_s + done.open_wait_s
        totals.exposed_s += done.exposed_s
        self._unanswered_s += done.open_wait_s
        totals.other_s += max(0.0, done.ended_s - done.began_s - attention_s - done.wait_s)
        totals.num_exchanges += done.num_answered
        totals.num_gang_members += done.num_answered * gang.gang_size
        sums.attention_s += attention_s
        sums.exchange_s += done.wait_s
        sums.ffn_s += done.ffn_s
        sums.gang_tokens = done.gang_tokens or sums.gang_tokens
        # Numbers only: a ring that kept answers would keep the memory they lie in.
        where = (gang.gang_id, gang.gang_size, gang.epoch)
        stages = partial(_relayed_stages, done, stream, layer, batch.num_tokens, batch.step, where)
        self.ring.add_block(StageBlock(done.ended_s, 2 * (done.num_laps + done.num_answered), stages))
        if done.open_wait_s:
            self.ring.add(Stage("wait", done.ended_s, done.ended_s + done.open_wait_s))

    def exchange(self, sent_s: float, combined: Combined, layer: int, step: int) -> None:
        """One round trip, seen from here; combined.compute_s of it was the FFN's computing."""
        now = self._clock()
        totals = self.totals
        totals.exchange_s += now - sent_s
        totals.ffn_s += combined.compute_s
        totals.num_exchanges += 1
        totals.num_gang_members += combined.gang_size
        if self._unanswered_s:  # it came while another stage ran: what was waited before may have been for it
            self._answered(combined.compute_s)
        sums = self._steps[combined.stream]
        sums.exchange_s += now - sent_s
        sums.ffn_s += combined.compute_s
        sums.gang_tokens = combined.gang_tokens
        tokens, gang, size, epoch = combined.gang_tokens, combined.gang_id, combined.gang_size, combined.epoch
        self.ring.add(Stage("exchange", sent_s, now, combined.stream, layer, tokens, step, gang, size, epoch))
        if combined.local:
            self.ring.add(Stage("ffn", now - combined.compute_s, now, combined.stream, layer, tokens, step))

    def wait(self, begun_s: float, arrived: Sequence[Combined]) -> None:
        """Nothing was ready although work is in flight. What was computed here meanwhile is no waiting."""
        local_s = sum(combined.compute_s for combined in arrived if combined.local)
        until_s = self._span(begun_s) - local_s
        self.totals.wait_s += until_s - begun_s
        self._unanswered_s += until_s - begun_s
        if arrived:
            self._answered(sum(combined.compute_s for combined in arrived))
        self.ring.add(Stage("wait", begun_s, until_s))

    def looked_ahead(self, current: MicroBatch, num_tokens: int, begun_s: float) -> None:
        """Inputs of the step after `current`, of so many tokens, were prepared while its rows were away."""
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
        totals.num_tokens += batch.num_tokens
        took_s = now - started_s
        self.step_s = took_s if self.step_s == 0.0 else (1 - EMA) * self.step_s + EMA * took_s
        sums = self._steps.pop(stream)
        totals.step_s += took_s
        totals.step_exposed_s += totals.exposed_s - sums.exposed_before_s
        if not self._representative(stream):
            return
        self._samples.append(
            StepSample(
                stream=stream,
                load=StepLoad.of(batch),
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

    def _begin(self, stream: int) -> None:
        self._steps[stream] = _StepSums(set(self._steps), exposed_before_s=self.totals.exposed_s)
        for sums in self._steps.values():
            sums.among.add(stream)

    def _representative(self, stream: int) -> bool:
        """Whether the step that has just ended there tells what others will take."""
        return True

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

    def _span(self, begun_s: float, ended_s: float | None = None) -> float:
        """A stage or wait that began then has ended (None: now): when. What lies before it was something else."""
        if self._ended_s is not None:
            self.totals.other_s += begun_s - self._ended_s
        self._ended_s = self._clock() if ended_s is None else ended_s
        return self._ended_s

    def _answered(self, compute_s: float) -> None:
        """Of the waiting since the last answer, the FFN computed this one's rows during the last `compute_s`."""
        self.totals.exposed_s += max(0.0, self._unanswered_s - compute_s)
        self._unanswered_s = 0.0


def _relayed_stages(
    done: Relayed, stream: int, layer: int, num_tokens: int, step: int, gang: tuple[int, int, int]
) -> Iterator[Stage]:
    times = zip_longest(*(column.tolist() for column in done.laps()))
    for idx, (begun_s, computed_s, posted_s, answered_s) in enumerate(times, layer):
        yield Stage("attention", begun_s, computed_s, stream, idx, num_tokens, step)
        yield Stage("dispatch", computed_s, posted_s, stream, idx, num_tokens, step)
        if answered_s is not None:
            yield Stage("wait", posted_s, answered_s)
            yield Stage("exchange", posted_s, answered_s, stream, idx, done.gang_tokens, step, *gang)
