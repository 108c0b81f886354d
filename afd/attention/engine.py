"""The attention worker's stream loop: which stream runs next, one stage at a time. No socket, no thread.

A stage is: add the combine of layer l, run attention of layer l+1, dispatch (the first stage embeds; the last ones are
slices of the head, then sampling and commit). The loop is ready-driven: of the streams whose combine has arrived, the
oldest runs; while one stream's rows are at the FFN, the worker computes another.
"""

from __future__ import annotations

import time
from collections import abc, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from afd.attention.exchange import Combined, Exchange
from afd.attention.head import Head, keeps_logits
from afd.attention.look_ahead import LookAhead
from afd.attention.relay import StreamRelay
from afd.attention.stages import StageClock
from afd.kernels import RowMax
from afd.kv.cache import KVCache
from afd.messages.serving import TokenLogprobs
from afd.model.device import to_device
from afd.model.halves import AttentionBatch, AttentionHalf, Dispatch
from afd.model.sampling import Sampler
from afd.sched.head_slices import NextStage, next_of, slice_end
from afd.sched.scheduler import Scheduler
from afd.sched.sequence import BatchItem, MicroBatch, Progress
from afd.types import FinishReason
from afd.worker.threads import ThreadShare

NOT_FINITE = "the model produced logits that are not finite: its weights are damaged or overflow in this dtype"


