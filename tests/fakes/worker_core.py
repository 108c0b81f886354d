"""An attention worker's core with a scripted engine: steps are computed when the test says so."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from afd.kv.block_pool import BlockPool
from afd.messages.membership import ClusterView, Member, Plan, WorkerInfo
from afd.messages.serving import GatewayMessage, Refused, Submit, TokenChunk, Tokens, WorkerMessage, WorkerStats
from afd.sched.core import CoreLimits, WorkerCore
from afd.sched.latency import LatencyModel
from afd.sched.policy import Admission, Policy
from afd.sched.scheduler import Scheduler, SchedulerConfig
from afd.sched.sequence import MicroBatch, Output
from afd.types import SamplingParams

GATEWAY = b"gw"
VOCAB_SIZE = 100


def submit(
    name: str = "r", prompt: Seq[int] = (1, 2, 3), max_tokens: int = 3, attempt: int = 0, output: Seq[int] = ()
) -> Submit:
    return Submit(name, attempt, list(prompt), list(output), SamplingParams(max_tokens=max_tokens, seed=1))


def view(*members: Member, epoch: int = 1, plan: Plan | None = None) -> ClusterView:
    """A view with these attention workers, and one FFN worker."""
    ffn = Member(WorkerInfo("ffn", "f0", "", 0, ""), 0, True)
    return ClusterView("test", 1, epoch, 2, 1, "", "", "hybrid", plan or Plan(), [*members, ffn])


def attention(rank: int, *, ready: bool = True, draining: bool = False) -> Member:
    return Member(WorkerInfo("attention", f"a{rank}", "", 0, ""), rank, ready, draining)


@dataclass
class ScriptedWorker:
    """now: the clock, which the test sets.  in_flight: micro-batches that were begun, by stream."""

    core: WorkerCore
    now: float = 0.0
    in_flight: dict[int, MicroBatch] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        *,
        num_streams: int = 1,
        num_blocks: int = 8,
        policy: Policy = "off",
        max_waiting: int = 3,
        ready: bool = True,
        rank: int = 0,
    ) -> ScriptedWorker:
        scheduler = Scheduler(SchedulerConfig(max_context=64, num_streams=num_streams), BlockPool(num_blocks, 4))
        admission = Admission(scheduler, LatencyModel(), policy=policy, tpot_s=0.05, ttft_s=5.0)
        core = WorkerCore(rank, scheduler, admission, CoreLimits(VOCAB_SIZE, max_waiting, recovery_timeout_s=10.0))
        worker = cls(core)
        if ready:
            core.set_ready(True, "", 0.0)
        return worker

    def tell(self, *messages: GatewayMessage, gateway: bytes = GATEWAY) -> None:
        for message in messages:
            self.core.receive(gateway, message, self.now)

    def heard(self, gateway: bytes = GATEWAY) -> list[WorkerMessage]:
        """What one gateway was sent since the last look; nobody else is sent anything."""
        messages = self.core.take_outbox()
        assert {to for to, _ in messages} <= {gateway}
        return [message for _, message in messages]

    def chunks(self) -> list[TokenChunk]:
        return [chunk for message in self.heard() if isinstance(message, Tokens) for chunk in message.chunks]

    def refusals(self) -> list[Refused]:
        return [message for message in self.heard() if isinstance(message, Refused)]

    def listeners(self) -> set[bytes]:
        """Gateways that are told the load now: those that live. Half a second after the last look at the earliest."""
        self.core.report(self.now)
        return {to for to, message in self.core.take_outbox() if isinstance(message, WorkerStats)}

    def begin(self) -> None:
        """A micro-batch for every empty stream."""
        scheduler = self.core.scheduler
        for stream in range(scheduler.num_slots):
            if stream not in self.in_flight and (batch := scheduler.schedule(stream)) is not None:
                self.in_flight[stream] = batch

    def commit(self, stream: int = 0, token: int = 5) -> None:
        """The stream's step is over; its tokens wait for `publish`."""
        batch = self.in_flight.pop(stream)
        sampled = {item.seq.req_id: token for item in batch.items if item.samples}
        self.core.committed([Output(progress) for progress in self.core.scheduler.commit(batch, sampled)])

    def step(self, token: int = 5) -> None:
        """One whole step of every stream that has work, published."""
        self.begin()
        for stream in list(self.in_flight):
            self.commit(stream, token)
        self.core.publish()

    def fail(self, reason: str = "ffn/0 is lost") -> None:
        """Every step in flight is lost."""
        for batch in self.in_flight.values():
            self.core.scheduler.fail_stream(batch)
        self.in_flight.clear()
        self.core.interrupted(reason, self.now)
