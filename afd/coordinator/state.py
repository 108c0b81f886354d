"""The coordinator's decisions: registrations, heartbeats, control and time in; views and actions out.

Sans-I/O: no socket, clock, thread or random in here. Every call takes `now` (seconds of one monotonic clock), and
the order of calls is the whole history. Not thread-safe: the service holds one lock around it.

Epochs. The epoch is the number of a membership of the data plane. The first forms when all FFN ranks and at least
the topology's attention ranks have announced their addresses. From then on one rule holds: whenever every FFN rank
is present and at least one attention worker is, and the set of (role, rank, incarnation) is not the one that the
epoch stands for, the epoch rises by one. So a lost attention worker raises it at once, a lost FFN worker when its
replacement has announced itself; in between the view says `formed == False`.

Restart. A coordinator keeps nothing on disk. Workers register again with the newest view they have, and the first
such view is resumed whole: same cluster id, epoch, ranks. Its members are given `restart_grace_s` to report.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Union

import msgspec

from afd.coordinator.claims import MAX_ATTENTION, MAX_EPOCH_SEEN, MAX_GATEWAYS, RefusedError, check_claims
from afd.coordinator.members import ATTENTION, FFN, GATEWAY, ROLES, Entry, Hearing, Timing, blame
from afd.coordinator.plan import Planner, PlanRules
from afd.coordinator.ranks import free_rank, take_over
from afd.messages.membership import (
    ClusterView,
    ControlReply,
    ControlRequest,
    ExpertId,
    RegisterReply,
    RegisterRequest,
    StatusReply,
    StepCosts,
    SyncReply,
    SyncRequest,
    WorkerInfo,
)
from afd.telemetry.log import printable
from afd.types import FfnParallel, Topology

MAX_EVENTS = 200
MAX_NOTE_CHARS = 300
MAX_LINES = 4  # of one member: a new one may be there before the old one's end is noticed
MAX_REMEMBERED_LOST = 4096
MAX_SILENT_WARNED = 4096


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """Facts about the cluster that the coordinator is started with. num_standby: of FFN workers."""

    topology: Topology
    model: str
    ffn_parallel: FfnParallel
    rules: PlanRules
    num_standby: int = 0


@dataclass(frozen=True, slots=True)
class Published:
    """The view changed; nothing to do but count (members fetch it with their next heartbeat)."""

    view: ClusterView


@dataclass(frozen=True, slots=True)
class Log:
    """Tell the operator. level: of the logging module."""

    level: int
    text: str


@dataclass(frozen=True, slots=True)
class Lost:
    """A member was declared lost (to be counted, and ended by who started it; the log line comes beside it)."""

    role: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class Stop:
    """The shutdown is complete (or its time is over): the coordinator's process ends."""


Action = Union[Published, Log, Lost, Stop]


