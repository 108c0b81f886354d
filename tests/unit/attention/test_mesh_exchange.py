"""The attention side of the mesh: which losses interrupt steps, who is out of reach, what a new epoch changes."""

import pytest
import torch

from afd.attention.mesh_exchange import MeshExchange
from afd.errors import PeerLostError
from afd.model.halves import Dispatch
from stepmesh import DispatchArrived, Member
from tests.contract.world import LAYOUT, STEP_S, World, attention, ffn

A0, F0, F1 = attention(0), ffn(0), ffn(1)


class Scene:
    """One attention rank with its exchange, and FFN ranks that a test answers for."""

    def __init__(self, num_ffn=2):
        self.world = World("inproc")
        self.world.frozen.add(A0)  # its mesh makes progress in `poll` only
        for rank_id in (A0, *(ffn(rank) for rank in range(num_ffn))):
            self.world.add(rank_id)
        for rank in range(num_ffn):
            self.world.meshes[ffn(rank)].set_members(1, [self.world.member(A0)])
        self.exchange = MeshExchange(self.world.meshes[A0], LAYOUT)
        self.exchange.adopt(1, self.members(*range(num_ffn)))

    def members(self, *ranks) -> list[Member]:
        return [self.world.member(ffn(rank)) for rank in ranks]

    def send(self, stream=0, layer=0):
        rows = torch.ones(2, LAYOUT.hidden)
        self.exchange.send(stream, 1, Dispatch(layer, rows, None, None))

    def answer(self, rank):
        (arrival,) = self.world.take(rank, DispatchArrived)
        self.world.answer(arrival, rank)

    def poll(self, wanted=lambda found: bool(found), limit_s=5.0):
        """Polls until what came is wanted."""
        found, end_s = [], self.world.now() + limit_s
        while not wanted(found):
            assert self.world.now() < end_s
            found += self.exchange.poll(0.0)
            self.world.turn()
        return found

    def settle(self, seconds=1.0):
        """Polls for so long -> what came."""
        end_s, found = self.world.now() + seconds, []
        while self.world.now() < end_s:
            found += self.exchange.poll(0.0)
            self.world.turn()
        return found


@pytest.fixture
def scene():
    scene = Scene()
    yield scene
    scene.world.close()


def test_the_loss_of_a_peer_of_an_open_step_interrupts_it(scene):
    scene.poll(lambda _: scene.exchange.ready)
    scene.send()
    scene.world.cut(A0, F1)
    with pytest.raises(PeerLostError, match="ffn/1 is lost"):
        scene.settle()
    scene.exchange.cancel()
    scene.poll(lambda _: scene.exchange.ready)


def test_the_loss_of_a_peer_that_no_open_step_uses_interrupts_nothing(scene):
    """F1 is in no epoch that counts: it leaves while a step with F0 alone is under way, and the next one begins."""
    scene.poll(lambda _: scene.exchange.ready)
    scene.send(stream=1)
    scene.answer(F0)
    scene.answer(F1)
    scene.poll()
    scene.exchange.adopt(2, scene.members(0))
    scene.world.meshes[F0].set_members(2, [scene.world.member(A0)])
    scene.send()
    scene.exchange.idle(1)
    scene.world.cut(A0, F1)
    assert scene.settle() == []
    assert scene.exchange.ready
    scene.answer(F0)
    (combined,) = scene.poll()
    assert combined.stream == 0
    scene.send(layer=1)


def test_a_loss_between_steps_interrupts_nothing_and_no_step_begins(scene):
    scene.poll(lambda _: scene.exchange.ready)
    scene.exchange.idle(0)
    scene.world.cut(A0, F1)
    scene.world.network.sever(A0, F1)
    assert scene.settle() == []
    assert not scene.exchange.ready
    assert list(scene.exchange.unreachable) == [F1]
    assert "ffn/1" in scene.exchange.down_reason
    scene.world.network.heal(A0, F1)
    scene.poll(lambda _: scene.exchange.ready)
    assert scene.exchange.unreachable == {}


def test_an_answer_that_comes_with_a_loss_is_not_lost(scene):
    scene.poll(lambda _: scene.exchange.ready)
    scene.exchange.adopt(2, scene.members(0))
    scene.world.meshes[F0].set_members(2, [scene.world.member(A0)])
    scene.send()
    scene.answer(F0)
    scene.world.cut(A0, F1)
    scene.world.network.advance(20 * STEP_S)
    (combined,) = scene.exchange.poll(0.0)  # both at once
    assert combined.stream == 0


def test_a_peer_that_comes_back_into_the_membership_while_its_pair_is_up_is_ready(scene):
    scene.poll(lambda _: scene.exchange.ready)
    scene.send()
    scene.answer(F0)
    scene.answer(F1)
    scene.poll()  # the step is open: epoch 1 stays live, and with it the pair
    scene.exchange.adopt(2, scene.members(0))
    assert scene.exchange.ready
    scene.exchange.adopt(3, scene.members(0, 1))
    scene.settle(0.1)
    assert scene.exchange.ready


def test_who_was_never_reached_is_named():
    scene = Scene(num_ffn=1)
    scene.world.add(F1)
    stranger = scene.world.member(F1)
    scene.world.stop(F1)
    scene.exchange.adopt(2, [scene.world.member(F0), stranger])
    scene.settle(0.1)
    assert not scene.exchange.ready
    assert scene.exchange.unreachable == {F1: "is not connected yet"}
    assert scene.exchange.down_reason == "ffn/1 is not connected yet"
    scene.exchange.suspend("an FFN worker is missing")
    assert scene.exchange.unreachable == {}
    assert scene.exchange.down_reason == "an FFN worker is missing"
    scene.world.close()
