"""The verbs transport over a twin of the device: posting, signalling, room, failures by name, choice and fallback.

What any transport owes its users is in tests/contract, which runs over this one, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from stepmesh import (
    Address,
    CombineArrived,
    ConfigError,
    DispatchArrived,
    Member,
    Mesh,
    PayloadLayout,
    PeerDown,
    PeerUp,
    ProtocolError,
    TransportError,
    WireDtype,
)
from stepmesh.config import MeshConfig, VerbsOptions
from stepmesh.layout import HEADER_BYTES
from stepmesh.transports.base import ChannelSpec
from stepmesh.transports.verbs.base import Completion
from stepmesh.transports.verbs.channel import VerbsChannel
from stepmesh.transports.verbs.endpoint import VerbsEndpoint, open_endpoint
from tests.contract.world import Holdings, World, attention, ffn, make_parts
from tests.fakes.verbs import FLUSH_ERR, REM_ACCESS_ERR, RETRY_EXC_ERR, FakeQueuePair, FakeVerbs, port

A0, A1, F0, F1 = attention(0), attention(1), ffn(0), ffn(1)
SPEC = ChannelSpec("a test", num_streams=2, rx_slot_bytes=4096, tx_slot_bytes=4096, session_secret=b"s")
LAYOUT = PayloadLayout(8, 4, 0, WireDtype.FP32, WireDtype.FP32)


@pytest.fixture
def verbs() -> FakeVerbs:
    return FakeVerbs()


@pytest.fixture
def world(verbs: FakeVerbs) -> Iterator[World]:
    before = Holdings.now()
    world = World("verbs", verbs=verbs)
    yield world
    world.close()
    assert Holdings.now() == before
    assert (verbs.adapters, verbs.queue_pairs, verbs.regions) == ([], {}, {})


@pytest.fixture
def auto_world(verbs: FakeVerbs) -> Iterator[World]:
    world = World("auto", verbs=verbs)
    yield world
    world.close()
    assert (verbs.adapters, verbs.queue_pairs, verbs.regions) == ([], {}, {})


class Ends:
    """Two channels, connected, without a mesh around them."""

    def __init__(self, verbs: FakeVerbs, options: VerbsOptions | None = None) -> None:
        def config(rank_id: Any) -> MeshConfig:
            fields: dict[str, Any] = {"id": rank_id, "layout": LAYOUT, "num_streams": SPEC.num_streams}
            return MeshConfig(
                incarnation="i", secret=bytes(16), config_hash=b"h", verbs=options or VerbsOptions(), **fields
            )

        self.endpoints = [open_endpoint(config(rank_id), verbs) for rank_id in (A0, F0)]
        self.sender, self.receiver = (endpoint.open_channel(SPEC) for endpoint in self.endpoints)
        self.sender.attach(self.receiver.offer().descriptor, ())
        self.receiver.attach(self.sender.offer().descriptor, ())
        self.poll()
        assert self.sender.ready and self.receiver.ready

    def poll(self) -> tuple[Any, Any]:
        return self.sender.poll(), self.receiver.poll()

    def post(self, seq: int, size: int, stream: int = 0) -> None:
        slot = self.sender.outgoing(stream, seq & 1)
        slot[:size] = bytes([seq % 251]) * size
        self.sender.post(stream, seq & 1, seq, size)

    def close(self) -> None:
        for channel in (self.sender, self.receiver):
            channel.close()
            channel.close()
        for endpoint in self.endpoints:
            assert endpoint.num_channels == 0
            endpoint.close()


@pytest.fixture
def ends(verbs: FakeVerbs) -> Iterator[Ends]:
    ends = Ends(verbs)
    yield ends
    ends.close()


def queue_of(channel: VerbsChannel) -> FakeQueuePair:
    assert isinstance(channel._qp, FakeQueuePair)
    return channel._qp


def test_a_small_frame_is_one_inline_write(ends: Ends) -> None:
    ends.post(1, HEADER_BYTES + 8)
    (posted,) = queue_of(ends.sender).send_queue.posts
    assert (posted.num_requests, posted.inline, posted.size) == (1, True, HEADER_BYTES + 8)
    assert ends.receiver.poll() == [(0, 1, 1)]
    assert ends.receiver.incoming(0, 1)[: HEADER_BYTES + 8] == bytes([1]) * (HEADER_BYTES + 8)


def test_a_large_frame_is_payload_and_inline_header(ends: Ends) -> None:
    ends.post(2, 4096, stream=1)
    (posted,) = queue_of(ends.sender).send_queue.posts
    assert (posted.num_requests, posted.inline) == (2, True)
    assert posted.imm == 1 << 26 | 2
    assert ends.receiver.poll() == [(1, 0, 2)]
    assert ends.receiver.incoming(1, 0) == bytes([2]) * 4096


def test_without_inline_the_header_is_read_from_its_slot() -> None:
    ends = Ends(FakeVerbs(inline_bytes=0))
    try:
        ends.post(1, HEADER_BYTES + 8)
        ends.post(2, 4096)
        small, large = queue_of(ends.sender).send_queue.posts
        assert (small.num_requests, small.inline) == (2, False)
        assert (large.num_requests, large.inline) == (2, False)
        assert ends.receiver.poll() == [(0, 1, 1), (0, 0, 2)]
        assert ends.receiver.incoming(0, 0) == bytes([2]) * 4096
    finally:
        ends.close()


def test_one_request_in_a_few_is_signalled_and_none_is_too_many(ends: Ends) -> None:
    """The twin fails a post that the queue has no entry for."""
    for seq in range(1, 500):
        ends.post(seq, 4096 if seq % 3 else 136, stream=seq % 2)
        assert ends.receiver.poll() == [(seq % 2, seq & 1, seq)]
    posts = queue_of(ends.sender).send_queue.posts
    signalled = sum(posted.signalled for posted in posts)
    assert len(posts) // 8 < signalled < len(posts) // 2
    assert ends.sender.failure is None


def test_what_the_send_queue_cannot_take_is_sent_when_there_is_room(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = queue_of(ends.sender).send_queue
    num_frames = queue.depth // 2 + 2
    seen: list[int] = []
    with monkeypatch.context() as stuck:  # completions do not come back
        stuck.setattr(queue_of(ends.sender).adapter, "poll", lambda: ())
        for seq in range(1, num_frames + 1):
            ends.post(seq, 4096, stream=seq % 2)
            seen += [posted.seq for posted in ends.receiver.poll()]
        assert queue.taken + 3 > queue.depth  # no room for one more
        assert seen == list(range(1, len(queue.posts) + 1))
        assert len(seen) < num_frames
    ends.sender.poll()
    seen += [posted.seq for posted in ends.receiver.poll()]
    assert seen == list(range(1, num_frames + 1))
    assert ends.sender.failure is None


def test_sequence_numbers_outlive_the_immediates_bits(ends: Ends) -> None:
    first = (1 << 26) - 2
    for seq in range(first, first + 5):
        ends.receiver._last_seq[0] = ends.receiver._last_seq[0] or first - 1
        ends.post(seq, 200)
        assert ends.receiver.poll() == [(0, seq & 1, seq)]


def test_an_immediate_of_no_stream_is_a_rejection(ends: Ends) -> None:
    queue_of(ends.sender).post_frame(0, False, *ends.sender._addresses[0], 136, 136, 39 << 26 | 1)
    ends.receiver.poll()
    assert ends.receiver.failure is not None and ends.receiver.failure.rejected
    assert "names stream 39 of 2" in ends.receiver.failure.reason


def test_a_revoked_peer_is_a_failure_with_the_status_by_name(ends: Ends) -> None:
    ends.receiver._regions[0].close()
    ends.post(1, 4096)
    assert ends.poll() == ((), ())
    failure = ends.sender.failure
    assert failure is not None and not failure.rejected
    assert f"IBV_WC_REM_ACCESS_ERR ({REM_ACCESS_ERR})" in failure.reason
    assert "write over fake0" in failure.reason
    ends.post(2, 136)  # nothing happens, nothing is raised
    assert ends.receiver.failure is not None


def test_a_peer_that_is_gone_is_a_failure(ends: Ends) -> None:
    ends.receiver.close()
    ends.post(1, 136)
    ends.sender.poll()
    assert ends.sender.failure is not None
    assert f"IBV_WC_RETRY_EXC_ERR ({RETRY_EXC_ERR})" in ends.sender.failure.reason


def test_the_cause_is_named_even_where_flushed_receives_come_first(verbs: FakeVerbs, ends: Ends) -> None:
    pair = queue_of(ends.sender)
    pair.adapter.complete(Completion(pair.receives.popleft(), FLUSH_ERR, 0))
    pair.fail(ends.sender._serial, RETRY_EXC_ERR)
    ends.sender.poll()
    assert ends.sender.failure is not None and "RETRY_EXC_ERR" in ends.sender.failure.reason


def test_completions_of_a_closed_channel_are_nobodys(verbs: FakeVerbs, ends: Ends) -> None:
    ends.post(1, 4096)
    ends.receiver.close()
    successor = ends.endpoints[1].open_channel(SPEC)
    assert successor.poll() == ()
    assert successor.failure is None
    successor.close()


GOOD = {"qp_number": 7, "psn": 3, "gid": "::ffff:10.0.0.1", "lid": 0, "mtu": 3, "base": 4096, "rkey": 9}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("qp_number", 1 << 24),
        ("psn", -1),
        ("psn", "3"),
        ("gid", "not an address"),
        ("gid", 5),
        ("gid", None),
        ("lid", 1 << 16),
        ("mtu", True),
        ("base", 1 << 64),
        ("rkey", None),
        ("rx_slot_bytes", 8192),
        ("num_streams", 4),
    ],
)
def test_a_malformed_descriptor_is_refused(verbs: FakeVerbs, field: str, value: object) -> None:
    config = World("verbs", verbs=verbs).config(A0, layout=LAYOUT, num_streams=2)
    endpoint = open_endpoint(config, verbs)
    channel = endpoint.open_channel(SPEC)
    with pytest.raises(ProtocolError, match=r"slots|descriptor"):
        channel.attach({**GOOD, "rx_slot_bytes": 4096, "num_streams": 2, field: value}, ())
    channel.close()
    endpoint.close()


def test_options_reach_the_connection() -> None:
    options = VerbsOptions(mtu_bytes=1024, service_level=3, traffic_class=106, timeout=10, retry_count=2, rnr_retry=1)
    ends = Ends(FakeVerbs(), options)
    connection = queue_of(ends.sender).connection
    assert connection is not None
    wire = connection.wire
    assert (wire.mtu, wire.service_level, wire.traffic_class) == (3, 3, 106)
    assert (wire.timeout, wire.retry_count, wire.rnr_retry) == (10, 2, 1)
    ends.close()


def endpoint_of(mesh: Mesh) -> VerbsEndpoint:
    endpoint = mesh._fabric._rdma  # type: ignore[attr-defined]
    assert isinstance(endpoint, VerbsEndpoint)
    return endpoint


def test_a_registration_that_fails_takes_nothing_with_it(world: World, verbs: FakeVerbs) -> None:
    world.add(A0, connect_timeout_s=0.1)
    world.add(F0)
    verbs.memlock_bytes = 1 << 20
    world.form(1)
    (down,) = world.take(A0, PeerDown)
    assert down.retryable
    assert verbs.queue_pairs == {} and verbs.regions == {}
    verbs.memlock_bytes = 1 << 40
    world.until_connected()
    world.exchange(A0, [F0], make_parts(2))


def test_pairs_beyond_the_completion_queue_are_refused() -> None:
    verbs = FakeVerbs([replace(port(), max_completions=70)])
    endpoint = open_endpoint(World("verbs", verbs=verbs).config(F0, num_streams=2), verbs)
    channels = [endpoint.open_channel(SPEC) for _ in range(2)]
    with pytest.raises(TransportError, match="holds no more pairs"):
        endpoint.open_channel(SPEC)
    for channel in channels:
        channel.close()
    endpoint.close()


def test_a_slot_larger_than_a_message_is_refused(verbs: FakeVerbs) -> None:
    endpoint = open_endpoint(World("verbs", verbs=verbs).config(F0), verbs)
    with pytest.raises(TransportError, match="lower max_tokens"):
        endpoint.open_channel(ChannelSpec("a test", 2, 1 << 32, 4096, b"s"))
    assert verbs.regions == {}
    endpoint.close()


def test_a_link_that_goes_down_is_a_loss_and_comes_back(world: World, verbs: FakeVerbs) -> None:
    world.build(1, 2)
    world.forget()
    world.dispatch(A0, [F0, F1], make_parts(3))
    verbs.break_all(endpoint_of(world.meshes[F0]).adapter, RETRY_EXC_ERR)  # type: ignore[arg-type]
    (down,) = world.take(F0, PeerDown)
    assert "IBV_WC_RETRY_EXC_ERR (12)" in down.reason and down.retryable
    assert world.take(A0, PeerUp)[0].generation == 2
    world.until_connected()
    world.events[F0].clear()
    world.exchange(A0, [F0], make_parts(3), stream=1)
    assert world.seen(F1, PeerDown) == []


def test_a_blocked_wait_is_ended_by_a_completion(world: World) -> None:
    """The completion channel rings: without it this progress would block for MAX_WAIT_S again and again."""
    world.build(1, 1, spin_us=0)
    world.exchange(A0, [F0], make_parts(2))
    mesh = world.meshes[F0]
    mesh.progress(0.001)  # arms
    world.dispatch(A0, [F0], make_parts(2))
    assert any(isinstance(event, DispatchArrived) for event in mesh.progress(10.0))


def elsewhere(member: Member) -> Member:
    """The same rank as another host sees it: no UNIX socket connects."""
    return Member(member.id, member.incarnation, Address("", member.address.host, member.address.port))


def connect(world: World) -> str:
    world.meshes[A0].set_members(1, [elsewhere(world.member(F0))])
    world.meshes[F0].set_members(1, [world.member(A0)])
    world.until_connected()
    world.exchange(A0, [F0], make_parts(3))
    peer = world.meshes[A0].stats()["peers"]["ffn/0"]
    return f"{peer['transport']}: {peer['transport_reason']}"


def test_auto_takes_verbs_between_hosts_that_have_it(auto_world: World) -> None:
    auto_world.add(A0)
    auto_world.add(F0)
    assert connect(auto_world) == (
        "verbs: the peer's UNIX socket cannot be reached: another host or network namespace; "
        "both ends have an active RDMA port"
    )


def test_auto_prefers_shared_memory_on_one_host(auto_world: World) -> None:
    auto_world.build(1, 1)
    assert auto_world.take(A0, PeerUp)[0].transport == "shm"


def test_auto_takes_tcp_where_one_end_has_no_port_and_says_which(auto_world: World) -> None:
    auto_world.add(A0)
    auto_world.verbs = FakeVerbs([])
    auto_world.add(F0)
    chosen = connect(auto_world)
    assert chosen.startswith("tcp: ") and "only the initiator has an active RDMA port" in chosen


def test_auto_falls_back_to_tcp_where_no_packet_finds_its_way(auto_world: World, verbs: FakeVerbs) -> None:
    auto_world.add(A0)
    auto_world.add(F0)
    verbs.routed = False
    chosen = connect(auto_world)
    assert chosen.startswith("tcp: ") and "withheld by the initiator: verbs: " in chosen
    # The next connection tries again.
    verbs.routed = True
    auto_world.cut(A0, F0)
    auto_world.take(A0, PeerDown)
    assert connect(auto_world).startswith("verbs: ")


def test_forced_verbs_without_a_port_is_a_configuration_error(world: World) -> None:
    world.verbs = FakeVerbs([port("mlx5_0", active=False)])
    with pytest.raises(ConfigError, match="transport 'verbs' is forced: no usable RDMA port: mlx5_0:1 is not active"):
        world.add(F0)
    with pytest.raises(ConfigError, match="this host has no PCI device 0000:ff:ff"):
        world.add(F0, verbs=VerbsOptions(near="0000:ff:ff.7"))


def test_a_combine_of_a_paused_network_arrives_when_it_goes_on(world: World, verbs: FakeVerbs) -> None:
    world.build(1, 1)
    world.dispatch(A0, [F0], make_parts(3))
    (arrival,) = world.take(F0, DispatchArrived)
    verbs.paused = True
    world.answer(arrival, F0)
    world.settle(0.02)
    assert world.seen(A0, CombineArrived) == []
    verbs.resume()
    world.take(A0, CombineArrived)
