"""An attention worker without tensors and sockets: the service's `WorkerCore` around a pipeline that takes time only.

It stands in for `afd.attention.worker` and its engine; when a step's stages run is the `DataPath`'s part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from afd.kv.block_pool import BlockPool
from afd.messages.serving import GatewayMessage, Lease, WorkerMessage
from afd.sched.core import CoreLimits, WorkerCore
from afd.sched.latency import LatencyModel, StepLoad, StepSample
from afd.sched.policy import Admission, Policy
from afd.sched.prefill import PrefillBudget
from afd.sched.report import CostReporter
from afd.sched.scheduler import Scheduler
from afd.sched.sequence import MicroBatch, Output, Progress, Sequence, SequenceState
from afd.sched.streams import StreamChooser
from afd.simulate.prompts import WORD_TOKEN
from afd.simulate.results import Results
from afd.simulate.settings import Settings
from afd.simulate.times import StepTimes
from afd.types import FinishReason

STOP_TOKEN = 1
GATEWAY_NAME = "simulated"
GATEWAY = GATEWAY_NAME.encode()
FLUSH_S = 2.0  # longest that tokens between the first and the last one are kept back; the gateway asks after 5 s
INTRODUCTION_S = 3.0  # a gateway is known to a new worker for so long before its own lease comes


class _Words(dict[str, int]):
    """What any request samples when nothing depends on it."""

    def __missing__(self, req_id: str) -> int:
        return WORD_TOKEN


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
        self.stream, self.num_tokens = self.batch.stream, int(self.load.num_tokens)

    def meet(self, gang_tokens: int, times: StepTimes) -> None:
        """Join a gang of so many rows: the rows of the stream's last gang, until its own are known."""
        gang_tokens = max(gang_tokens, self.num_tokens)
        if gang_tokens == self.gang_tokens:
            return
        self.gang_tokens = gang_tokens
        self.to_ffn_s, self.to_attention_s = times.transfer_s(self.num_tokens, self.gang_tokens)


@dataclass(slots=True)
class StepSums:
    """What an attention worker has counted since its start, as `afd.attention.stages.StageTotals` does.

    wait_s: not counted: a path does not tell who waits.
    """

    busy_s: float = 0.0
    wait_s: float = 0.0
    num_rows: int = 0
    num_attended: float = 0.0
    num_sampled: int = 0
    num_exchanges: int = 0
    num_gang_members: int = 0

    def add(self, step: Step, num_layers: int) -> None:
        """One finished step."""
        self.busy_s += num_layers * step.attention_s + step.head_s
        self.num_rows += step.num_tokens
        self.num_attended += step.load.context_tokens
        self.num_sampled += int(step.load.num_samples)
        self.num_exchanges += num_layers
        self.num_gang_members += num_layers * max(1, step.mask.bit_count())


class DataPath(Protocol):
    """The way of steps through the layers. It keeps the FFN ranks' tables."""

    def wake(self, worker: AttentionWorker) -> None:
        """The worker may have something to start."""

    def lose_attention(self, worker: AttentionWorker) -> None:
        """An attention worker is gone; its steps are void already."""

    def lose_ffn(self) -> None:
        """An FFN rank is gone; every step is void already."""


