"""An attention worker without tensors and sockets: the service's scheduler, admission, latency model, stream choice.

It stands in for `afd.attention.worker` and `afd.attention.requests`; when a step's stages run is the `DataPath`'s part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from afd.kv.block_pool import BlockPool
from afd.messages.serving import (
    Abort,
    GatewayMessage,
    Refused,
    Resend,
    Submit,
    TokenChunk,
    Tokens,
    WorkerMessage,
    WorkerStats,
)
from afd.sched.latency import LatencyModel, StepLoad, StepSample
from afd.sched.policy import Admission, Policy
from afd.sched.prefill import PrefillBudget
from afd.sched.scheduler import Scheduler
from afd.sched.sequence import MicroBatch, Progress, Sequence
from afd.sched.streams import StreamChooser
from afd.sched.submission import admit
from afd.simulate.results import Results
from afd.simulate.settings import Settings
from afd.simulate.times import StepTimes
from afd.types import FinishReason

STOP_TOKEN = 1
WORD_TOKEN = 0
FLUSH_S = 2.0  # longest that tokens between the first and the last one are kept back; the gateway asks after 5 s


@dataclass(slots=True, eq=False)
class Step:
    """One micro-batch on its way.

    attention_s, to_ffn_s, to_attention_s: of one layer.
    head_s: of the step.
    layer: the one whose answer is awaited; -1 = none yet.
    missing: FFN ranks that have not answered it.
    exchange_s, ffn_s: summed over layers so far.
    head_rows: of the vocabulary, whose logits are there.
    void: lost with a worker; nothing of it counts.
    """

    worker: AttentionWorker
    batch: MicroBatch
    load: StepLoad
    started_s: float
    attention_s: float
    head_s: float
    to_ffn_s: float = 0.0
    to_attention_s: float = 0.0
    layer: int = -1
    gang_id: int = 0
    mask: int = 0
    gang_tokens: int = 0
    missing: int = 0
    sent_s: float = 0.0
    exchange_s: float = 0.0
    ffn_s: float = 0.0
    head_rows: int = 0
    void: bool = False
    stream: int = field(init=False)
    num_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.stream, self.num_tokens = self.batch.stream, self.batch.num_tokens

    def meet(self, gang_tokens: int, times: StepTimes) -> None:
        """Join a gang of so many rows: the rows of the stream's last gang, until its own are known."""
        gang_tokens = max(gang_tokens, self.num_tokens)
        if gang_tokens == self.gang_tokens:
            return
        self.gang_tokens = gang_tokens
        self.to_ffn_s, self.to_attention_s = times.transfer_s(self.num_tokens, self.gang_tokens)


class DataPath(Protocol):
    """The way of steps through the layers. It keeps the FFN ranks' tables."""

    def wake(self, worker: AttentionWorker) -> None:
        """The worker may have something to start."""

    def lose_attention(self, worker: AttentionWorker) -> None:
        """An attention worker is gone; its steps are void already."""

    def lose_ffn(self) -> None:
        """An FFN rank is gone; every step is void already."""


