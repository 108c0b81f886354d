"""Rows in device memory over a twin of the driver: which way they take, when they are posted, what a failure leaves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stepmesh import CombineArrived, ConfigError, DispatchArrived, DispatchMeta, MeshConfig, PeerDown
from stepmesh.gpu import DeviceRows
from stepmesh.gpu_fabric import GpuFabric
from stepmesh.transports.base import Fabric
from tests.contract.world import LAYOUT, World, assert_same, attention, expected_answer, ffn, make_parts
from tests.fakes.gpu import FakeGpu, address_of

A0, F0, F1 = attention(0), ffn(0), ffn(1)
STREAM = 77  # of the GPU
WAYS = {
    "peermem": ("verbs", {}, "peermem"),
    "dmabuf": ("verbs", {"peer_memory": False}, "dmabuf"),
    "staged over verbs": ("verbs", {"peer_memory": False, "dmabuf": False}, "staged"),
    "staged over tcp": ("tcp", {}, "staged"),
    "staged over shm": ("shm", {}, "staged"),
}


class GpuWorld(World):
    """The attention ranks have a GPU, the FFN ranks have none."""

    def __init__(self, transport: str, **abilities: Any) -> None:
        super().__init__(transport)
        self.gpu = FakeGpu(self.verbs, **abilities)
        self.fabrics: dict[Any, GpuFabric] = {}

    def _fabric(self, config: MeshConfig) -> Fabric:
        if config.id.role is F0.role:
            return super()._fabric(config)
        self.fabrics[config.id] = GpuFabric(config, self.gpu, self.verbs)
        return self.fabrics[config.id]

    def send(self, peers: list[Any], rows: Any, parts: Any, *, stream: int = 0) -> None:
        """Dispatch rows that a kernel on the GPU has still to make, out of `parts`."""
        num_tokens, top_k = parts.expert_ids.shape
        view = self.meshes[A0].dispatch_view(peers[0], stream, num_tokens, top_k)
        view.expert_ids[...], view.expert_weights[...] = parts.expert_ids, parts.expert_weights
        self.gpu.launch(STREAM + stream, lambda: rows.__setitem__(slice(num_tokens), parts.rows))
        with self.fabrics[A0].rows(DeviceRows(address_of(rows), parts.rows.nbytes), STREAM + stream):
            self.meshes[A0].dispatch(peers, DispatchMeta(stream, 1, 1, 0), view)


def build(way: str, num_ffn: int = 1) -> GpuWorld:
    transport, abilities, _ = WAYS[way]
    world = GpuWorld(transport, **abilities)
    world.build(1, num_ffn)
    return world


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[GpuWorld]:
    world = build(getattr(request, "param", "peermem"), num_ffn=2)
    yield world
    world.close()
    world.gpu.close()
    assert world.verbs.regions == {}


@pytest.fixture
def rows() -> Any:
    """Device memory: here, memory of ours."""
    return np.zeros((LAYOUT.max_tokens, LAYOUT.hidden), np.float32)


every_way = pytest.mark.parametrize("world", WAYS, indirect=True)


@every_way
def test_rows_are_sent_when_the_gpu_has_made_them(world: GpuWorld, rows: Any, request: pytest.FixtureRequest) -> None:
    way = request.node.callspec.params["world"]
    path = world.fabrics[A0].register(address_of(rows), rows.nbytes)
    assert path.kind == WAYS[way][2]
    assert world.fabrics[A0].paths == (path,)
    for seed in range(3):
        parts = make_parts(9 + seed, seed=seed)
        copies = world.gpu.num_copies
        world.send([F0, F1], rows, parts)
        world.settle(0.01)
        assert world.seen(F0, DispatchArrived) == world.seen(F1, DispatchArrived) == []
        world.gpu.run(STREAM)
        for peer in (F0, F1):
            (arrival,) = world.take(peer, DispatchArrived)
            assert_same(arrival.parts, parts)
            world.answer(arrival, peer)
        for event in world.take(A0, CombineArrived, 2):
            np.testing.assert_array_equal(event.rows, expected_answer(parts, event.peer))
        assert world.gpu.num_copies - copies == (2 if path.kind == "staged" else 0)
    assert world.gpu.num_events == 0


def test_the_reason_names_what_failed(rows: Any) -> None:
    world = build("staged over verbs")
    path = world.fabrics[A0].register(address_of(rows), rows.nbytes)
    assert path.reason == (
        "peermem: no peer-memory module (nvidia-peermem) is loaded; "
        "dmabuf: cuMemGetHandleForAddressRange: operation not supported (801)"
    )
    world.close()
    world = build("staged over tcp")
    assert "this rank offers no RDMA port" in world.fabrics[A0].register(address_of(rows), rows.nbytes).reason
    world.close()


def test_a_card_that_takes_no_dmabuf_means_staging(rows: Any) -> None:
    world = build("dmabuf")
    world.verbs.takes_dmabuf = False
    path = world.fabrics[A0].register(address_of(rows), rows.nbytes)
    assert path.kind == "staged"
    assert "Operation not supported" in path.reason
    world.close()


def test_rows_outside_of_every_buffer_are_staged(world: GpuWorld, rows: Any) -> None:
    world.fabrics[A0].register(address_of(rows), rows[:4].nbytes)
    parts = make_parts(5)
    world.send([F0], rows, parts)
    world.gpu.run(STREAM)
    (arrival,) = world.take(F0, DispatchArrived)
    assert_same(arrival.parts, parts)
    assert world.gpu.num_copies == 1


def test_streams_do_not_wait_for_each_other(world: GpuWorld, rows: Any) -> None:
    world.fabrics[A0].register(address_of(rows), rows.nbytes)
    other_rows = rows.copy()
    first, second = make_parts(3, seed=1), make_parts(4, seed=2)
    world.send([F0], rows, first, stream=0)
    world.send([F0], other_rows, second, stream=1)
    world.gpu.run(STREAM + 1)
    (arrival,) = world.take(F0, DispatchArrived)
    assert arrival.header.stream == 1
    world.gpu.run(STREAM)
    (arrival,) = world.take(F0, DispatchArrived)
    assert_same(arrival.parts, first)


def test_posts_of_a_stream_keep_their_order(world: GpuWorld, rows: Any) -> None:
    """The second one's rows are on the host: it still waits for the first."""
    world.fabrics[A0].register(address_of(rows), rows.nbytes)
    first, second = make_parts(3, seed=1), make_parts(4, seed=2)
    world.send([F0], rows, first)
    world.dispatch(A0, [F0], second)
    world.settle(0.01)
    assert world.seen(F0, DispatchArrived) == []
    world.gpu.run(STREAM)
    arrivals = world.take(F0, DispatchArrived, 2)
    assert [arrival.header.seq for arrival in arrivals] == [1, 2]
    assert_same(arrivals[0].parts, first)
    assert_same(arrivals[1].parts, second)


