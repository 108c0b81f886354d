"""What only a real stack can show: devices, statuses, a network that breaks, resources in the kernel, memory."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

import pytest

from stepmesh import Address, CombineArrived, DispatchArrived, Member, PeerDown, PeerUp
from stepmesh.config import VerbsOptions
from stepmesh.transports.base import ChannelSpec
from stepmesh.transports.verbs.base import GidKind, Verbs
from stepmesh.transports.verbs.channel import VerbsChannel
from stepmesh.transports.verbs.endpoint import VerbsEndpoint, open_endpoint
from tests.contract.world import RDMA_DEVICES, World, attention, ffn, make_parts

A0, A1, F0, F1 = attention(0), attention(1), ffn(0), ffn(1)
SPEC = ChannelSpec("a test", num_streams=2, rx_slot_bytes=65536, tx_slot_bytes=65536, session_secret=b"s")
IMPATIENT = {"timeout": 10, "retry_count": 2}  # 4 ms, three times: a dead peer is found out in 13 ms
LIMIT_S = 20.0


class Ends:
    """Two connected channels between the two devices."""

    def __init__(self, verbs: Verbs) -> None:
        world = World("verbs")
        self.endpoints = [self._open(world, verbs, *end) for end in zip((A0, F0), RDMA_DEVICES, strict=True)]
        self.sender, self.receiver = self.connect()

    def connect(self) -> tuple[VerbsChannel, VerbsChannel]:
        sender, receiver = (endpoint.open_channel(SPEC) for endpoint in self.endpoints)
        sender.attach(receiver.offer().descriptor, ())
        receiver.attach(sender.offer().descriptor, ())
        until(lambda: receiver.poll() or receiver.ready or receiver.failure)
        assert receiver.failure is None
        return sender, receiver

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        for endpoint in self.endpoints:
            endpoint.close()

    @staticmethod
    def _open(world: World, verbs: Verbs, rank_id: Any, device: str) -> VerbsEndpoint:
        options = VerbsOptions(device=device, **IMPATIENT)
        return open_endpoint(world.config(rank_id, num_streams=2, verbs=options), verbs)


@pytest.fixture
def ends(verbs: Verbs) -> Iterator[Ends]:
    ends = Ends(verbs)
    yield ends
    ends.close()


def until(condition: Any) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline


def failure_of(channel: VerbsChannel) -> str:
    until(lambda: channel.poll() or channel.failure)
    assert channel.failure is not None
    return channel.failure.reason


def test_devices_are_found_with_their_addresses(verbs: Verbs) -> None:
    assert verbs.version.startswith("pyverbs of rdma-core ")
    assert int(verbs.version.split()[-1]) >= 44
    ports = {port.device: port for port in verbs.ports()}
    assert set(RDMA_DEVICES) <= ports.keys()
    for number, name in enumerate(RDMA_DEVICES, start=1):
        port = ports[name]
        assert (port.active, port.ethernet, port.number) == (True, True, 1)
        wanted = f"::ffff:10.77.0.{number}"
        assert any(gid.kind is GidKind.ROCE_V2 and str_of(gid.address) == wanted for gid in port.gids)


def str_of(address: str) -> str:
    mapped = IPv6Address(address).ipv4_mapped
    return f"::ffff:{mapped}" if mapped else address


def test_frames_of_all_sizes_arrive_whole(ends: Ends) -> None:
    for seq, size in enumerate((136, 192, 193, 1024, 4096, 65536), start=1):
        frame = bytes((seq + index) % 256 for index in range(size))
        ends.sender.outgoing(1, seq & 1)[:size] = frame
        ends.sender.post(1, seq & 1, seq, size)
        found: list[Any] = []
        until(lambda found=found: found.extend(ends.receiver.poll()) or found)
        assert found == [(1, seq & 1, seq)]
        assert ends.receiver.incoming(1, seq & 1)[:size] == frame


def test_a_revoked_region_is_named(ends: Ends) -> None:
    ends.receiver._regions[0].close()
    ends.sender.post(0, 1, 1, 4096)
    assert "IBV_WC_REM_ACCESS_ERR (10): the peer has revoked its slots" in failure_of(ends.sender)


def test_a_peer_that_is_gone_is_named(ends: Ends) -> None:
    ends.receiver.close()
    ends.sender.post(0, 1, 1, 4096)
    assert "IBV_WC_RETRY_EXC_ERR (12)" in failure_of(ends.sender)


def test_a_late_write_finds_nobody(ends: Ends) -> None:
    """Revoked, then announced anew: what was under way does not land in memory that is still readable."""
    view = ends.receiver.incoming(0, 1)
    ends.receiver.close()
    ends.sender.outgoing(0, 1)[:4096] = b"x" * 4096
    ends.sender.post(0, 1, 1, 4096)
    failure_of(ends.sender)
    assert view == bytes(SPEC.rx_slot_bytes)


def test_many_posts_leave_no_memory_behind(ends: Ends) -> None:
    """Work requests are changed in place: pyverbs would lose a little memory for each fresh one."""

    def exchange(first: int, count: int) -> None:
        for seq in range(first, first + count):
            ends.sender.post(0, seq & 1, seq, 200)
            until(ends.receiver.poll)

    exchange(1, 300)
    assert least_growth(lambda window: exchange(301 + 1000 * window, 1000)) < 64 * 1024


def least_growth(work: Callable[[int], None]) -> int:
    """Resident bytes that came with the best of four windows of work: what leaks grows in each, an arena in one."""
    growths = []
    for window in range(4):
        before = resident_bytes()
        work(window)
        growths.append(resident_bytes() - before)
    return min(growths)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def kernel_resources() -> dict[str, int]:
    """Queue pairs, regions and queues that the kernel holds, of both devices."""
    shown = subprocess.run(["rdma", "-j", "resource", "show"], check=True, capture_output=True, text=True).stdout
    counts: dict[str, int] = {}
    for device in json.loads(shown):
        if device["ifname"] in RDMA_DEVICES:
            for kind in ("qp", "mr", "cq", "pd"):
                counts[kind] = counts.get(kind, 0) + device[kind]
    return counts


def test_pairs_that_come_and_go_leave_nothing_in_the_kernel(ends: Ends) -> None:
    def cycle(times: int) -> None:
        for _ in range(times):
            for channel in ends.connect():
                channel.close()

    cycle(10)
    before = kernel_resources()
    assert least_growth(lambda window: cycle(50)) < 256 * 1024
    assert kernel_resources() == before


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def test_a_network_that_breaks_is_a_loss_and_heals(world: World) -> None:
    fields = {
        rank_id: VerbsOptions(device=name, **IMPATIENT) for rank_id, name in zip((A0, F0), RDMA_DEVICES, strict=True)
    }
    for rank_id, options in fields.items():
        world.add(rank_id, verbs=options)
    world.form(1)
    world.until_connected()
    world.exchange(A0, [F0], make_parts(2))
    world.forget()
    ip("link", "set", "port1", "nomaster")  # the cable of rxe1; the control link is elsewhere
    try:
        world.dispatch(A0, [F0], make_parts(3))
        (down,) = world.take(A0, PeerDown)
        assert down.retryable
        assert "RDMA write over rxe0: IBV_WC_RETRY_EXC_ERR (12)" in down.reason
        world.settle(0.5)
        assert world.seen(A0, PeerUp) == []  # forced: it does not fall back to anything
    finally:
        ip("link", "set", "port1", "master", "bridge0")
    world.until_connected()
    world.events[F0].clear()
    world.exchange(A0, [F0], make_parts(3), stream=1)


def elsewhere(member: Member) -> Member:
    """The same rank as another host sees it: no UNIX socket connects."""
    return Member(member.id, member.incarnation, Address("", member.address.host, member.address.port))


def test_auto_falls_back_to_tcp_while_the_network_is_broken(verbs: Verbs) -> None:
    world = World("auto")
    try:
        for rank_id, name in zip((A0, F0), RDMA_DEVICES, strict=True):
            world.add(rank_id, verbs=VerbsOptions(device=name, **IMPATIENT))
        ip("link", "set", "port1", "nomaster")
        try:
            world.meshes[A0].set_members(1, [elsewhere(world.member(F0))])
            world.meshes[F0].set_members(1, [world.member(A0)])
            world.until_connected()
        finally:
            ip("link", "set", "port1", "master", "bridge0")
        up = world.take(A0, PeerUp)[-1]
        assert up.transport == "tcp"
        assert "withheld by the initiator: verbs: " in up.reason
        world.cut(A0, F0)
        world.take(A0, PeerDown)
        world.until_connected()
        assert world.take(A0, PeerUp)[-1].transport == "verbs"
    finally:
        world.close()


def test_a_blocked_wait_is_ended_by_a_completion(world: World) -> None:
    world.build(1, 1, spin_us=0)
    world.exchange(A0, [F0], make_parts(2))
    world.meshes[F0].progress(0.001)  # arms
    world.dispatch(A0, [F0], make_parts(2))
    events: list[Any] = []
    until(lambda: events.extend(world.meshes[F0].progress(5.0)) or events)
    assert isinstance(events[0], DispatchArrived)


def test_two_by_two_with_every_stream_busy(world: World) -> None:
    world.build(2, 2, num_streams=3)
    for round_idx in range(3):
        sent = {}
        for sender in (A0, A1):
            for stream in range(3):
                parts = make_parts(20 + stream, seed=round_idx * 10 + stream + sender.rank)
                sent[sender, stream] = parts
                world.dispatch(sender, [F0, F1], parts, stream=stream)
        for peer in (F0, F1):
            for arrival in world.take(peer, DispatchArrived, 6):
                world.answer(arrival, peer)
        for sender in (A0, A1):
            for event in world.take(sender, CombineArrived, 6):
                expected = sent[sender, event.header.stream].rows * 2 + event.peer.rank
                assert (event.rows == expected).all()
