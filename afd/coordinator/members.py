"""What the coordinator knows of one member, and when that member counts as lost. No I/O, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from afd.config import CoordinatorConfig
from afd.messages.membership import ExpertId, Member, MemberStatus, PairReport, StepCosts, SyncRequest, WorkerInfo

ATTENTION, FFN, GATEWAY = "attention", "ffn", "gateway"
ROLES = (ATTENTION, FFN, GATEWAY)
MIN_DEAF_S = 0.5  # twice the pause between a newcomer's attempts to register
LOADING_PATIENCE = 3  # a process that loads a model may starve its side thread, and nobody waits for it yet


@dataclass(frozen=True, slots=True)
class Timing:
    """The time limits of the membership protocol, in seconds."""

    lost_after_s: float = 1.5
    stall_timeout_s: float = 5.0
    restart_grace_s: float = 5.0
    drain_s: float = 10.0
    cut_patience_s: float = 0.3

    @classmethod
    def of(cls, config: CoordinatorConfig, drain_s: float) -> Timing:
        """The limits that a configuration asks for. One that lives sends a heartbeat over a new connection at once."""
        cut_patience_s = 1.2 * config.heartbeat_s
        return cls(config.lost_after_s, config.stall_timeout_s, config.restart_grace_s, drain_s, cut_patience_s)


class Hearing:
    """Whether the coordinator hears anybody. When it hears nobody, that is its own deafness and nobody's death: this
    process stood still, or its port was shut or flooded.
    """

    def __init__(self, lost_after_s: float, now: float):
        self._deaf_after_s = max(lost_after_s / 2, MIN_DEAF_S)
        self._heard_at = now

    def heard(self, now: float) -> float:
        """A call was served -> how long nothing had been heard before it, where that was deafness; else 0."""
        gap_s, self._heard_at = now - self._heard_at, now
        return gap_s if gap_s > self._deaf_after_s else 0.0

    @property
    def heard_at(self) -> float:
        """When anybody was last heard of."""
        return self._heard_at

    def is_deaf(self, now: float) -> bool:
        """Nobody can be judged by silence now."""
        return now - self._heard_at > self._deaf_after_s


@dataclass(slots=True)
class Entry:
    """One registered process. Times are the coordinator's clock.

    excused_s: of the time since `last_seen`, that in which the coordinator could hear nobody.
    progress_at: when its main loop last moved, or had nothing to do.
    moved_at: when it last moved.
    ready_since: None while it is not ready.
    resumed_until: set while this member is known only from the view of an earlier coordinator and has not been heard of
        since; it is given until then.
    drain_asked: an operator asked for the drain (`draining` is what the member says of itself).
    on_standby: an FFN worker that holds every shard: it has none yet, or has not announced where that is reached.
    num_lines: connections that it follows the view over, one but for a moment while it makes another.
    cut_at: when the last of these closed, until it is heard of again; its kernel closes them when it dies.
    """

    info: WorkerInfo
    rank: int
    last_seen: float
    progress_at: float
    moved_at: float
    excused_s: float = 0.0
    resumed_until: float | None = None
    progress: int = 0
    pending: bool = False
    loading: float = 0.0
    ready_since: float | None = None
    draining: bool = False
    drain_asked: bool = False
    stats: dict[str, float] = field(default_factory=dict)
    silent_experts: list[ExpertId] = field(default_factory=list)
    costs: StepCosts | None = None
    broken: dict[str, tuple[float, str]] = field(default_factory=dict)  # peer -> (since, reason)
    on_standby: bool = False
    num_lines: int = 0
    cut_at: float | None = None

    @property
    def name(self) -> str:
        return f"{self.info.role}/{self.rank}"

    @property
    def identity(self) -> tuple[str, int, str]:
        return (self.info.role, self.rank, self.info.incarnation)

    @property
    def ready(self) -> bool:
        return self.ready_since is not None

    @property
    def is_worker(self) -> bool:
        return self.info.role != GATEWAY

    def announced(self, *, mono: bool) -> bool:
        """Others can reach it: its data plane is bound (a mono worker has none, only a serving endpoint)."""
        if not self.is_worker:
            return True
        return self.info.serving != "" if mono else self.info.mesh is not None

    def take_over(self, rank: int) -> None:
        """This worker, which was on standby, has a lost one's rank from now on; it is ready when it says so again."""
        self.rank = rank
        self.ready_since = None

    def heard(self, now: float) -> None:
        """Any call from this member."""
        self.last_seen = now
        self.excused_s = 0.0
        self.resumed_until = None
        self.cut_at = None

    def line_opened(self, now: float) -> None:
        """It follows the view over one connection more."""
        self.num_lines += 1
        self.heard(now)

    def line_closed(self, now: float) -> None:
        """A connection that it followed the view over has closed."""
        self.num_lines -= 1
        if self.num_lines == 0:
            self.cut_at = now

    def beat(self, request: SyncRequest, now: float) -> bool:
        """Take a heartbeat in; True when something that the view shows, or a pair, changed."""
        self.heard(now)
        if request.progress != self.progress:
            self.moved_at = self.progress_at = now
        elif not request.pending:
            self.progress_at = now
        self.progress, self.pending = request.progress, request.pending
        self.loading, self.stats = request.loading, request.stats
        self.silent_experts, self.costs = request.silent_experts, request.costs
        changed = (request.ready, request.draining) != (self.ready, self.draining)
        if request.ready != self.ready:
            self.ready_since = now if request.ready else None
        self.draining = request.draining
        self._set_broken(request.pairs, now)
        return changed

    def _set_broken(self, pairs: Iterable[PairReport], now: float) -> None:
        """Replace the broken pairs by those reported now; one that stays broken keeps its start."""
        self.broken = {
            pair.peer: (self.broken[pair.peer][0] if pair.peer in self.broken else now, pair.reason)
            for pair in pairs
            if pair.broken
        }

    def why_cut(self, now: float, timing: Timing, others_heard_at: float) -> str | None:
        """The reason why this member counts as lost by its connection, which closed and did not come back; or None.

        others_heard_at: when anybody was last heard of. Where that is before, the network may have gone for all.
        """
        if self.cut_at is None or now - self.cut_at <= timing.cut_patience_s or others_heard_at <= self.cut_at:
            return None
        return f"its connection closed, and nothing was heard of it for {now - self.cut_at:.1f} s"

    def why_lost(self, now: float, timing: Timing) -> str | None:
        """The reason why this member counts as lost at `now`, or None."""
        if self.resumed_until is not None:
            if now > self.resumed_until:
                return "it did not come back to the restarted coordinator"
            return None
        silence = now - self.last_seen - self.excused_s
        if silence > timing.lost_after_s * (1 if self.ready else LOADING_PATIENCE):
            return f"no heartbeat for {silence:.1f} s"
        stalled = now - self.progress_at
        if self.is_worker and self.ready and self.pending and stalled > timing.stall_timeout_s:
            return f"its main loop has had work but made no progress for {stalled:.1f} s"
        return None

    def excuse(self, gap_s: float) -> None:
        """The coordinator heard nobody for `gap_s`: that time is not this member's silence, nor its standstill."""
        self.excused_s += gap_s
        self.progress_at += gap_s
        self.moved_at += gap_s
        if self.resumed_until is not None:
            self.resumed_until += gap_s
        if self.ready_since is not None:
            self.ready_since += gap_s
        if self.cut_at is not None:
            self.cut_at += gap_s
        self.broken = {peer: (since + gap_s, reason) for peer, (since, reason) in self.broken.items()}

    def member(self) -> Member:
        return Member(self.info, self.rank, ready=self.ready, draining=self.draining or self.drain_asked)

    def status(self, now: float) -> MemberStatus:
        return MemberStatus(
            self.member(),
            age_s=max(0.0, now - self.last_seen),
            loading=self.loading,
            stats=self.stats,
            silent_experts=self.silent_experts,
            costs=self.costs,
        )