class AttentionWorker:
    """An attention worker without tensors.

    say: sends a message to the gateway.
    ready: every FFN rank is there.
    targets: output tokens of each live request, by which its stop token is sampled.
    """

    def __init__(
        self,
        key: str,
        rank: int,
        settings: Settings,
        targets: Mapping[str, int],
        results: Results,
        say: Callable[[WorkerMessage], None],
    ):
        self.key = key
        self.rank = rank
        self.ready = True
        self.alive = True
        self.latency = LatencyModel()
        self.scheduler = Scheduler(
            replace(settings.scheduler, first_stream=rank),
            BlockPool(settings.num_blocks, settings.block_size, prefix_cache=False),
            PrefillBudget(self.latency) if settings.policy == "enforce" else None,
        )
        # Observing admits everything, as "off" does; its forecasts would cost much and change nothing.
        policy: Policy = "enforce" if settings.policy == "enforce" else "off"
        self.admission = Admission(
            self.scheduler, self.latency, policy=policy, tpot_s=settings.tpot_s, ttft_s=settings.ttft_s
        )
        self._settings = settings
        self._times = settings.times
        self._chooser = StreamChooser(self.latency) if settings.auto_streams else None
        self._targets = targets
        self._results = results
        self._say = say
        self._learns = policy == "enforce" or self._chooser is not None
        self._num_arrivals = 0
        self._words: dict[str, int] = {}  # what live requests sample when nothing depends on it
        self._sent: dict[str, int] = {}  # output tokens that the gateway has, by request; -1 = none of this attempt
        self._gang_tokens: dict[int, int] = {}  # of each stream's last gang
        self._flushed_at = 0.0
        self.flying: dict[int, Step] = {}  # by stream
        self.announced_idle: set[int] = set()
        self.num_steps = 0

    # -- messages -----------------------------------------------------------------------------------------

    def handle(self, message: GatewayMessage, now: float) -> None:
        """One message of the gateway."""
        if not self.alive:
            return
        if isinstance(message, Submit):
            self._submit(message, now)
        elif isinstance(message, Abort):
            for req_id in message.req_ids:
                self._drop(req_id)
        elif isinstance(message, Resend):
            self._resend(message)

    def report(self, now: float) -> None:
        """Load to the gateway; and what it waits for, before it asks."""
        if now - self._flushed_at >= FLUSH_S:
            self.flush()
            self._flushed_at = now
        scheduler, outlook = self.scheduler, self.admission.outlook()
        self._say(
            WorkerStats(
                rank=self.rank,
                num_running=scheduler.num_running,
                num_waiting=scheduler.num_waiting,
                kv_blocks_total=scheduler.pool.num_blocks,
                kv_blocks_free=scheduler.pool.num_free,
                places_s=list(outlook.places_s),
                prefill_token_s=outlook.prefill_token_s,
                num_preemptions=scheduler.num_preemptions,
            )
        )

    def flush(self) -> None:
        """Send the tokens that were kept back (the real worker sends each at once)."""
        chunks = [
            self._chunk(seq, None)
            for seq in self.scheduler.sequences()
            if 0 <= self._sent.get(seq.req_id, -1) < seq.num_output
        ]
        if chunks:
            self._say(Tokens(chunks))

    def fail_all(self, error: str) -> None:
        """End every request with an error: nothing is in flight."""
        chunks = []
        for seq in self.scheduler.sequences():
            chunks.append(self._chunk(seq, FinishReason.ERROR, error))
            self.scheduler.abort(seq.req_id, FinishReason.ERROR)
            self._forget(seq.req_id)
        if chunks:
            self._say(Tokens(chunks))

    # -- steps --------------------------------------------------------------------------------------------

    def begin_steps(self, now: float, idle: Callable[[int], None]) -> list[Step]:
        """A micro-batch for every empty stream that has work; `idle` hears of those that have none."""
        begun: list[Step] = []
        if not self.ready or not self.alive:
            return begun
        for stream in range(self.scheduler.num_slots):
            if stream in self.flying:
                continue
            batch = self.scheduler.schedule(stream)
            if batch is None:
                if stream not in self.announced_idle:
                    self.announced_idle.add(stream)
                    idle(stream)
                continue
            self.announced_idle.discard(stream)
            load = StepLoad.of(batch)
            step = Step(self, batch, load, now, self._times.attention_s(load), self._times.head_s(load.num_samples))
            step.meet(self._gang_tokens.get(stream, 0), self._times)
            if not self.flying:
                self._results.took_off(self.rank, now)
            self.flying[stream] = step
            begun.append(step)
        return begun

    def finish(self, step: Step, now: float) -> None:
        """A step's head has run: book it and tell the gateway."""
        del self.flying[step.stream]
        if not self.flying:
            self._results.landed(self.rank, now)
        self._gang_tokens[step.stream] = step.gang_tokens
        took_s = now - step.started_s
        self.num_steps += 1
        progress = self.scheduler.commit(step.batch, self._sampled(step.batch))
        if self._learns:
            self.latency.observe(
                StepSample(
                    stream=step.stream,
                    load=step.load,
                    attention_s=self._times.num_layers * step.attention_s,
                    head_s=step.head_s,
                    ffn_s=step.ffn_s,
                    exchange_s=step.exchange_s,
                    gang_tokens=step.gang_tokens,
                    took_s=took_s,
                    in_flight=(step.stream, *self.flying),
                )
            )
        self._publish(progress)
        self._choose_streams()

    def fail(self, now: float) -> None:
        """Nothing in flight is booked; its sequences run the step again."""
        if self.flying:
            self._results.landed(self.rank, now)
        for step in self.flying.values():
            step.void = True
            self.scheduler.fail_stream(step.batch)
        self.flying.clear()
        self.announced_idle.clear()

    # -- details ------------------------------------------------------------------------------------------

    def _submit(self, message: Submit, now: float) -> None:
        known = self.scheduler.get(message.req_id)
        if known is not None:
            if known.attempt >= message.attempt:
                return
            self._drop(message.req_id)
        reason, detail = self._fault(message)
        if reason:
            self._say(Refused(message.req_id, message.attempt, reason, detail))
            return
        self._num_arrivals += 1
        answer = admit(message, self.admission, owner=b"", arrival=self._num_arrivals, now=now)
        if isinstance(answer, Refused):
            self._say(answer)
            return
        self._sent[message.req_id] = -1
        self._words[message.req_id] = WORD_TOKEN
        self.scheduler.add(answer)

    def _fault(self, message: Submit) -> tuple[str, str]:
        """Why it is not taken, whatever admission says: (reason, detail), or ("", "")."""
        if not self.ready:
            return "not_ready", "an FFN worker is lost"
        if self.scheduler.num_waiting >= self._settings.max_waiting:
            return "capacity", f"{self._settings.max_waiting} requests wait already"
        never = self.scheduler.refusal(len(message.prompt_ids), message.sampling.max_tokens)
        return ("invalid", never) if never else ("", "")

    def _sampled(self, batch: MicroBatch) -> Mapping[str, int]:
        """The stop token where an answer is complete; length-limited ones end by themselves."""
        if not self._settings.stops_early:
            return self._words
        return {
            item.seq.req_id: STOP_TOKEN if item.seq.num_output + 1 >= self._targets[item.seq.req_id] else WORD_TOKEN
            for item in batch.items
            if item.samples and item.seq.doomed is None
        }

    def _publish(self, progress: Iterable[Progress]) -> None:
        """First and last tokens leave at once; those between are kept back, which nobody can tell."""
        chunks = []
        for item in progress:
            if item.finish is not None:
                self.admission.finished(item.seq)
                chunks.append(self._chunk(item.seq, item.finish))
                self._forget(item.seq.req_id)
            elif self._sent[item.seq.req_id] < 0:
                chunks.append(self._chunk(item.seq, None))
        if chunks:
            self._say(Tokens(chunks))

    def _chunk(self, seq: Sequence, finish: FinishReason | None, error: str | None = None) -> TokenChunk:
        """All tokens that the gateway does not have."""
        first_idx = self._sent.get(seq.req_id, -1)
        if first_idx < 0:  # the first token of this attempt is the newest
            first_idx = max(0, seq.num_output - 1)
        self._sent[seq.req_id] = seq.num_output
        ids = seq.tokens[seq.num_prompt + first_idx :]
        return TokenChunk(
            seq.req_id, seq.attempt, first_idx, ids, finish=finish, error=error, preempted=seq.num_preempted
        )

    def _resend(self, message: Resend) -> None:
        seq = self.scheduler.get(message.req_id)
        if seq is None or seq.attempt != message.attempt:
            self._say(Refused(message.req_id, message.attempt, "unknown", "the worker does not know this attempt"))
            return
        if self._sent[message.req_id] >= 0:
            self._sent[message.req_id] = message.from_idx
            self._say(Tokens([self._chunk(seq, None)]))

    def _drop(self, req_id: str) -> None:
        self.scheduler.abort(req_id)
        self._forget(req_id)

    def _forget(self, req_id: str) -> None:
        self._sent.pop(req_id, None)
        self._words.pop(req_id, None)

    def _choose_streams(self) -> None:
        chooser, scheduler = self._chooser, self.scheduler
        if chooser is None or not chooser.due(self.num_steps):
            return
        limit, current = self._settings.auto_streams, scheduler.num_streams
        chosen = chooser.choose(self.num_steps, current, limit, scheduler.num_running, scheduler.full_step())
        if chosen != current:
            scheduler.set_num_streams(chosen)