def test_no_rows_wait_for_nothing(world: GpuWorld, rows: Any) -> None:
    world.fabrics[A0].register(address_of(rows), rows.nbytes)
    with world.fabrics[A0].rows(DeviceRows(address_of(rows), 0), STREAM):
        world.dispatch(A0, [F0], make_parts(0))
    (arrival,) = world.take(F0, DispatchArrived)
    assert arrival.header.num_tokens == 0


def test_nothing_is_kept_back_when_the_dispatch_is_refused(world: GpuWorld, rows: Any) -> None:
    with pytest.raises(ConfigError), world.fabrics[A0].rows(DeviceRows(address_of(rows), 640), STREAM):
        world.dispatch(A0, [], make_parts(1))
    assert world.gpu.num_events == 0
    world.exchange(A0, [F0], make_parts(2))


@pytest.mark.parametrize("when", ["while waiting", "at once"])
def test_a_gpu_that_fails_is_a_loss_of_the_pairs_it_was_sending_to(world: GpuWorld, rows: Any, when: str) -> None:
    world.fabrics[A0].register(address_of(rows), rows.nbytes)
    world.forget()
    world.gpu.broken = when == "at once"
    world.send([F0], rows, make_parts(3))
    world.gpu.broken = True
    (down,) = world.take(A0, PeerDown)
    assert down.peer == F0
    assert "GPU: cuEventQuery: an illegal memory access" in down.reason
    assert world.seen(F0, DispatchArrived) == []


@pytest.mark.parametrize("world", ["staged over shm"], indirect=True)
def test_slots_stay_pinned_until_no_copy_writes_them(world: GpuWorld, rows: Any) -> None:
    num_pinned = len(world.gpu.pinned)
    world.send([F0], rows, make_parts(3))
    world.cut(A0, F0)
    world.take(A0, PeerDown)
    world.until_connected()
    assert len(world.gpu.pinned) > num_pinned  # those of the dead generation, and its successor's
    world.gpu.run(STREAM)
    world.until(lambda: len(world.gpu.pinned) == num_pinned)
    assert world.gpu.num_events == 0


def test_a_slot_that_cannot_be_pinned_is_used_all_the_same(rows: Any, caplog: pytest.LogCaptureFixture) -> None:
    world = GpuWorld("tcp")
    world.gpu.can_pin = False
    world.build(1, 1)
    assert "a slot is not pinned" in caplog.text
    parts = make_parts(3)
    world.send([F0], rows, parts)
    world.gpu.run(STREAM)
    assert_same(world.take(F0, DispatchArrived)[0].parts, parts)
    world.close()


def test_a_blocked_wait_looks_at_the_gpu_often(world: GpuWorld, rows: Any) -> None:
    """An event rings no descriptor: waiting for one may not take the length of a blocking wait."""
    world.fabrics[A0].register(address_of(rows), rows.nbytes)
    world.send([F0], rows, make_parts(3))
    looks = world.meshes[A0].stats()["polls"]
    world.meshes[A0].progress(0.05)
    assert world.meshes[A0].stats()["polls"] - looks > 20
    world.gpu.run(STREAM)


def test_checksums_are_refused() -> None:
    world = GpuWorld("tcp")
    with pytest.raises(ConfigError, match="checksum needs rows in host memory"):
        world.add(A0, checksum=True)
