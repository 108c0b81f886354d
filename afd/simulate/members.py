"""Who is a member: attention workers and FFN ranks that start, drain, are lost and come back, and who hears of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from afd.messages.membership import ClusterView, Member, Plan, WorkerInfo
from afd.messages.serving import GatewayMessage, WorkerMessage
from afd.simulate.events import EventQueue
from afd.simulate.gateway import Gateway
from afd.simulate.results import Results
from afd.simulate.settings import Settings
from afd.simulate.worker import AttentionWorker, DataPath

HOP_S = 3e-4  # gateway to worker or back
START_S = 2 * HOP_S  # the workers have been heard by then; times of arrivals and failures count from here
VIEW_S = 0.25  # a change of members is published with the next heartbeat
LOST_AFTER_S = 2.5  # the coordinator's patience with a worker that says nothing
BUSY_REPORT_S, IDLE_REPORT_S = 0.1, 0.5


class Members:
    """Owns the attention workers, and knows which FFN ranks are there.

    alive: the workers that live, by key.
    """

    def __init__(self, settings: Settings, events: EventQueue, results: Results, gateway: Gateway, path: DataPath):
        self.alive: dict[str, AttentionWorker] = {}
        self._settings = settings
        self._events = events
        self._results = results
        self._gateway = gateway
        self._path = path
        self._of_rank: dict[int, AttentionWorker] = {}
        self._draining: set[str] = set()
        self._ffn_down: set[int] = set()
        self._num_attention = settings.topology.num_attention
        self._num_incarnations = 0
        self._num_preempted = 0

    @property
    def num_preempted(self) -> int:
        """Preemptions of all workers, those that are gone included."""
        return self._num_preempted + sum(worker.scheduler.num_preemptions for worker in self.alive.values())

    def size(self, role: str) -> int:
        """Places of a role."""
        return self._num_attention if role == "attention" else self._settings.topology.num_ffn

    def note(self, text: str) -> None:
        """A line of the report's time line."""
        self._results.note(self._events.now - START_S, text)

    def start_all(self) -> None:
        """Every place of the topology is taken, and everybody knows."""
        for rank in range(self._settings.topology.num_attention):
            self._start(rank)
        self.publish()

    def handle(self, key: str, message: GatewayMessage) -> None:
        """A message of the gateway has reached its worker, if that is still there."""
        worker = self.alive.get(key)
        if worker is not None:
            worker.handle(message, self._events.now)
            self._path.wake(worker)

    def publish(self) -> None:
        """A view of the cluster for the gateway and the workers."""
        settings = self._settings
        topology, limits = settings.topology, settings.scheduler
        plan = Plan(max_streams=settings.auto_streams or limits.num_streams, max_step_tokens=limits.max_step_tokens)
        members = [
            Member(
                WorkerInfo("attention", worker.key, "", 0, "", serving=worker.key),
                rank,
                ready=worker.core.ready,
                draining=worker.key in self._draining,
            )
            for rank, worker in self._of_rank.items()
        ]
        view = ClusterView(
            "simulated", 1, 1, topology.num_attention, topology.num_ffn, "simulated", "", "hybrid", plan, members
        )
        self._gateway.adopt(view)
        for worker in self.alive.values():
            worker.core.adopt(view)

    # -- attention workers --------------------------------------------------------------------------------

    def lose_attention(self, rank: int) -> None:
        """Nobody is told: the gateway finds out by its silence, the coordinator by missing heartbeats."""
        worker = self._of_rank.get(rank)
        if worker is None or not worker.alive:
            return
        self.note(f"attention/{rank} is lost")
        self._end(worker, "killed")
        self._events.after(LOST_AFTER_S, self._forget, worker)

    def return_attention(self, rank: int) -> None:
        """A successor or a newcomer serves, unless the place is taken or there is none any more."""
        worker = self._of_rank.get(rank)
        if rank < self._num_attention and (worker is None or not worker.alive):
            self.note(f"attention/{rank} serves")
            self._start(rank)
            self.publish()

    def resize(self, num_attention: int) -> None:
        """So many places for attention workers: newcomers serve when they have loaded, the highest ranks drain."""
        before, self._num_attention = self._num_attention, num_attention
        if before != num_attention:
            self.note(f"{before} attention workers should be {num_attention}")
        for rank in range(before, num_attention):
            self._events.after(self._settings.load.attention_s, self.return_attention, rank)
        for rank in range(num_attention, before):
            self.drain(rank, lambda: None)

    def drain(self, rank: int, gone: Callable[[], None]) -> None:
        """A worker takes nothing new, finishes what it can within `drain_s`, and leaves; the gateway moves the rest.

        gone: called then.
        """
        worker = self._of_rank.get(rank)
        if worker is None or not worker.alive:
            gone()
            return
        self.note(f"attention/{rank} drains")
        worker.core.drain()
        self._draining.add(worker.key)
        self._events.after(VIEW_S, self.publish)
        self._leave_when_idle(worker, self._events.now + self._settings.drain_s, gone)

    def _leave_when_idle(self, worker: AttentionWorker, until_s: float, gone: Callable[[], None]) -> None:
        if not worker.alive:
            gone()
        elif worker.scheduler.idle or self._events.now >= until_s:
            self._end(worker, "drained")
            self._forget(worker)
            gone()
        else:
            self._events.after(BUSY_REPORT_S, self._leave_when_idle, worker, until_s, gone)

    def _start(self, rank: int) -> None:
        """A fresh worker takes the rank; the first report introduces it."""
        self._num_incarnations += 1
        key = f"attention/{rank}.{self._num_incarnations}"
        worker = AttentionWorker(
            key, rank, self._settings, self._gateway.targets, self._results, partial(self._to_gateway, key)
        )
        worker.introduce(self._events.now)
        worker.set_ready(not self._ffn_down, "an FFN worker is lost", self._events.now)
        self.alive[key] = self._of_rank[rank] = worker
        self._results.joined(key, self._events.now)
        self._report(worker)

    def _end(self, worker: AttentionWorker, why: str) -> None:
        worker.fail(why, self._events.now)
        worker.alive = False
        del self.alive[worker.key]
        self._results.left(worker.key, self._events.now)
        self._draining.discard(worker.key)
        self._num_preempted += worker.scheduler.num_preemptions
        self._path.lose_attention(worker)

    def _forget(self, worker: AttentionWorker) -> None:
        if self._of_rank.get(worker.rank) is worker:
            del self._of_rank[worker.rank]
            self.publish()

    def _to_gateway(self, key: str, message: WorkerMessage) -> None:
        self._events.after(HOP_S, self._gateway.hear, key, message)

    def _report(self, worker: AttentionWorker) -> None:
        if worker.alive:
            self._tick(worker)
            self._events.after(BUSY_REPORT_S if worker.flying else IDLE_REPORT_S, self._report, worker)

    def _tick(self, worker: AttentionWorker) -> None:
        if worker.alive:
            worker.tick(self._events.now)

    # -- FFN ranks ----------------------------------------------------------------------------------------

    def lose_ffn(self, rank: int) -> None:
        """Every worker sees the connection close; nothing in flight is booked."""
        now, is_first = self._events.now, not self._ffn_down
        why = f"ffn/{rank} was lost at {now - START_S:g} s"
        self.note(f"ffn/{rank} is lost")
        self._ffn_down.add(rank)
        for worker in self.alive.values():
            worker.fail(why, now)
            if is_first:
                worker.set_ready(False, why, now)
                self._events.after(self._settings.recovery_timeout_s, self._tick, worker)
        self._path.lose_ffn()
        self._events.after(VIEW_S, self.publish)

    def return_ffn(self, rank: int) -> None:
        """A successor serves; when none is missing any more, everybody goes on."""
        self.note(f"ffn/{rank} serves")
        self._ffn_down.discard(rank)
        if self._ffn_down:
            return
        for worker in self.alive.values():
            worker.set_ready(True, "", self._events.now)
            self._path.wake(worker)
        self._events.after(VIEW_S, self.publish)