class AttentionWorker:
    """The core, and the steps in flight.

    say: sends a message to the gateway.
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
        self.alive = True
        self.latency = LatencyModel()
        self.scheduler = Scheduler(
            replace(settings.scheduler, first_stream=rank),
            BlockPool(settings.num_blocks, settings.block_size, prefix_cache=settings.hash_block_tokens > 0),
            PrefillBudget(self.latency) if settings.policy == "enforce" else None,
        )
        # Observing admits everything, as "off" does; its forecasts would cost much and change nothing.
        policy: Policy = "enforce" if settings.policy == "enforce" else "off"
        chooser = StreamChooser(self.latency) if settings.auto_streams else None
        self.sums = StepSums()
        self.core = WorkerCore(
            rank,
            self.scheduler,
            Admission(self.scheduler, self.latency, policy=policy, tpot_s=settings.tpot_s, ttft_s=settings.ttft_s),
            CoreLimits(settings.times.vocab, settings.max_waiting, settings.recovery_timeout_s),
            chooser=chooser,
            reporter=CostReporter(self.latency, self.scheduler, self.sums) if settings.advises else None,
        )
        self._settings = settings
        self._times = settings.times
        self._targets = targets
        self._results = results
        self._say = say
        self._learns = policy == "enforce" or chooser is not None or settings.advises
        self._words = _Words()
        self._told: dict[str, tuple[Sequence, int]] = {}  # by request: output tokens of it that the gateway has
        self._gang_tokens: dict[int, int] = {}  # of each stream's last gang
        self._flushed_at = 0.0
        self.flying: dict[int, Step] = {}  # by stream
        self.announced_idle: set[int] = set()

    # -- messages -----------------------------------------------------------------------------------------

    def introduce(self, now: float) -> None:
        """The gateway is known from now on."""
        self.core.receive(GATEWAY, Lease(GATEWAY_NAME, INTRODUCTION_S), now)

    def handle(self, message: GatewayMessage, now: float) -> None:
        """One message of the gateway."""
        if self.alive:
            self.core.receive(GATEWAY, message, now)
            self._send()

    def set_ready(self, ready: bool, why_not: str, now: float) -> None:
        """Whether every FFN rank is there."""
        self.core.set_ready(ready, why_not, now)

    def tick(self, now: float) -> None:
        """What is due: leases, giving up, load to the gateway, and what it waits for, before it asks."""
        if now - self._flushed_at >= FLUSH_S:
            self.flush()
            self._flushed_at = now
        self.core.tick(now)
        self.core.report(now)
        self._send()

    def flush(self) -> None:
        """Send the tokens that were kept back (the real worker sends each at once)."""
        self._told = {key: told for key, told in self._told.items() if told[0].state is not SequenceState.FINISHED}
        kept_back = [seq for seq, num_told in self._told.values() if num_told < seq.num_output]
        self._publish([self._rest(seq, None) for seq in kept_back])

    # -- steps --------------------------------------------------------------------------------------------

    def begin_steps(self, now: float, idle: Callable[[int], None]) -> list[Step]:
        """A micro-batch for every empty stream that has work; `idle` hears of those that have none."""
        begun: list[Step] = []
        if not self.core.ready or not self.alive:
            return begun
        pace = self._settings.pace.attention(self.rank, now)
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
            chunks = [item for item in batch.items if item.num_new > 1] if load.num_tokens > len(batch.items) else ()
            attention_s, head_s = self._times.attention_s(load, chunks), self._times.head_s(load.num_samples)
            step = Step(self, batch, load, now, pace * attention_s, pace * head_s)
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
        if self._settings.advises:
            self.sums.add(step, self._times.num_layers)
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
                    took_s=now - step.started_s,
                    in_flight=(step.stream, *self.flying),
                )
            )
        news = self._news(progress)
        if news or self._learns:  # else there is nothing to tell, and no number of streams to choose
            self._publish(news)

    def fail(self, reason: str, now: float) -> None:
        """Nothing in flight is booked; its sequences run the step again."""
        self.flush()  # what was computed before was sent token by token
        if self.flying:
            self._results.landed(self.rank, now)
        for step in self.flying.values():
            step.void = True
            self.scheduler.fail_stream(step.batch)
        self.flying.clear()
        self.announced_idle.clear()
        self.core.interrupted(reason, now)

    # -- details ------------------------------------------------------------------------------------------

    def _sampled(self, batch: MicroBatch) -> Mapping[str, int]:
        """The stop token where an answer is complete; length-limited ones end by themselves."""
        if not self._settings.stops_early:
            return self._words
        return {
            item.seq.req_id: STOP_TOKEN if item.seq.num_output + 1 >= self._targets[item.seq.req_id] else WORD_TOKEN
            for item in batch.items
            if item.samples and item.seq.doomed is None
        }

    def _news(self, progress: Iterable[Progress]) -> list[Output]:
        """First and last tokens, which leave at once; those between are kept back, which nobody can tell."""
        news = []
        for item in progress:
            told = self._told.get(item.seq.req_id)
            begun = told is not None and told[0] is item.seq
            if not begun:
                news.append(Output(item))
                self._told[item.seq.req_id] = (item.seq, item.seq.num_output)
            elif item.finish is not None:
                news.append(self._rest(item.seq, item.finish))
            if item.finish is not None:
                del self._told[item.seq.req_id]
        return news

    def _rest(self, seq: Sequence, finish: FinishReason | None) -> Output:
        """All tokens that the gateway does not have."""
        first_idx = self._told[seq.req_id][1]
        self._told[seq.req_id] = (seq, seq.num_output)
        return Output(Progress(seq, first_idx, tuple(seq.tokens[seq.num_prompt + first_idx :]), finish))

    def _publish(self, news: Iterable[Output]) -> None:
        self.core.committed(news)
        self.core.publish()
        self._send()

    def _send(self) -> None:
        for _, message in self.core.take_outbox():
            self._say(message)