class CoordinatorState:
    """See the module. `cluster_id` names this cluster until an earlier coordinator's view is resumed."""

    def __init__(self, spec: ClusterSpec, timing: Timing, *, cluster_id: str, now: float):
        self._spec = spec
        self._timing = timing
        self._planner = Planner(spec.rules)
        self._started = now
        self._last_now = now
        self._hearing = Hearing(timing.lost_after_s, now)
        self._entries: dict[str, Entry] = {}  # by incarnation
        self._lost: OrderedDict[str, str] = OrderedDict()  # incarnation -> why
        self._epoch_members: frozenset[tuple[str, int, str]] = frozenset()
        self._epoch_floor = 0  # largest epoch that anyone has seen
        self._shutdown_until: float | None = None
        self._stopped = False
        self._silent_experts: set[ExpertId] = set()  # warned of
        self._actions: list[Action] = []
        self._events: deque[str] = deque(maxlen=MAX_EVENTS)
        self._view = ClusterView(
            cluster_id=cluster_id,
            version=1,
            epoch=0,
            num_attention=spec.topology.num_attention,
            num_ffn=spec.topology.num_ffn,
            model=spec.model,
            config_hash="",
            ffn_parallel=spec.ffn_parallel,
            plan=spec.rules.base,
            members=[],
        )

    @property
    def view(self) -> ClusterView:
        """The published state (immutable)."""
        return self._view

    def take_actions(self) -> list[Action]:
        """What the caller must do now, in order; taken once."""
        actions, self._actions = self._actions, []
        return actions

    # --- what happens -----------------------------------------------------------------------------------

    def register(self, request: RegisterRequest, now: float) -> RegisterReply:
        """A process joins, or says again who it is (idempotent; its addresses may have changed)."""
        self._hear(now)
        try:
            return self._register(request, now)
        except RefusedError as error:
            info = request.info
            if not error.retry:
                self._log(logging.WARNING, f"refused {info.role} from {info.host} (pid {info.pid}): {error}")
            return RegisterReply(rank=-1, view=None, error=str(error), retry=error.retry)

    def sync(self, request: SyncRequest, now: float) -> SyncReply:
        """A heartbeat; `leaving` is a goodbye."""
        self._hear(now)
        entry = self._entries.get(request.incarnation)
        if entry is None:
            why = self._lost.get(request.incarnation)
            return SyncReply(known=False, lost=why is not None, reason=why or "")
        if entry.resumed_until is not None and request.epoch_seen > self._view.epoch:
            return SyncReply(known=False)  # it has a newer view than the one resumed here: have it registered
        self._epoch_floor = max(self._epoch_floor, min(request.epoch_seen, MAX_EPOCH_SEEN))
        if request.leaving:
            self._remove(entry)
            self._log(logging.INFO, f"{entry.name} left")
            self._publish(goodbye=True)
        else:
            if entry.beat(request, now):
                self._publish()
            self._warn_of_silent_experts(entry)
        return SyncReply(known=True, view=self._view if request.view_version != self._view.version else None)

    def follow(self, incarnation: str, now: float) -> Entry | None:
        """A member opened a connection over which it follows the view; None: it is none, or has too many of them.

        An entry is to be handed to one `unfollow`, when that connection has closed.
        """
        self._hear(now)
        entry = self._entries.get(incarnation)
        if entry is None or entry.num_lines >= MAX_LINES:
            return None
        entry.line_opened(now)
        return entry

    def unfollow(self, entry: Entry, now: float) -> None:
        """Such a connection closed. That alone is no death: whoever lives is heard of again at once."""
        entry.line_closed(now)

    def is_member(self, entry: Entry) -> bool:
        """Whether this entry still stands for a member: not for one that left, or was lost and registered again."""
        return self._entries.get(entry.info.incarnation) is entry

    def ended(self, incarnation: str, how: str, now: float) -> None:
        """Who started this process saw it end: nothing is waited for."""
        self._last_now = now
        entry = self._entries.get(incarnation)
        if entry is None:
            self._remember_lost(incarnation, how)  # should its registration still be on its way
            return
        self._declare_lost(entry, how)
        self._publish()

    def control(self, request: ControlRequest, now: float) -> ControlReply:
        """An operator's wish: "shutdown", "drain" of one member, or a "note" for the events that `afd status` shows."""
        self._hear(now)
        if request.action == "shutdown":
            if self._shutdown_until is None:
                self._shutdown_until = now + 2 * self._timing.drain_s
                self._log(logging.INFO, "shutdown asked: draining")
                self._publish()
                self._stop_when_done(now)
            return ControlReply(ok=True)
        if request.action == "drain":
            entry = next((e for e in self._entries.values() if e.name == request.target), None)
            if entry is None:
                return ControlReply(ok=False, error=f"no member {request.target!r}; members: {self._names()}")
            if entry.info.role == FFN:
                return ControlReply(
                    ok=False, error=f"{entry.name} cannot drain: every FFN rank takes part in every layer"
                )
            others = [e for e in self._entries.values() if e.info.role == entry.info.role and e is not entry]
            if not any(e.ready and not e.draining and not e.drain_asked for e in others):
                return ControlReply(
                    ok=False, error=f"{entry.name} is the only one that serves: without it every request would wait"
                )
            entry.drain_asked = True
            self._log(logging.INFO, f"{entry.name} asked to drain")
            self._publish()
            return ControlReply(ok=True)
        if request.action == "note":
            self._log(logging.INFO, " ".join(request.target.split())[:MAX_NOTE_CHARS])
            return ControlReply(ok=True)
        return ControlReply(ok=False, error=f"unknown action {request.action!r}; known: shutdown, drain, note")

    def tick(self, now: float) -> None:
        """Time passed: declare lost who is lost. Call several times per `lost_after_s`."""
        self._last_now = now
        if not self._hearing.is_deaf(now):
            self._judge(now)
        self._replan(now)
        self._stop_when_done(now)

    def status(self, now: float) -> StatusReply:
        """Everything an operator may want to see."""
        self._hear(now)
        order = sorted(self._entries.values(), key=lambda entry: (ROLES.index(entry.info.role), entry.rank))
        return StatusReply(
            self._view,
            [entry.status(now) for entry in order],
            list(self._events),
            self._planner.forecasts(self._costs()),
        )

    # --- registration -----------------------------------------------------------------------------------

    def _register(self, request: RegisterRequest, now: float) -> RegisterReply:
        info = request.info
        if info.role not in ROLES:
            raise RefusedError(f"unknown role {info.role!r}; known: {', '.join(ROLES)}")
        check_claims(request)
        if info.incarnation in self._lost:
            raise RefusedError(f"this process was declared lost ({self._lost[info.incarnation]}); start a new one")
        if info.incarnation not in self._entries:
            if self._shutdown_until is not None:
                raise RefusedError("the cluster is shutting down")
            self._check_fits(info, request.last_view)
        if request.last_view is not None:
            self._resume(request.last_view, now)
        entry = self._entries.get(info.incarnation)
        self._epoch_floor = max(self._epoch_floor, request.epoch_seen)
        if entry is None:
            entry = Entry(info, self._free_rank(info), last_seen=now, progress_at=now, moved_at=now)
            entry.on_standby = info.role == FFN and entry.rank >= self._view.num_ffn
            self._entries[info.incarnation] = entry
            place = " on standby" if entry.on_standby else ""
            self._log(logging.INFO, f"{entry.name} joined{place} from {info.host} (pid {info.pid})")
        elif entry.info.role != info.role:
            raise RefusedError(f"{entry.name} cannot become {info.role}")
        entry.info = info
        entry.heard(now)
        self._publish()
        return RegisterReply(rank=entry.rank, view=self._view)

    def _check_fits(self, info: WorkerInfo, last_view: ClusterView | None) -> None:
        """Refuse a worker of another model or configuration, before anything is changed for it."""
        if info.role == GATEWAY:
            return
        if last_view is not None and last_view.num_ffn != self._view.num_ffn:
            raise RefusedError(
                f"this worker's shard is one of {last_view.num_ffn} FFN ranks and the cluster now has "
                f"{self._view.num_ffn}; restart it"
            )
        if self._spec.topology.mono and info.role == FFN:
            raise RefusedError("topology mono has no FFN workers")
        holder = next((entry for entry in self._entries.values() if entry.is_worker), None)
        if holder is not None and holder.info.config_hash != info.config_hash:
            raise RefusedError(
                f"config hash {info.config_hash!r} differs from the cluster's {holder.info.config_hash!r} "
                f"(model {self._spec.model}, held by {holder.name} on {holder.info.host}); it covers the model's "
                f"files and shapes, dtype, ffn_parallel, max_step_tokens and the number of FFN ranks: "
                f"start this worker with the same settings"
            )

    def _free_rank(self, info: WorkerInfo) -> int:
        size = {ATTENTION: MAX_ATTENTION, FFN: self._view.num_ffn, GATEWAY: MAX_GATEWAYS}[info.role]
        if self._spec.topology.mono and info.role == ATTENTION:
            size = 1
        return free_rank(info, self._entries.values(), size, self._spec.num_standby if info.role == FFN else 0)

    def _resume(self, seen: ClusterView, now: float) -> None:
        """Take over the view of an earlier coordinator, when it is newer than anything known here."""
        formed_here = self._view.epoch > 0 and seen.cluster_id != self._view.cluster_id
        if seen.epoch <= max(self._view.epoch, 0) or formed_here or seen.num_ffn != self._view.num_ffn:
            return
        identities = frozenset((m.info.role, m.rank, m.info.incarnation) for m in seen.members)
        places = {(role, rank) for role, rank, _ in identities}
        for entry in list(self._entries.values()):
            if entry.identity in identities:
                continue
            if entry.resumed_until is not None:
                self._remove(entry)  # of an older view, and gone in this one
            elif (entry.info.role, entry.rank) in places:
                self._declare_lost(entry, "its rank belongs to a worker that the restarted coordinator did not know")
        for member in seen.members:
            if member.info.incarnation in self._entries or member.info.incarnation in self._lost:
                continue
            self._entries[member.info.incarnation] = Entry(
                member.info,
                member.rank,
                last_seen=now,
                progress_at=now,
                moved_at=now,
                resumed_until=now + self._timing.restart_grace_s,
                loading=1.0,
                ready_since=now if member.ready else None,
                drain_asked=member.draining,
            )
        self._epoch_members = frozenset(i for i in identities if i[0] != GATEWAY)
        if seen.shutdown:
            self._shutdown_until = now + 2 * self._timing.drain_s
        self._view = msgspec.structs.replace(
            self._view,
            cluster_id=seen.cluster_id,
            epoch=seen.epoch,
            version=max(seen.version, self._view.version),
            plan=seen.plan,
        )
        self._log(logging.WARNING, f"resumed cluster {seen.cluster_id} at epoch {seen.epoch} from its workers")

    # --- consequences -----------------------------------------------------------------------------------

    def _hear(self, now: float) -> None:
        """A call is served. After a time in which none was, nobody is to blame for having been silent then."""
        self._last_now = now
        gap_s = self._hearing.heard(now)
        if gap_s and self._entries:
            self._log(logging.WARNING, f"nobody could be heard for {gap_s:.1f} s; nobody is blamed for it")
            for entry in self._entries.values():
                entry.excuse(gap_s)

    def _judge(self, now: float) -> None:
        """Strike out who is silent, stands still, or is to blame for broken links."""
        before = len(self._entries)
        for entry in list(self._entries.values()):
            why = entry.why_cut(now, self._timing, self._hearing.heard_at) or entry.why_lost(now, self._timing)
            if why is not None:
                self._declare_lost(entry, why)
        while (verdict := blame(self._entries.values(), now, self._timing.lost_after_s)) is not None:
            self._declare_lost(*verdict)
        if len(self._entries) != before:
            self._publish()

    def _declare_lost(self, entry: Entry, why: str) -> None:
        """Strike a member out; the caller publishes (several losses at once are one epoch).

        A worker's place is free for a successor, so it may not come back. A gateway has no rank or state that others
        rely on: should it have been paused only, it registers again and its streams go on.
        """
        self._remove(entry)
        if entry.is_worker:
            self._remember_lost(entry.info.incarnation, why)
        self._log(logging.WARNING, f"{entry.name} lost: {why}")
        self._actions.append(Lost(entry.info.role, entry.info.incarnation))

    def _remember_lost(self, incarnation: str, why: str) -> None:
        self._lost[incarnation] = why
        while len(self._lost) > MAX_REMEMBERED_LOST:
            self._lost.popitem(last=False)

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.info.incarnation]

    def _publish(self, *, goodbye: bool = False) -> None:
        """Bring the view up to date: members, epoch, plan; one version later if anything differs.

        goodbye: a member left by itself. After the last gateway that is a cluster that ends, and nothing is waited for.
        """
        for name, entry in take_over(self._entries.values(), self._view.num_ffn):
            self._log(logging.INFO, f"{name}, on standby, takes over as {entry.name}")
        in_order = sorted(self._entries.values(), key=lambda entry: (ROLES.index(entry.info.role), entry.rank))
        shown = [entry for entry in in_order if self._serves(entry)]
        workers = frozenset(entry.identity for entry in shown if entry.is_worker)
        num_attention = sum(1 for role, _, _ in workers if role == ATTENTION)
        num_ffn = len(workers) - num_attention
        wanted_attention = 1 if self._view.epoch else self._view.num_attention
        complete = num_ffn == self._view.num_ffn and num_attention >= wanted_attention
        epoch = self._view.epoch
        if complete and workers != self._epoch_members:
            epoch = max(epoch, self._epoch_floor) + 1
            self._epoch_members = workers
            self._log(logging.INFO, f"epoch {epoch}: {num_attention} attention, {num_ffn} FFN workers")
        elif not complete and self._view.formed and not (goodbye and self._ends()):
            missing = "an attention worker" if num_ffn == self._view.num_ffn else "an FFN worker"
            self._log(logging.INFO, f"the cluster waits for {missing}")
        holder = next((entry for entry in self._entries.values() if entry.is_worker), None)
        candidate = msgspec.structs.replace(
            self._view,
            epoch=epoch,
            config_hash=holder.info.config_hash if holder is not None else "",
            plan=self._planner.fit(self._view.plan, num_attention),
            members=[entry.member() for entry in shown],
            standbys=[entry.member() for entry in in_order if entry.on_standby and not self._serves(entry)],
            shutdown=self._shutdown_until is not None,
        )
        if candidate != self._view:
            self._view = msgspec.structs.replace(candidate, version=self._view.version + 1)
            self._actions.append(Published(self._view))

    def _serves(self, entry: Entry) -> bool:
        """It has a place, and others can reach it there."""
        has_place = entry.info.role != FFN or entry.rank < self._view.num_ffn
        return has_place and entry.announced(mono=self._spec.topology.mono)

    def _costs(self) -> list[StepCosts]:
        return [entry.costs for entry in self._entries.values() if entry.costs is not None]

    def _replan(self, now: float) -> None:
        """A plan version from what the workers have measured, when one is due and pays."""
        if not self._view.formed:
            return
        plan = self._planner.decide(self._view.plan, self._costs(), now)
        if plan == self._view.plan:
            return
        self._log(logging.INFO, plan.text)
        self._view = msgspec.structs.replace(self._view, plan=plan, version=self._view.version + 1)
        self._actions.append(Published(self._view))

    def _warn_of_silent_experts(self, entry: Entry) -> None:
        """Once for each expert: a rank's successor, and with tensor parallelism every rank, reports the same ones."""
        if entry.info.role != FFN:
            return
        news: dict[int, list[int]] = {}
        for layer, expert in entry.silent_experts:
            if (layer, expert) not in self._silent_experts and len(self._silent_experts) < MAX_SILENT_WARNED:
                self._silent_experts.add((layer, expert))
                news.setdefault(layer, []).append(expert)
        for layer, experts in news.items():
            named = ", ".join(map(str, experts))
            self._log(
                logging.WARNING,
                f"{entry.name}: layer {layer}: expert {named} receives tokens and gives nothing beside the others; "
                f"check the checkpoint with `afd inspect`",
            )

    def _stop_when_done(self, now: float) -> None:
        """End the process once: after the last member has left a shutdown, or when its time is over."""
        if self._shutdown_until is None or self._stopped or (self._entries and now < self._shutdown_until):
            return
        self._stopped = True
        self._actions.append(Stop())

    def _ends(self) -> bool:
        gone = all(entry.is_worker for entry in self._entries.values())
        return gone or self._shutdown_until is not None

    def _names(self) -> str:
        return ", ".join(sorted(entry.name for entry in self._entries.values())) or "none"

    def _log(self, level: int, text: str) -> None:
        text = printable(text)  # members' words are in it, and operators' terminals show it
        self._events.append(f"+{self._last_now - self._started:.1f}s {text}")
        self._actions.append(Log(level, text))
