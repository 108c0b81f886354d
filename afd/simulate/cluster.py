"""The whole: gateway, members and data path on one event queue; what is planned to happen to them; the run."""

from __future__ import annotations

from collections.abc import Callable

from afd.errors import AfdError
from afd.messages.serving import GatewayMessage
from afd.simulate.advice import LOOK_S, Advice
from afd.simulate.arrivals import Arrivals
from afd.simulate.closed_form import ClosedFormPath
from afd.simulate.events import EventQueue
from afd.simulate.gateway import Gateway
from afd.simulate.layers import LayerPath
from afd.simulate.members import HOP_S, START_S, Members
from afd.simulate.outcomes import Outcome
from afd.simulate.planned import Failure
from afd.simulate.results import Report, Results
from afd.simulate.rollout import Rollout
from afd.simulate.settings import Settings
from afd.simulate.worker import AttentionWorker, DataPath

STUCK_S = 3600.0
PathFactory = Callable[[Settings, EventQueue, Results], DataPath]


class StuckError(AfdError):
    """Nobody was answered for an hour of simulated time although requests are live."""


class Simulation:
    """One run; not reusable. Deterministic: all follows from settings and arrivals."""

    def __init__(
        self,
        settings: Settings,
        arrivals: Arrivals,
        watch: Callable[[Outcome], None] | None = None,
        path_of: PathFactory | None = None,
        advice: Advice | None = None,
    ):
        """watch: told what became of each request, when it ends; `at_s` counts from the first second of arrivals.
        advice: looks on (`Settings.advises`), and may have the number of attention workers follow.
        path_of: makes another way of steps through the layers than that of attention and FFN workers.
        """
        self._settings = settings
        self._events = EventQueue()
        self._results = Results(settings.tpot_s, settings.ttft_s)
        path_of = path_of or (LayerPath if settings.detail == "layers" else ClosedFormPath)
        path = path_of(settings, self._events, self._results)
        self._gateway = Gateway(settings, arrivals, self._events, self._results, self._to_worker, watch)
        self._members = Members(settings, self._events, self._results, self._gateway, path)
        self._seen = 0
        self._advice = advice

    def run(self) -> Report:
        """Simulate until every request has been answered or refused. StuckError after an hour without an answer."""
        self._members.start_all()
        self._events.after(START_S, self._gateway.start)
        for failure in self._settings.failures:
            self._events.after(START_S + failure.at_s, self._fail, failure)
        for planned in self._settings.rollouts:
            begin = Rollout(planned.role, self._members, self._events, self._settings.load).begin
            self._events.after(START_S + planned.at_s, begin)
        for scaling in self._settings.scalings:
            self._events.after(START_S + scaling.at_s, self._members.resize, scaling.num_attention)
        if self._advice is not None:
            self._events.after(START_S, self._look, self._advice)
        gateway, results = self._gateway, self._results
        while not gateway.done:
            self._seen = results.num_news
            limit_s = self._events.now + STUCK_S if gateway.targets else float("inf")
            if not self._events.run(lambda: results.num_news > self._seen or gateway.done, limit_s):
                raise StuckError(
                    f"{len(gateway.targets)} requests wait without an answer since {limit_s - STUCK_S:.0f} s: "
                    f"give lost workers a restart (--fail ROLE:INDEX@SECONDS+RESTART_S)"
                )
        for worker in self.workers:
            worker.fail("the end", self._events.now)
        intended = [(failure.at_s, str(failure)) for failure in self._settings.failures]
        intended += [(scaling.at_s, str(scaling)) for scaling in self._settings.scalings]
        intended += [(rollout.at_s, str(rollout)) for rollout in self._settings.rollouts]
        for at_s, what in intended:
            if START_S + at_s > self._events.now:
                results.note(at_s, f"not reached: {what}")
        return results.report(migrated=gateway.dispatcher.counters.migrated, preempted=self._members.num_preempted)

    @property
    def workers(self) -> list[AttentionWorker]:
        """The workers that live (tests look at their books)."""
        return list(self._members.alive.values())

    def _look(self, advice: Advice) -> None:
        if not self._gateway.exhausted:
            members, workers = self._members, self.workers
            wanted = advice.look(workers, self._results.ffn_busy_s, self._gateway.dispatcher, self._events.now)
            if wanted is not None and len(workers) == members.size("attention"):  # nobody is on the way, in or out
                members.resize(wanted)
            self._events.after(LOOK_S, self._look, advice)

    def _to_worker(self, key: str, message: GatewayMessage) -> None:
        self._events.after(HOP_S, self._members.handle, key, message)

    def _fail(self, failure: Failure) -> None:
        members = self._members
        if failure.role == "attention":
            members.lose_attention(failure.rank)
            back = members.return_attention
        else:
            members.lose_ffn(failure.rank)
            back = members.return_ffn
        if failure.restart_s is not None:
            self._events.after(failure.restart_s, back, failure.rank)
