"""The attention worker's stream loop: which stream runs next, one stage at a time. No socket, no thread.

A stage is a leg of a step (`afd.attention.path`: add the combine of layer l, run attention of layer l+1, dispatch; the
first one embeds) or a slice of its head; the last one samples and commits. The loop is ready-driven: of the streams
whose combine has arrived, the oldest runs; while one stream's rows are at the FFN, the worker computes another.
"""

from __future__ import annotations

import time
from collections import abc, deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from afd.attention.exchange import Combined
from afd.attention.head import Head, keeps_logits
from afd.attention.look_ahead import LookAhead
from afd.attention.path import Fetch, LayerPath, Leg, Step
from afd.attention.stages import StageClock
from afd.messages.serving import TokenLogprobs
from afd.model.halves import AttentionBatch, AttentionHalf
from afd.model.sampling import Sampler
from afd.ops.device import to_device
from afd.ops.ops import RowMax
from afd.sched.head_slices import NextStage, next_of, slice_end
from afd.sched.scheduler import Scheduler
from afd.sched.sequence import BatchItem, MicroBatch, Output, Progress
from afd.types import FinishReason
from afd.worker.threads import ThreadShare

NOT_FINITE = "the model produced logits that are not finite: its weights are damaged or overflow in this dtype"


class Engine(Protocol):
    """What the worker's loop drives. Main thread only."""

    scheduler: Scheduler
    stages: StageClock

    @property
    def in_flight(self) -> bool:
        """True while a micro-batch is being computed anywhere."""

    def run_once(self, timeout_s: float) -> list[Output]:
        """Go on by one stage, waiting up to `timeout_s` for it; what a commit brought. PeerLostError: call `fail`."""

    def fail(self) -> None:
        """Nothing in flight is booked; its sequences stay where they were."""


