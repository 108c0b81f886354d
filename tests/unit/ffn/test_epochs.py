"""Attention workers join and leave in quick succession; those that stay notice nothing."""

import pytest

from afd.ffn.epochs import EpochFollower
from afd.messages.membership import ClusterView, Member, MeshAddress, Plan, WorkerInfo
from stepmesh import FrameRejected, PeerDown
from tests.contract.world import World, attention, ffn, make_parts

F0, A0, A1, A2 = ffn(0), attention(0), attention(1), attention(2)
KEEP_S = 30.0


class Scene:
    """An FFN rank that follows views, and attention ranks that a test drives."""

    def __init__(self):
        self.world = World("inproc")
        for rank_id in (F0, A0, A1, A2):
            self.world.add(rank_id)
        self.follower = EpochFollower(self.world.meshes[F0], KEEP_S)

    def view(self, epoch, *ranks):
        members = []
        for rank in ranks:
            mesh = self.world.meshes[attention(rank)]
            address = MeshAddress("", mesh.address.host, mesh.address.port)
            info = WorkerInfo("attention", mesh.config.incarnation, "host", 1, "", mesh=address)
            members.append(Member(info, rank))
        return ClusterView("c", epoch, epoch, 1, 1, "m", "", "hybrid", Plan(), members)

    def hear(self, epoch, *ranks):
        """The FFN rank hears of an epoch."""
        self.follower.adopt(self.view(epoch, *ranks), self.world.now())

    def adopt(self, rank, epoch):
        """An attention rank hears of it."""
        self.world.meshes[attention(rank)].set_members(epoch, [self.world.member(F0)])

    def exchange(self, rank, epoch, **fields):
        self.world.exchange(attention(rank), [F0], make_parts(2), epoch=epoch, **fields)

    def complaints(self):
        return [event for rank_id in self.world.meshes for kind in (FrameRejected, PeerDown)
                for event in self.world.seen(rank_id, kind)]  # fmt: skip


@pytest.fixture
def scene():
    scene = Scene()
    yield scene
    scene.world.close()


def test_a_step_outlives_two_joins(scene):
    scene.hear(1, 0)
    scene.adopt(0, 1)
    scene.world.until(lambda: scene.world.meshes[A0].peers)
    scene.exchange(0, 1, layer=0)
    scene.hear(2, 0, 1)
    scene.adopt(1, 2)
    scene.exchange(0, 1, layer=1)
    scene.hear(3, 0, 1, 2)
    scene.exchange(0, 1, layer=2)  # A0 hears of both at its next heartbeat only
    scene.adopt(0, 3)
    scene.world.until(lambda: scene.world.meshes[A1].peers)
    scene.exchange(0, 3, layer=0)
    scene.exchange(1, 2)
    assert scene.complaints() == []


def test_two_joins_within_one_heartbeat(scene):
    """Only the second is heard of, while one that stays, and one that joins, are in the first."""
    scene.hear(1, 0)
    scene.adopt(0, 1)
    scene.world.until(lambda: scene.world.meshes[A0].peers)
    for rank in (0, 1):
        scene.adopt(rank, 2)
    scene.hear(3, 0, 1, 2)
    scene.world.until(lambda: scene.world.meshes[A1].peers)
    for rank in (0, 1):
        scene.exchange(rank, 2)
    assert scene.complaints() == []


def test_who_has_left_is_disconnected_once_its_epoch_is_over(scene):
    scene.hear(1, 0, 1)
    for rank in (0, 1):
        scene.adopt(rank, 1)
    scene.world.until(lambda: len(scene.world.meshes[F0].peers) == 2)
    scene.hear(2, 0)
    for seconds, peers in ((KEEP_S, {A0, A1}), (0.1, {A0})):
        end_s = scene.world.now() + seconds - 0.05
        while scene.world.now() < end_s:
            scene.world.turn()
            scene.world.network.advance(0.05)
            scene.follower.tick(scene.world.now())
        assert {*scene.world.meshes[F0].peers} == peers


def test_the_same_epoch_again_and_one_from_the_past_change_nothing(scene):
    scene.hear(2, 0)
    scene.hear(2, 0)
    scene.hear(1, 0, 1)
    scene.follower.tick(scene.world.now())
    scene.adopt(0, 2)
    scene.world.until(lambda: scene.world.meshes[A0].peers)
    scene.exchange(0, 2)
    assert scene.complaints() == []
