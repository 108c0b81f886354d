"""Which attention worker gets the next sequence. Pure: workers' records and `now` in, a choice out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from afd.gateway.sequence import ClientSequence
from afd.messages.membership import Member
from afd.messages.serving import WorkerStats

PROBE_CREDITS = (
    4  # sequences that a worker that has refused is asked to take next; twice as many each time it takes them
)


@dataclass(slots=True)
class Worker:
    """What the gateway knows of one attention worker (one incarnation).

    ready: as the view or the worker itself said it, whichever changed last: a coordinator may be away.
    shown_ready: as the view says it.
    heard_at: last message of any kind; None before the first.
    lost: silent too long (it may come back).
    cooling_until, credits: after a refusal nothing is sent until then, and then `credits` sequences at most; credits
    None = no limit.
    burst: how many those were at first.
    """

    key: str
    rank: int
    endpoint: str
    connected_at: float
    ready: bool = False
    shown_ready: bool = False
    draining: bool = False
    lost: bool = False
    heard_at: float | None = None
    stats: WorkerStats | None = None
    active: dict[str, ClientSequence] = field(default_factory=dict)
    outstanding_tokens: int = 0
    cooling_until: float = 0.0
    credits: int | None = None
    burst: int = PROBE_CREDITS
    lease_at: float = 0.0
    num_leases: int = 0

    @property
    def serving(self) -> bool:
        """Ready, heard and not draining: it takes sequences unless it is full."""
        draining = self.draining or (self.stats is not None and self.stats.draining)
        return self.ready and not draining and not self.lost and self.heard_at is not None

    @property
    def may_serve(self) -> bool:
        """It may serve before long: neither lost nor on its way out."""
        return not self.lost and not self.draining

    @property
    def has_suspect(self) -> bool:
        """It runs a sequence whose last worker ended before it had computed a token of it: one is enough at a time."""
        return any(sequence.num_barren and not sequence.has_gained for sequence in self.active.values())

    def follow(self, member: Member) -> None:
        """What the view says of it."""
        self.rank, self.draining = member.rank, member.draining
        if member.ready != self.shown_ready:
            self.ready = self.shown_ready = member.ready

    def has_room(self, now: float) -> bool:
        """Serving and not cooling down after a refusal."""
        return self.serving and now >= self.cooling_until and self.credits != 0

    def add(self, sequence: ClientSequence) -> None:
        self.active[sequence.req_id] = sequence
        self.outstanding_tokens += sequence.outstanding_tokens
        if self.credits is not None:
            self.credits -= 1

    def remove(self, sequence: ClientSequence) -> None:
        """Forget a sequence (ended, refused or moved away). Unknown ones are ignored."""
        if self.active.pop(sequence.req_id, None) is not None:
            self.outstanding_tokens -= sequence.outstanding_tokens

    def cool(self, until: float) -> None:
        """It refused: nothing before `until`, then a few at a time until `uncool`."""
        self.cooling_until = max(self.cooling_until, until)
        self.credits = self.burst = PROBE_CREDITS

    def grant(self, now: float) -> None:
        """A sequence ended there: one may follow at once."""
        if self.credits is not None:
            self.cooling_until = min(self.cooling_until, now)
            self.credits = max(self.credits, 0) + 1

    def renew(self, now: float, period_s: float) -> None:
        """The cooling period is over and its credits are used up, without a refusal: begin another one."""
        if self.credits == 0 and now >= self.cooling_until:
            self.cooling_until = now + period_s
            self.credits = self.burst = 2 * self.burst

    def uncool(self) -> None:
        """Nothing is queued any more: no limit."""
        self.credits = None
        self.cooling_until = 0.0


def choose_worker(workers: Iterable[Worker], now: float) -> Worker | None:
    """The worker with room that has no queue, then the fewest outstanding tokens, then the most free KV blocks."""
    candidates = [worker for worker in workers if worker.has_room(now)]
    return min(candidates, key=_load, default=None)


def _load(worker: Worker) -> tuple[bool, int, float, int]:
    stats = worker.stats
    if stats is None:
        return (False, worker.outstanding_tokens, 0.0, worker.rank)
    used_kv = 1.0 - stats.kv_blocks_free / max(1, stats.kv_blocks_total)
    return (stats.num_waiting > 0, worker.outstanding_tokens, used_kv, worker.rank)