class AttentionEngine:
    """Drives `num_streams` micro-batches through the layers. Main thread only, which holds torch.inference_mode()."""

    def __init__(
        self,
        half: AttentionHalf,
        scheduler: Scheduler,
        path: LayerPath,
        *,
        threads: ThreadShare | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._half = half
        self.scheduler = scheduler
        self._path = path
        self._threads = threads
        self._sampler = Sampler(half.ops)
        self._num_layers = half.spec.num_layers
        self._steps: dict[int, Step] = {}  # by stream
        self._heads: dict[int, Head] = {}  # by stream: of steps whose layers are done
        self._fetches: dict[int, Fetch] = {}  # by stream: of heads that are done
        self._ready: deque[tuple[int, Combined | None]] = deque()
        self._announced_idle: set[int] = set()
        self._look_ahead = LookAhead(scheduler, self._batch_of)
        self._logits: dict[int, Tensor] = {}  # by stream
        self._clock = clock
        self.stages = StageClock(clock)

    @property
    def in_flight(self) -> bool:
        """True while a micro-batch is being computed anywhere."""
        return bool(self._steps)

    def run_once(self, timeout_s: float) -> list[Output]:
        """Start what can start, then run one ready stage, waiting up to `timeout_s` for it. PeerLostError: `fail`."""
        for idx, fetch in self._fetches.items():
            if fetch.done():
                return self._finish_fetched(idx)
        self._start_streams()
        for combined in self._arrivals(timeout_s):
            step = self._steps[combined.stream]
            self.stages.answered(step.sent_s, combined, step.layer, step.micro_batch.step)
            self._ready.append((combined.stream, combined))
        if not self._ready:
            return []
        idx, answer = self._next_ready()
        if self._threads is not None:
            self._threads.use(alone=len(self._steps) == 1)
        with self._path.stage(idx):
            return self._advance(idx, answer)

    def _arrivals(self, timeout_s: float) -> list[Combined]:
        """Answers that are there; where nothing is ready, those that come within `timeout_s`."""
        if self._ready:
            return self._poll(0.0)
        batches = (step.micro_batch for step in self._steps.values())
        unprepared = next((batch for batch in batches if not self._look_ahead.has_seen(batch)), None)
        arrived: list[Combined] = []
        begun_s = self._clock()
        if unprepared is not None:
            arrived = self._poll(0.0)
            if not arrived:
                self._prepare(unprepared)
                begun_s = self._clock()
        if not arrived:
            arrived = self._poll(timeout_s)
        if self._steps:
            self.stages.wait(begun_s, arrived)
        return arrived

    def _poll(self, timeout_s: float) -> list[Combined]:
        arrived = self._path.poll(timeout_s)
        for leg in self._path.finished():
            self._book(self._steps[leg.stream], leg)
        return arrived

    def _next_ready(self) -> tuple[int, Combined | None]:
        """Take the stage to run next out of those that are ready."""
        ready = self._ready
        if len(ready) > 1 and (place := next_of([self._next_stage(idx) for idx, _ in ready])):
            chosen = ready[place]
            del ready[place]
            return chosen
        return ready.popleft()

    def _next_stage(self, idx: int) -> NextStage:
        if idx in self._heads:
            return NextStage.HEAD_GOES_ON
        return NextStage.HEAD_BEGINS if self._steps[idx].layer + 1 == self._num_layers else NextStage.LAYER

    def fail(self) -> None:
        """The FFN side lost a rank: nothing in flight is booked; its sequences stay where they were."""
        self._path.cancel()
        self._ready.clear()
        self._heads.clear()
        self._fetches.clear()
        for step in self._steps.values():
            self.scheduler.fail_stream(step.micro_batch)
        self._steps.clear()
        self.stages.reset()
        self._announced_idle.clear()
        self._look_ahead.reset()

    # -- stages -------------------------------------------------------------------------------------------

    def _start_streams(self) -> None:
        """Give every empty stream its next micro-batch; tell the FFN side of streams that have none."""
        if not self._path.ready:
            return
        for idx in range(self.scheduler.num_slots):  # closed streams too, so that the FFN side does not wait for them
            if idx in self._steps:
                continue
            micro_batch = self.scheduler.schedule(idx)
            if micro_batch is None:
                if idx not in self._announced_idle:
                    self._announced_idle.add(idx)
                    self._path.idle(idx)
                continue
            self._announced_idle.discard(idx)
            self._steps[idx] = Step(micro_batch, self._look_ahead.batch(micro_batch), started_s=self._clock())
            self._ready.append((idx, None))

    def _prepare(self, current: MicroBatch) -> None:
        """All that can be known of the step after `current`, whose rows are away."""
        begun_s = self._clock()
        if num_tokens := self._look_ahead.prepare(current):
            self.stages.looked_ahead(current, num_tokens, begun_s)

    def _batch_of(self, idx: int, items: abc.Sequence[BatchItem]) -> AttentionBatch:
        """What the kernels need to know of them."""
        with self._path.stage(idx):
            batch = AttentionBatch.build(
                [(item.start, item.num_new, item.seq.blocks) for item in items],
                self.scheduler.pool.block_size,
                self._half.device,
                window_blocks=None if self.scheduler.windowed is None else [item.seq.window_blocks for item in items],
            )
            self._half.prepare(batch)
        return batch

    def _advance(self, idx: int, answer: Combined | None) -> list[Output]:
        """The step's next leg; behind its last layer the head."""
        if idx in self._heads:
            return self._advance_head(idx, self._clock())
        step = self._steps[idx]
        step.alone = len(self._steps) == 1
        if answer is None:
            leg = self._path.begin(step, [token for item in step.micro_batch.items for token in _new_tokens(item)])
        elif step.layer + 1 < self._num_layers:
            leg = self._path.resume(step, answer)
        else:
            return self._end_layers(idx, step, answer)
        if leg is None:
            self.stages.launched(idx)
            return []
        self._book(step, leg)
        if leg.answer is None:
            return []
        if leg.last_layer + 1 == self._num_layers:
            return self._end_layers(idx, step, leg.answer)
        self._ready.append((idx, leg.answer))  # the caller's other duties first: a leg may have taken long
        return []

    def _book(self, step: Step, leg: Leg) -> None:
        self.stages.book(step.micro_batch, leg)
        step.layer, step.sent_s = leg.last_layer, leg.spans.ended_s

    def _end_layers(self, idx: int, step: Step, answer: Combined) -> list[Output]:
        """Add the last layer's answer, and begin with the head."""
        begun_s = self._clock()
        self._path.end(step, answer)
        entered_s = self._clock()
        if not self._path.launches:  # else it is part of the head
            self.stages.combined(idx, step.micro_batch, self._num_layers - 1, begun_s, entered_s)
        self._heads[idx] = self._head_of(step)
        return self._advance_head(idx, entered_s)

    def _head_of(self, step: Step) -> Head:
        seqs, rows, end = [], [], 0
        for item in step.micro_batch.items:
            end += item.num_new
            if item.samples and item.seq.doomed is None:
                seqs.append(item.seq)
                rows.append(end - 1)
        x = step.x
        if len(rows) < end:
            x = x[to_device(torch.tensor(rows, dtype=torch.int64), self._half.device)]
        normed = self._half.head_rows(x)
        if keeps_logits(seqs):
            return Head(seqs, normed, self._logits_of(step.stream, len(seqs)))
        return Head(seqs, normed, RowMax.of_nothing(len(seqs), self._half.device))

    def _logits_of(self, stream: int, num_rows: int) -> Tensor:
        """Room for a head's logits [num_rows, vocab] float32: kept, as fresh memory costs page faults."""
        room = self._logits.get(stream)
        if room is None or room.shape[0] < num_rows:
            width = self._half.spec.vocab_size
            room = torch.empty(num_rows, width, dtype=torch.float32, device=self._half.device)
            self._logits[stream] = room
        return room[:num_rows]

    def _advance_head(self, idx: int, begun_s: float) -> list[Output]:
        """The logits until rows of another stream are back, or else all of them; then sampling and commit."""
        head, vocab = self._heads[idx], self._half.spec.vocab_size
        alone = len(self._steps) == 1 or self._path.launches  # a launch delays nobody
        while head.seqs and head.done < vocab:
            head.advance(self._half, slice_end(head.done, vocab, len(head.seqs), alone=alone))
            if head.done < vocab and self._path.has_news():
                self.stages.head_slice(idx, self._steps[idx].micro_batch, begun_s)
                self._ready.append((idx, None))
                return []
        fetch = self._path.fetch(idx, head.results) if head.seqs else None
        if fetch is None:
            return self._finish(idx, begun_s, head.results)
        self._fetches[idx] = fetch
        self.stages.launched(idx)
        return []

    def _finish_fetched(self, idx: int) -> list[Output]:
        fetch = self._fetches.pop(idx)
        return self._finish(idx, self.stages.landed(idx) - fetch.device_s, fetch.tensors)

    def _finish(self, idx: int, begun_s: float, results: abc.Sequence[Tensor]) -> list[Output]:
        """Sample and commit.

        begun_s: when what is left of the head began.
        results: the head's, on the host.
        """
        step, head = self._steps.pop(idx), self._heads.pop(idx)
        sampled, failed = self._sample(head, results)
        progress = self.scheduler.commit(step.micro_batch, {req_id: token for req_id, (token, _) in sampled.items()})
        more = not self.scheduler.idle
        self.stages.finish(idx, step.micro_batch, begun_s, started_s=step.started_s, more=more)
        return [Output(p, sampled[p.seq.req_id][1]) for p in progress] + failed

    def _sample(
        self, head: Head, results: abc.Sequence[Tensor]
    ) -> tuple[dict[str, tuple[int, TokenLogprobs | None]], list[Output]]:
        """(token, logprobs) by request id; and the requests that end here because their logits are not finite."""
        seqs = head.seqs
        if not seqs:
            return {}, []
        result = head.sample(self._sampler, results)
        failed = []
        for row in result.invalid:
            seq = seqs[row]
            self.scheduler.abort(seq.req_id, FinishReason.ERROR)
            failed.append(Output(Progress(seq, seq.num_output, (), FinishReason.ERROR), None, NOT_FINITE))
        sampled = {
            seq.req_id: (token, _logprobs(entry))
            for seq, token, entry in zip(seqs, result.ids, result.logprobs, strict=True)
            if seq.doomed is None
        }
        return sampled, failed


def _new_tokens(item: BatchItem) -> abc.Sequence[int]:
    return item.seq.tokens[item.start : item.start + item.num_new]


def _logprobs(entry: tuple[float, list[tuple[int, float]]] | None) -> TokenLogprobs | None:
    return None if entry is None else TokenLogprobs(entry[0], entry[1])
