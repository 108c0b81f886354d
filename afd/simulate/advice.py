"""What the autoscaler would advise for a simulated load: its own code, on what a coordinator would say."""

from __future__ import annotations

from collections.abc import Iterable

from afd.cluster.autoscale.decision import Adviser, Demand, Limits, Observation, Policy, wish
from afd.cluster.autoscale.observation import Observer
from afd.gateway.dispatcher import Dispatcher
from afd.messages.membership import ClusterView, Member, MemberStatus, Plan, StatusReply, WorkerInfo
from afd.simulate.settings import Settings
from afd.simulate.worker import AttentionWorker
from afd.types import Topology

LOOK_S = 0.5


class Advice:
    """Looks at the cluster twice a simulated second while requests arrive; its text is of the last look.

    policy: None = that of `afd autoscale`, with the targets of the settings.
    follow: whether the number of attention workers is to follow, as with `afd autoscale --apply`, after the same waits.
    """

    def __init__(self, settings: Settings, limits: Limits, *, policy: Policy | None = None, follow: bool = False):
        self._settings = settings
        self._limits = limits
        self._policy = policy or Policy(settings.tpot_s, settings.ttft_s, settings.scheduler.max_num_seqs)
        self._setter = Adviser(self._policy, limits, fixed_ffn=True) if follow else None
        self._observer = Observer(0 if settings.auto_streams else settings.scheduler.num_streams)
        self._seen: Observation | None = None

    def look(
        self, workers: Iterable[AttentionWorker], ffn_busy_s: float, gateway: Dispatcher, now: float
    ) -> int | None:
        """Once every LOOK_S -> how many attention workers there are to be from now on; None = nothing to say."""
        settings = self._settings
        workers, num_ffn = list(workers), settings.topology.num_ffn
        load = {
            "running": float(gateway.num_running),
            "queued": float(len(gateway.queue)),
            "arrived": float(gateway.num_arrived),
        }
        members = [_attention(worker) for worker in workers]
        members += [_member("ffn", rank, {"busy_s": ffn_busy_s}) for rank in range(num_ffn)]
        members.append(_member("gateway", 0, load))
        plan = Plan(max_streams=settings.auto_streams or settings.scheduler.num_streams)
        view = ClusterView("simulated", 1, 1, len(workers), num_ffn, "", "", "hybrid", plan, [])
        seen = self._observer.observe(StatusReply(view, members, []), now)
        self._seen = seen or self._seen
        if seen is None or self._setter is None:
            return None
        return self._setter.observe(seen, now).size.num_attention

    def text(self) -> str:
        """One line, as `afd autoscale --once` prints it."""
        if self._seen is None:
            return "autoscale: too short to say"
        policy = self._policy
        asked = wish(self._seen, Demand.of(self._seen, policy), policy, self._limits)
        return f"autoscale: {self._seen.size} -> {asked.size}: {asked.reason}"


def limits_of(text: str) -> Limits:
    """ "1A1F:8A4F": the smallest and the largest. ConfigError for anything else."""
    smallest, _, largest = text.partition(":")
    return Limits(Topology.parse(smallest), Topology.parse(largest))


def _attention(worker: AttentionWorker) -> MemberStatus:
    scheduler, sums = worker.scheduler, worker.sums
    stats = {
        "running": float(scheduler.num_running),
        "waiting": float(scheduler.num_waiting),
        "kv_free": scheduler.pool.num_free / scheduler.pool.num_blocks,
        "busy_s": sums.busy_s,
        "sampled": float(sums.num_sampled),
        "rows": float(sums.num_rows),
        "attended": sums.num_attended,
    }
    status = _member("attention", worker.rank, stats)
    return MemberStatus(status.member, 0.0, 1.0, stats, costs=worker.core.costs)


def _member(role: str, rank: int, stats: dict[str, float]) -> MemberStatus:
    return MemberStatus(Member(WorkerInfo(role, f"{role}/{rank}", "", 0, ""), rank, ready=True), 0.0, 1.0, stats)
