"""The whole: gateway, attention workers and data path on one event queue; losses and returns; the run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from afd.errors import AfdError
from afd.messages.membership import ClusterView, Member, Plan, WorkerInfo
from afd.messages.serving import GatewayMessage, WorkerMessage
from afd.simulate.arrivals import Arrivals
from afd.simulate.closed_form import ClosedFormPath
from afd.simulate.events import EventQueue
from afd.simulate.failures import Failure
from afd.simulate.gateway import Gateway
from afd.simulate.layers import LayerPath
from afd.simulate.outcomes import Outcome
from afd.simulate.results import Report, Results
from afd.simulate.settings import Settings
from afd.simulate.worker import AttentionWorker, DataPath

HOP_S = 3e-4  # gateway to worker or back
START_S = 2 * HOP_S  # the workers have been heard by then; times of arrivals and failures count from here
VIEW_S = 0.25  # a change of members is published with the next heartbeat
LOST_AFTER_S = 2.5  # the coordinator's patience with a worker that says nothing
BUSY_REPORT_S, IDLE_REPORT_S = 0.1, 0.5
STUCK_S = 3600.0


class StuckError(AfdError):
    """Nobody was answered for an hour of simulated time although requests are live."""


class Simulation:
    """One run; not reusable. Deterministic: all follows from settings and arrivals."""

    def __init__(self, settings: Settings, arrivals: Arrivals, watch: Callable[[Outcome], None] | None = None):
        """watch: told what became of each request, when it ends; `at_s` counts from the first second of arrivals."""
        self._settings = settings
        self._events = EventQueue()
        self._results = Results(settings.topology, settings.tpot_s, settings.ttft_s)
        path_of = LayerPath if settings.detail == "layers" else ClosedFormPath
        self._path: DataPath = path_of(settings, self._events, self._results)
        self._gateway = Gateway(settings, arrivals, self._events, self._results, self._to_worker, watch)
        self._workers: dict[str, AttentionWorker] = {}
        self._of_rank: dict[int, AttentionWorker] = {}
        self._ffn_down: set[int] = set()
        self._num_incarnations = 0
        self._num_preempted = 0
        self._seen = 0

    def run(self) -> Report:
        """Simulate until every request has been answered or refused. StuckError after an hour without an answer."""
        for rank in range(self._settings.topology.num_attention):
            self._start(rank)
        self._publish()
        self._events.after(START_S, self._gateway.start)
        for failure in self._settings.failures:
            self._events.after(START_S + failure.at_s, self._fail, failure)
        gateway, results = self._gateway, self._results
        while not gateway.done:
            self._seen = results.num_news
            limit_s = self._events.now + STUCK_S if gateway.targets else float("inf")
            if not self._events.run(lambda: results.num_news > self._seen or gateway.done, limit_s):
                raise StuckError(
                    f"{len(gateway.targets)} requests wait without an answer since {limit_s - STUCK_S:.0f} s: "
                    f"give lost workers a restart (--fail ROLE:INDEX@SECONDS+RESTART_S)"
                )
        for worker in self._workers.values():
            worker.fail("the end", self._events.now)
        return results.report(
            migrated=gateway.dispatcher.counters.migrated,
            preempted=self._num_preempted + sum(w.scheduler.num_preemptions for w in self._workers.values()),
        )

    @property
    def workers(self) -> list[AttentionWorker]:
        """The workers that live (tests look at their books)."""
        return list(self._workers.values())

    # -- messages -----------------------------------------------------------------------------------------

    def _to_worker(self, key: str, message: GatewayMessage) -> None:
        self._events.after(HOP_S, self._handle, key, message)

    def _handle(self, key: str, message: GatewayMessage) -> None:
        worker = self._workers.get(key)
        if worker is not None:
            worker.handle(message, self._events.now)
            self._path.wake(worker)

    def _to_gateway(self, key: str, message: WorkerMessage) -> None:
        self._events.after(HOP_S, self._gateway.hear, key, message)

    def _report(self, worker: AttentionWorker) -> None:
        if worker.alive:
            self._tick(worker)
            self._events.after(BUSY_REPORT_S if worker.flying else IDLE_REPORT_S, self._report, worker)

    def _tick(self, worker: AttentionWorker) -> None:
        if worker.alive:
            worker.tick(self._events.now)

    # -- members ------------------------------------------------------------------------------------------

    def _start(self, rank: int) -> None:
        """A fresh worker takes the rank; the first report introduces it."""
        self._num_incarnations += 1
        key = f"attention/{rank}.{self._num_incarnations}"
        worker = AttentionWorker(
            key, rank, self._settings, self._gateway.targets, self._results, partial(self._to_gateway, key)
        )
        worker.introduce(self._events.now)
        worker.set_ready(not self._ffn_down, "an FFN worker is lost", self._events.now)
        self._workers[key] = self._of_rank[rank] = worker
        self._report(worker)

    def _publish(self) -> None:
        settings = self._settings
        topology, limits = settings.topology, settings.scheduler
        plan = Plan(max_streams=settings.auto_streams or limits.num_streams, max_step_tokens=limits.max_step_tokens)
        members = [
            Member(WorkerInfo("attention", worker.key, "", 0, "", serving=worker.key), rank, worker.core.ready)
            for rank, worker in self._of_rank.items()
        ]
        view = ClusterView(
            "simulated", 1, 1, topology.num_attention, topology.num_ffn, "simulated", "", "hybrid", plan, members
        )
        self._gateway.adopt(view)
        for worker in self._workers.values():
            worker.core.adopt(view)

    def _fail(self, failure: Failure) -> None:
        if failure.role == "attention":
            self._lose_attention(failure.rank)
            if failure.restart_s is not None:
                self._events.after(failure.restart_s, self._return_attention, failure.rank)
        else:
            self._lose_ffn(failure.rank)
            if failure.restart_s is not None:
                self._events.after(failure.restart_s, self._return_ffn, failure.rank)

    def _lose_attention(self, rank: int) -> None:
        """Nobody is told: the gateway finds out by its silence, the coordinator by missing heartbeats."""
        worker = self._of_rank.get(rank)
        if worker is None or not worker.alive:
            return
        worker.fail("killed", self._events.now)
        worker.alive = False
        del self._workers[worker.key]
        self._num_preempted += worker.scheduler.num_preemptions
        self._path.lose_attention(worker)
        self._events.after(LOST_AFTER_S, self._forget, worker)

    def _forget(self, worker: AttentionWorker) -> None:
        if self._of_rank.get(worker.rank) is worker:
            del self._of_rank[worker.rank]
            self._publish()

    def _return_attention(self, rank: int) -> None:
        worker = self._of_rank.get(rank)
        if worker is None or not worker.alive:
            self._start(rank)
            self._publish()

    def _lose_ffn(self, rank: int) -> None:
        """Every worker sees the connection close; nothing in flight is booked."""
        now, is_first = self._events.now, not self._ffn_down
        why = f"ffn/{rank} was lost at {now - START_S:g} s"
        self._ffn_down.add(rank)
        for worker in self._workers.values():
            worker.fail(why, now)
            if is_first:
                worker.set_ready(False, why, now)
                self._events.after(self._settings.recovery_timeout_s, self._tick, worker)
        self._path.lose_ffn()
        self._events.after(VIEW_S, self._publish)

    def _return_ffn(self, rank: int) -> None:
        self._ffn_down.discard(rank)
        if self._ffn_down:
            return
        for worker in self._workers.values():
            worker.set_ready(True, "", self._events.now)
            self._path.wake(worker)
        self._events.after(VIEW_S, self._publish)