def blame(entries: Iterable[Entry], now: float, patience_s: float) -> tuple[Entry, str] | None:
    """Who leaves because of broken links: an end whose main loop has not moved for `patience_s` before others, then the
    end with more broken pairs; tie: attention (its requests migrate).

    A pair is judged only after it stayed broken for `patience_s`, during which a dead end is found by its silence
    instead. Complaints about peers that are not members any more do not count, nor does the time before an FFN worker
    was ready: it has announced where it listens, and nobody answers there while it loads the model.
    """
    present = {entry.name: entry for entry in entries if entry.is_worker}
    pairs: dict[frozenset[str], str] = {}
    for entry in present.values():
        for peer, (since, reason) in entry.broken.items():
            other = present.get(peer)
            if other is None or other.info.role == entry.info.role:
                continue
            ready_since = (entry if entry.info.role == FFN else other).ready_since
            if ready_since is not None and now - max(since, ready_since) > patience_s:
                pairs[frozenset((entry.name, peer))] = reason
    if not pairs:
        return None
    counts = Counter(name for pair in pairs for name in pair)

    def badness(name: str) -> tuple[bool, int, bool, int]:
        entry = present[name]
        return now - entry.moved_at > patience_s, counts[name], entry.info.role == ATTENTION, entry.rank

    worst = max(counts, key=badness)
    reasons = sorted({reason for pair, reason in pairs.items() if worst in pair and reason})
    peers = sorted(name for pair in pairs if worst in pair for name in pair if name != worst)
    detail = f" ({'; '.join(reasons)})" if reasons else ""
    return present[worst], f"its links to {', '.join(peers)} are broken{detail}"
