"""Any history of joins, silences, goodbyes, complaints and restarts keeps the promises of the membership."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.coordinator.scenario import BEAT_S, Scenario

PEERS = [f"{role}/{rank}" for role in ("attention", "ffn") for rank in range(3)]


class Membership(RuleBasedStateMachine):
    """The script draws what happens; the invariants hold after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.scenario = Scenario("2A2F")
        self.counter = 0
        self.largest_epoch = 0
        self.last_version = 0
        self.members_of_epoch: dict[int, frozenset[tuple[str, int, str]]] = {}
        self.rank_of: dict[str, int] = {}

    def alive(self) -> list[str]:
        return [n for n in self.scenario.infos if n not in self.scenario.silent and n not in self.scenario.lost]

    @rule(kind=st.sampled_from("aafffg"), asked=st.sampled_from([-1, -1, 0, 1, 5]), bound=st.booleans())
    def join(self, kind: str, asked: int, bound: bool) -> None:
        self.counter += 1
        name = f"{kind}{self.counter}"
        reply = self.scenario.register(name, rank=asked, bound=bound)
        assert (reply.rank >= 0) == (reply.view is not None) == (reply.error == "")
        if reply.rank >= 0:
            if asked >= 0 and kind != "g":
                assert reply.rank == asked
            self.scenario.sync(name, ready=bound)

    @rule(seconds=st.sampled_from([BEAT_S, 1.0, 2.0, 6.0]))
    def pass_time(self, seconds: float) -> None:
        self.scenario.wait(seconds)

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def fall_silent(self, data: st.DataObject) -> None:
        self.scenario.silent.add(data.draw(st.sampled_from(self.alive())))

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.alive()))
        self.scenario.sync(name, leaving=True)
        self.scenario.silent.add(name)

    @precondition(lambda self: self.alive())
    @rule(data=st.data(), peers=st.lists(st.sampled_from(PEERS), max_size=2))
    def complain(self, data: st.DataObject, peers: list[str]) -> None:
        self.scenario.report(data.draw(st.sampled_from(self.alive())), *peers)

    @precondition(lambda self: self.alive())
    @rule()
    def register_again_where_unknown(self) -> None:
        for name in self.alive():
            if not self.scenario.sync(name).known and name not in self.scenario.lost:
                info = self.scenario.infos[name]
                reply = self.scenario.register(
                    name, rank=self.rank_of.get(name, -1), bound=info.mesh is not None, again=True
                )
                if reply.error:  # a newcomer took the place of one that was never part of an epoch
                    self.scenario.silent.add(name)

    @precondition(lambda self: self.scenario.view.epoch > 0)
    @rule(away=st.sampled_from([0.0, 10.0]))
    def coordinator_restarts(self, away: float) -> None:
        self.scenario.restart_coordinator(away_s=away)
        self.last_version = 0
        members = self.members_of_epoch.get(self.largest_epoch, frozenset())
        in_epoch = [name for name in self.alive() if any(name == incarnation for _, _, incarnation in members)]
        for name in in_epoch:
            if not self.scenario.sync(name).known:
                self.scenario.register(name, rank=self.rank_of.get(name, -1), again=True)
        if not in_epoch:  # nobody is left who knew: a new cluster
            self.largest_epoch = 0
            self.members_of_epoch.clear()
            self.rank_of = {}
            self.scenario.silent |= set(self.scenario.infos)

    @invariant()
    def epochs_and_versions_never_go_back(self) -> None:
        view = self.scenario.view
        assert view.epoch >= self.largest_epoch
        assert view.version >= self.last_version
        self.largest_epoch, self.last_version = view.epoch, view.version

    @invariant()
    def ranks_are_unique(self) -> None:
        places = [(m.info.role, m.rank) for m in self.scenario.view.members]
        assert len(places) == len(set(places))

    @invariant()
    def nobody_is_ever_given_another_rank(self) -> None:
        for member in self.scenario.view.members:
            known = self.rank_of.setdefault(member.info.incarnation, member.rank)
            assert known == member.rank

    @invariant()
    def an_epoch_stands_for_one_membership(self) -> None:
        view = self.scenario.view
        if not view.formed:
            return
        identities = frozenset(
            (m.info.role, m.rank, m.info.incarnation) for m in view.members if m.info.role != "gateway"
        )
        assert self.members_of_epoch.setdefault(view.epoch, identities) == identities
        assert {rank for role, rank, _ in identities if role == "ffn"} == {0, 1}
        assert all(m.info.mesh is not None for m in view.members if m.info.role != "gateway")


TestMembership = Membership.TestCase
TestMembership.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