@dataclass(slots=True)
class Stream:
    """A place in the pipeline and the micro-batch in it. layer: the one whose FFN answer is awaited; -1 = not begun."""

    micro_batch: MicroBatch
    batch: AttentionBatch
    layer: int = -1
    x: Tensor | None = None  # residual [num_tokens, hidden]; untouched until all partials are in
    head: Head | None = None
    relays: bool = True  # its layers may go on in native code
    started_s: float = 0.0
    sent_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Output:
    """One sequence's news after a commit, with log-probabilities where asked for."""

    progress: Progress
    logprobs: TokenLogprobs | None
    error: str | None = None


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
        cache: KVCache,
        scheduler: Scheduler,
        exchange: Exchange,
        *,
        threads: ThreadShare | None = None,
        relay: StreamRelay | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._half = half
        self._cache = cache
        self.scheduler = scheduler
        self._exchange = exchange
        self._threads = threads
        self._relay = relay
        self._sampler = Sampler()
        self._num_layers = half.spec.num_layers
        self._streams: dict[int, Stream] = {}
        self._ready: deque[tuple[int, Combined | None]] = deque()
        self._announced_idle: set[int] = set()
        self._look_ahead = LookAhead(scheduler, self._batch_of)
        self._logits: dict[int, Tensor] = {}  # by stream
        self._slices_heads = True
        self._clock = clock
        self.stages = StageClock(clock)

    @property
    def in_flight(self) -> bool:
        """True while a micro-batch is being computed anywhere."""
        return bool(self._streams)

    def run_once(self, timeout_s: float) -> list[Output]:
        """Start what can start, then run one ready stage, waiting up to `timeout_s` for it. PeerLostError: `fail`."""
        self._start_streams()
        for combined in self._arrivals(timeout_s):
            stream = self._streams[combined.stream]
            self.stages.exchange(stream.sent_s, combined, stream.layer, stream.micro_batch.step)
            self._ready.append((combined.stream, combined))
        if not self._ready:
            return []
        return self._advance(*self._next_ready())

    def _arrivals(self, timeout_s: float) -> list[Combined]:
        """Answers that are there; where nothing is ready, those that come within `timeout_s`."""
        if self._ready:
            return self._exchange.poll(0.0)
        batches = (stream.micro_batch for stream in self._streams.values())
        unprepared = next((batch for batch in batches if not self._look_ahead.has_seen(batch)), None)
        arrived: list[Combined] = []
        begun_s = self._clock()
        if unprepared is not None:
            arrived = self._exchange.poll(0.0)
            if not arrived:
                self._prepare(unprepared)
                begun_s = self._clock()
        if not arrived:
            arrived = self._exchange.poll(timeout_s)
        if self._streams:
            self.stages.wait(begun_s, arrived)
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
        stream = self._streams[idx]
        if stream.head is not None:
            return NextStage.HEAD_GOES_ON
        return NextStage.HEAD_BEGINS if stream.layer + 1 == self._num_layers else NextStage.LAYER

    def fail(self) -> None:
        """The FFN side lost a rank: nothing in flight is booked; its sequences stay where they were."""
        self._exchange.cancel()
        self._ready.clear()
        for stream in self._streams.values():
            self.scheduler.fail_stream(stream.micro_batch)
        self._streams.clear()
        self.stages.reset()
        self._announced_idle.clear()
        self._look_ahead.reset()

    # -- stages -------------------------------------------------------------------------------------------

    def _start_streams(self) -> None:
        """Give every empty stream its next micro-batch; tell the FFN side of streams that have none."""
        if not self._exchange.ready:
            return
        for idx in range(self.scheduler.num_slots):  # closed streams too: the FFN side shall not wait for them
            if idx in self._streams:
                continue
            micro_batch = self.scheduler.schedule(idx)
            if micro_batch is None:
                if idx not in self._announced_idle:
                    self._announced_idle.add(idx)
                    self._exchange.idle(idx)
                continue
            self._announced_idle.discard(idx)
            self._streams[idx] = Stream(micro_batch, self._look_ahead.batch(micro_batch), started_s=self._clock())
            self._ready.append((idx, None))

    def _prepare(self, current: MicroBatch) -> None:
        """All that can be known of the step after `current`, whose rows are away."""
        begun_s = self._clock()
        if num_tokens := self._look_ahead.prepare(current):
            self.stages.looked_ahead(current, num_tokens, begun_s)

    def _batch_of(self, idx: int, items: abc.Sequence[BatchItem]) -> AttentionBatch:
        """What the kernels need to know of them."""
        batch = AttentionBatch.build(
            [(item.start, item.num_new, item.seq.blocks) for item in items],
            self._cache.block_size,
            self._half.device,
            window_blocks=None if self.scheduler.windowed is None else [item.seq.window_blocks for item in items],
        )
        self._half.prepare(batch)
        return batch

    def _advance(self, idx: int, combined: Combined | None) -> list[Output]:
        stream = self._streams[idx]
        if self._threads is not None:
            self._threads.use(alone=len(self._streams) == 1)
        begun_s = self._clock()
        if stream.head is not None:
            return self._advance_head(idx, begun_s)
        if combined is not None and self._relay is not None and stream.relays and len(self._streams) == 1:
            combined = self._relayed(idx, stream, combined, self._relay)
            if combined is None:
                return []
            begun_s = self._clock()
        stream.layer += 1
        is_last = stream.layer == self._num_layers
        partials: abc.Sequence[Tensor] = ()
        if combined is None:
            tokens = [t for item in stream.micro_batch.items for t in _new_tokens(item)]
            stream.x = self._half.embed(self._indices(tokens))
            if self._relay is not None and len(self._streams) == 1 and self._begin(idx, stream, self._relay, begun_s):
                return []
        elif combined.row_idx is None and not is_last:
            partials = combined.partials  # the layer adds them
        else:
            assert stream.x is not None
            self._half.combine(stream.x, combined.partials, combined.row_idx)
        entered_s = self._clock()
        if is_last:
            self.stages.combined(idx, stream.micro_batch, self._num_layers - 1, begun_s, entered_s)
            self._begin_head(stream)
            return self._advance_head(idx, entered_s)
        assert stream.x is not None
        dispatch = self._layer(idx, stream, stream.x, partials)
        computed_s = self._clock()
        self._exchange.send(idx, stream.micro_batch.step, dispatch)
        stream.sent_s = self.stages.attention(idx, stream.layer, stream.micro_batch, begun_s, entered_s, computed_s)
        return []

    def _layer(self, idx: int, stream: Stream, x: Tensor, partials: abc.Sequence[Tensor]) -> Dispatch:
        return self._half.layer(stream.layer, x, stream.batch, self._cache, partials)

    def _begin(self, idx: int, stream: Stream, relay: StreamRelay, begun_s: float) -> bool:
        """Layer 0 in native code, if that can; begun_s: when the embedding was."""
        assert stream.x is not None
        embedded_s, micro_batch = self._clock(), stream.micro_batch
        done = relay.begin(idx, micro_batch.step, stream.x, stream.batch)
        if done is None:
            return False
        self.stages.embedded(idx, micro_batch, begun_s, embedded_s)
        self.stages.relayed(idx, micro_batch, 0, done, Combined(idx, ()))
        stream.layer, stream.sent_s = 0, done.ended_s
        return True

    def _relayed(self, idx: int, stream: Stream, combined: Combined, relay: StreamRelay) -> Combined | None:
        """The layers behind `combined` as far as native code goes through them: the last one's answer, None if it is
        still to come."""
        assert stream.x is not None
        relayed = relay.run(idx, stream.layer + 1, stream.x, stream.batch)
        if relayed is None:
            return combined
        done, answer = relayed
        stream.relays = done.on_time
        self.stages.relayed(idx, stream.micro_batch, stream.layer + 1, done, answer or combined)
        stream.sent_s = done.ended_s  # of the last dispatch, if its answer is still to come
        stream.layer += done.num_laps
        return answer

    def _begin_head(self, stream: Stream) -> None:
        seqs, rows, end = [], [], 0
        for item in stream.micro_batch.items:
            end += item.num_new
            if item.samples and item.seq.doomed is None:
                seqs.append(item.seq)
                rows.append(end - 1)
        assert stream.x is not None
        x = stream.x if len(rows) == end else stream.x[self._indices(rows)]
        normed = self._half.head_rows(x)
        if keeps_logits(seqs):
            stream.head = Head(seqs, normed, self._logits_of(stream.micro_batch.stream, len(seqs)))
        else:
            stream.head = Head(seqs, normed, RowMax.of_nothing(len(seqs), self._half.device))

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
        stream = self._streams[idx]
        head, vocab = stream.head, self._half.spec.vocab_size
        assert head is not None
        alone = len(self._streams) == 1 or not self._slices_heads
        while head.seqs and head.done < vocab:
            head.advance(self._half, slice_end(head.done, vocab, len(head.seqs), alone=alone))
            if head.done < vocab and self._exchange.has_news():
                self.stages.head_slice(idx, stream.micro_batch, begun_s)
                self._ready.append((idx, None))
                return []
        return self._finish(idx, head, begun_s)

    def _finish(self, idx: int, head: Head, begun_s: float) -> list[Output]:
        """Sampling and commit."""
        stream = self._streams.pop(idx)
        sampled, failed = self._sample(head)
        progress = self.scheduler.commit(stream.micro_batch, {req_id: token for req_id, (token, _) in sampled.items()})
        more = not self.scheduler.idle
        self.stages.finish(idx, stream.micro_batch, begun_s, started_s=stream.started_s, more=more)
        return [Output(p, sampled[p.seq.req_id][1]) for p in progress] + failed

    def _indices(self, values: list[int]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.int64), self._half.device)

    def _sample(self, head: Head) -> tuple[dict[str, tuple[int, TokenLogprobs | None]], list[Output]]:
        """(token, logprobs) by request id; and the requests that end here because their logits are not finite."""
        seqs = head.seqs
        if not seqs:
            return {}, []
        result = head.sample(self._sampler)
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
