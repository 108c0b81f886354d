"""A link that stays down is reported once, and once more when it is back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.attention.mesh_exchange import MeshExchange
from afd.attention.pair_watch import PairNews, PairWatch
from afd.messages.membership import PairReport
from tests.contract.world import LAYOUT, World, attention, ffn
from tests.unit.coordinator.scenario import BEAT_S, formed


def test_a_short_loss_is_nobodys_business():
    watch = PairWatch(5.0)
    assert watch.look({"ffn/0": "is lost"}, 1.0) == []
    assert watch.look({"ffn/0": "is lost"}, 6.0) == []
    assert watch.look({}, 6.1) == []
    assert watch.look({"ffn/0": "is lost"}, 6.2) == []
    assert watch.look({"ffn/0": "is lost"}, 11.2) == []


def test_a_long_loss_is_told_once_and_its_end_too():
    watch = PairWatch(5.0)
    watch.look({"ffn/0": "is lost: a", "ffn/1": "is lost: b"}, 1.0)
    assert watch.look({"ffn/0": "is lost: c"}, 6.1) == [PairNews("ffn/0", True, "is lost: c")]
    assert watch.look({"ffn/0": "is lost: d"}, 7.0) == []
    assert watch.look({}, 8.0) == [PairNews("ffn/0", False)]
    assert watch.look({}, 9.0) == []


@given(st.lists(st.tuples(st.sets(st.sampled_from("abc")), st.floats(0.0, 4.0)), max_size=30))
def test_whoever_follows_the_news_knows_what_is_broken(looks):
    watch, now, known, down_since = PairWatch(5.0), 0.0, set(), {}
    for down, seconds in looks:
        now += seconds
        down_since = {peer: down_since.get(peer, now) for peer in down}
        for news in watch.look(dict.fromkeys(down, "why"), now):
            assert (news.peer in known) is not news.broken
            known = known | {news.peer} if news.broken else known - {news.peer}
        assert known == {peer for peer, since in down_since.items() if now - since > 5.0}


@pytest.mark.parametrize("healed", [False, True])
def test_a_link_that_stays_severed_costs_the_attention_worker_its_place(healed):
    """Mesh, exchange, watch and coordinator together: two attention workers, one FFN worker, one dead link."""
    world, scenario = World("inproc"), formed("2A1F")
    names = {attention(0): "a0", attention(1): "a1"}
    try:
        for rank_id in (*names, ffn(0)):
            world.add(rank_id)
        world.frozen.update(names)  # their meshes make progress in `poll` only
        world.meshes[ffn(0)].set_members(1, [world.member(rank_id) for rank_id in names])
        exchanges = {rank_id: MeshExchange(world.meshes[rank_id], LAYOUT) for rank_id in names}
        watches = {rank_id: PairWatch(world.meshes[rank_id].config.connect_timeout_s) for rank_id in names}
        for exchange in exchanges.values():
            exchange.adopt(1, [world.member(ffn(0))])

        def run(seconds):
            for _ in range(int(seconds / BEAT_S)):
                end_s = world.now() + BEAT_S
                while world.now() < end_s:
                    for exchange in exchanges.values():
                        exchange.poll(0.0)
                    world.turn()
                    world.network.advance(0.01)
                for rank_id, name in names.items():
                    down = {str(peer): why for peer, why in exchanges[rank_id].unreachable.items()}
                    for news in watches[rank_id].look(down, world.now()):
                        scenario.sync(name, pairs=[PairReport(*news)] if news.broken else [])
                scenario.wait(BEAT_S)

        run(1.0)
        assert all(exchange.ready for exchange in exchanges.values())
        world.network.sever(attention(0), ffn(0))
        run(5.0)
        assert not exchanges[attention(0)].ready and exchanges[attention(1)].ready
        if healed:
            world.network.heal(attention(0), ffn(0))
        run(6.0)
        assert scenario.ranks("attention") == ({"a0": 0, "a1": 1} if healed else {"a1": 1})
        assert scenario.ranks("ffn") == {"f0": 0}
        assert ("links to ffn/0 are broken (is lost: cannot be reached" in scenario.log()) is not healed
    finally:
        world.close()
