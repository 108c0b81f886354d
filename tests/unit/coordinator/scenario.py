"""A scripted cluster around CoordinatorState: workers by name, one clock moved by hand."""

from __future__ import annotations

from afd.coordinator.members import Timing
from afd.coordinator.plan import PlanRules
from afd.coordinator.state import Action, ClusterSpec, CoordinatorState
from afd.messages.membership import (
    ClusterView,
    ControlReply,
    ControlRequest,
    MeshAddress,
    PairReport,
    Plan,
    RegisterReply,
    RegisterRequest,
    SyncReply,
    SyncRequest,
    WorkerInfo,
)
from afd.types import FfnParallel, Topology

HASH = "aa" * 16
TIMING = Timing(lost_after_s=1.5, stall_timeout_s=5.0, restart_grace_s=5.0, drain_s=10.0)
BEAT_S = 0.25
RULES = PlanRules(Plan())


class Scenario:
    """Calls are written in the order in which they happen; `wait` lets live members send heartbeats."""

    def __init__(self, topology: str = "1A1F", *, start: float = 100.0, rules: PlanRules = RULES, num_standby: int = 0):
        self.topology = topology
        self.num_standby = num_standby
        self.rules = rules
        self.now = start
        self.state = self.new_state("cluster-0")
        self.infos: dict[str, WorkerInfo] = {}
        self.silent: set[str] = set()
        self.syncs: dict[str, dict[str, object]] = {}
        self.views: dict[str, ClusterView] = {}
        self.lost: dict[str, str] = {}
        self.actions: list[Action] = []

    def new_state(self, cluster_id: str) -> CoordinatorState:
        spec = ClusterSpec(Topology.parse(self.topology), "model", FfnParallel.HYBRID, self.rules, self.num_standby)
        return CoordinatorState(spec, TIMING, cluster_id=cluster_id, now=self.now)

    def restart_coordinator(self, *, away_s: float = 0.0) -> None:
        """A new coordinator process that remembers nothing."""
        self.now += away_s
        self.state = self.new_state("cluster-1")

    @property
    def view(self) -> ClusterView:
        return self.state.view

    def register(
        self,
        name: str,
        *,
        role: str = "",
        rank: int = -1,
        config_hash: str = HASH,
        bound: bool = True,
        again: bool = False,
    ) -> RegisterReply:
        """name: also the incarnation; its first letter gives the role (a, f, g). again: with the last view."""
        role = role or {"a": "attention", "f": "ffn", "g": "gateway"}[name[0]]
        info = WorkerInfo(
            role=role,
            incarnation=name,
            host="host",
            pid=1,
            config_hash="" if role == "gateway" else config_hash,
            mesh=MeshAddress(f"mesh-{name}", "host", 1) if bound and role != "gateway" else None,
            serving="tcp://host:1" if role == "attention" else "",
            rank=rank,
        )
        seen = self.views.get(name) if again else None
        reply = self.state.register(RegisterRequest(info, seen.epoch if seen else 0, seen), self.now)
        if reply.view is not None:
            self.infos[name] = info
            self.views[name] = reply.view
        return reply

    def sync(self, name: str, **fields: object) -> SyncReply:
        """One heartbeat. `fields` stay for later ones."""
        kept = self.syncs.setdefault(name, {})
        kept.update(fields)
        seen = self.views.get(name)
        request = SyncRequest(
            role=self.infos[name].role,
            incarnation=name,
            view_version=seen.version if seen else 0,
            epoch_seen=seen.epoch if seen else 0,
            **kept,  # type: ignore[arg-type]
        )
        reply = self.state.sync(request, self.now)
        if reply.view is not None:
            self.views[name] = reply.view
        if reply.lost:
            self.lost[name] = reply.reason
        return reply

    def report(self, name: str, *peers: str) -> None:
        """`name` says that its links to `peers` are broken (and only these)."""
        self.sync(name, pairs=[PairReport(peer, broken=True, reason="link error") for peer in peers])

    def wait(self, seconds: float) -> None:
        """Time passes; every member that is not silent sends heartbeats, the coordinator ticks."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now = min(end, self.now + BEAT_S)
            for name in list(self.infos):
                if name not in self.silent and name not in self.lost:
                    self.sync(name)
            self.state.tick(self.now)
            self.actions += self.state.take_actions()

    def control(self, action: str, target: str = "") -> ControlReply:
        return self.state.control(ControlRequest(action, target), self.now)

    def ranks(self, role: str) -> dict[str, int]:
        """incarnation -> rank of the published members of one role."""
        return {member.info.incarnation: member.rank for member in self.view.of_role(role)}

    def log(self) -> str:
        """All events so far, one a line."""
        return "\n".join(self.state.status(self.now).events)


def formed(topology: str = "1A1F", **kwargs: PlanRules) -> Scenario:
    """A scenario whose cluster has formed and is ready: workers a0.., f0.., gateway g0."""
    scenario = Scenario(topology, **kwargs)
    parsed = Topology.parse(topology)
    names = [f"a{i}" for i in range(parsed.num_attention)] + [f"f{i}" for i in range(parsed.num_ffn)] + ["g0"]
    for name in names:
        reply = scenario.register(name)
        assert reply.error == ""
        scenario.sync(name, ready=True)
    scenario.wait(BEAT_S)
    assert scenario.view.formed
    return scenario
