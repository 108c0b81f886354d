"""Peers that turn evil after the handshake, over every transport: the victim rejects, recovers and keeps nothing.

The evil rank is a real mesh whose insides the campaign misuses: control bytes, descriptors, slots, seq words and data
bytes that no honest rank would send. The victim must never raise, must hand nothing out of bounds to its engine, and
must work as before once the peer behaves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stepmesh import CombineArrived, DispatchArrived, RankId
from stepmesh.layout import frame_bytes
from stepmesh.pair import Pair
from stepmesh.transports.base import Channel, ChannelSpec, Link, Offer
from stepmesh.transports.host import HostFabric
from stepmesh.wire import HEADER, ControlKind, encode_close, encode_control, encode_idle, read_header
from tests.contract.world import LAYOUT, World, attention, ffn, make_parts
from tests.fuzz.campaign import MemoryGauge, generator, nothing_left, volume
from tests.fuzz.mutations import mutate_bytes

A0, F0 = attention(0), ffn(0)
FRAMES_PER_ROUND = 20
TRANSPORTS = ("inproc", "shm", "tcp")

Attack = Callable[[random.Random, Pair], None]


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """Thousands of warnings are right here, and of no interest."""
    logger = logging.getLogger("stepmesh")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


@contextlib.contextmanager
def evil_world(transport: str, **overrides: Any) -> Iterator[World]:
    with nothing_left():
        world = World(transport)
        try:
            world.build(1, 1, **overrides)
            yield world
        finally:
            world.close()


def mutated_control(rng: random.Random, pair: Pair) -> None:
    frames = [
        encode_idle(rng.randrange(9), rng.getrandbits(64)),
        encode_control(ControlKind.DRAIN) * rng.randrange(1, 300),
        encode_control(rng.choice(list(ControlKind)), rng.randbytes(rng.randrange(200))),
        encode_close("x", retryable=True) + encode_idle(0, 1) * 3,
    ]
    frame = rng.choice(frames)
    pair.link.send(mutate_bytes(rng, frame) if rng.random() < 0.7 else frame)


def descriptors(rng: random.Random, pair: Pair) -> None:
    """Pushed with frames that want none, claimed or not, also behind garbage."""
    with open("/dev/null", "rb") as null:
        for _ in range(rng.randrange(1, 9)):
            frame = encode_control(rng.choice((ControlKind.DRAIN, ControlKind.READY)), b"", rng.choice((0, 1, 4)))
            pair.link.send(frame, (null.fileno(),) * rng.randrange(1, 5) if pair.link.kind == "unix" else ())


def mutated_slot(rng: random.Random, pair: Pair) -> None:
    """A frame as it could be, changed anywhere, posted under any number."""
    stream = rng.randrange(len(pair._tx) // 2)
    seq = rng.choice((1, 2, rng.randrange(1, 40), 2**63, 2**64 - 1))
    slot = pair.tx_slot(stream, seq)
    header = read_header(slot.memory)._replace(
        magic=b"SMDF", version=1, kind=3 - pair.receives, epoch=1, generation=pair.generation, seq=seq, stream=stream
    )
    num_tokens = rng.randrange(LAYOUT.max_tokens + 1)
    size = (LAYOUT.dispatch(num_tokens, 0) if pair.receives == 2 else LAYOUT.combine(num_tokens)).total
    header = header._replace(num_tokens=num_tokens, top_k=0, payload_bytes=size, wire_dtype=1, checksum_kind=0)
    frame = bytearray(frame_bytes(size))
    HEADER.pack_into(frame, 0, *header)
    frame[-8:] = seq.to_bytes(8, "little")
    frame = bytearray(mutate_bytes(rng, bytes(frame))) if rng.random() < 0.8 else frame
    slot.memory[: min(len(frame), len(slot.memory))] = frame[: len(slot.memory)]
    pair.channel.post(stream, seq & 1, seq, min(len(frame), len(slot.memory)))


def shared_words(rng: random.Random, pair: Pair) -> None:
    """Shared memory: any value in the bell and seq words, any bytes in the slots."""
    region = getattr(pair.channel, "_tx", None)
    if region is None:
        return
    words = region.board_memory.cast("Q")
    for _ in range(8):
        words[8 * rng.randrange(len(words) // 8)] = rng.choice((0, 1, 2, 2**64 - 1, rng.getrandbits(64)))
    rng.choice(region.slots)[:64] = rng.randbytes(64)
    os.eventfd_write(pair.channel._peer_bell_fd, 1)  # type: ignore[attr-defined]


def raw_data(rng: random.Random, pair: Pair) -> None:
    """TCP: bytes on the data connection that are no frame, or half of one."""
    sock = getattr(pair.channel, "_sock", None)
    if sock is not None:
        slot = bytes(pair._tx[0].memory[:400])
        with contextlib.suppress(OSError):
            sock.send(
                rng.choice((rng.randbytes(200), mutate_bytes(rng, slot), slot[: rng.randrange(1, 400)], bytes(96)))
            )


def cut(rng: random.Random, pair: Pair) -> None:
    sock = getattr(rng.choice((pair.link, pair.channel)), "_sock", None)
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.shutdown(rng.choice((socket.SHUT_RDWR, socket.SHUT_WR, socket.SHUT_RD)))


ATTACKS: tuple[Attack, ...] = (mutated_control, descriptors, mutated_slot, mutated_slot, shared_words, raw_data, cut)


def check_events(world: World, victim: RankId) -> None:
    """Whatever was delivered is in bounds."""
    for event in world.events[victim]:
        if isinstance(event, DispatchArrived):
            assert event.parts.rows.shape == (event.header.num_tokens, LAYOUT.hidden)
            assert event.header.num_tokens <= LAYOUT.max_tokens
        assert not isinstance(event, CombineArrived) or event.rows.shape[0] == event.header.num_tokens


def attack(world: World, rng: random.Random, evil: RankId, victim: RankId) -> None:
    """A burst of misuse, with or without an exchange under way, until the victim has had enough."""
    if rng.random() < 0.5:
        world.dispatch(A0, [F0], make_parts(2))
    for _ in range(rng.randrange(1, FRAMES_PER_ROUND)):
        pair = world.meshes[evil]._pairs.get(victim)
        if pair is None:
            break
        rng.choice(ATTACKS)(rng, pair)
        if rng.random() < 0.3:
            world.turn()
    for _ in range(3):
        world.turn()
    check_events(world, victim)


def make_peace(world: World, evil: RankId, victim: RankId) -> None:
    """The peer starts afresh and behaves: it is let in again. What it wrote into its own memory is its own."""
    if (pair := world.meshes[evil]._pairs.get(victim)) is not None:
        world.meshes[evil]._roster.drop(pair, "behaves again", retryable=True)
    generation = world.meshes[evil].stats()["peers"][str(victim)]["generation"]

    def renewed() -> bool:
        dialler = world.meshes[A0]._roster._dialler
        if dialler._targets[F0].refused:  # a random frame was a CLOSE for good: nobody dials again until told to
            dialler.want(world.member(F0))
        ends = [world.meshes[one]._pairs.get(other) for one, other in ((evil, victim), (victim, evil))]
        return all(end is not None and end.generation > generation for end in ends)

    world.until(renewed)
    world.forget()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("evil", [A0, F0], ids=str)
def test_evil_peers(transport: str, evil: RankId) -> None:
    num_rounds = volume(800, 6)
    rng = generator(f"{evil} evil over {transport}", num_rounds * FRAMES_PER_ROUND)
    victim = F0 if evil is A0 else A0
    with evil_world(transport) as world:
        gauge = MemoryGauge(num_rounds)
        for _ in range(num_rounds):
            world.exchange(A0, [F0], make_parts(3))
            attack(world, rng, evil, victim)
            make_peace(world, evil, victim)
            gauge.step()
        world.exchange(A0, [F0], make_parts(3))
        gauge.check()
        assert world.meshes[victim].stats()["peers"][str(evil)]["rejected_frames"] > num_rounds // 4


class EvilOffer:
    """Wraps a fabric's open_channel: the channel's own description is replaced by another one."""

    def __init__(self, fabric: HostFabric, twist: Callable[[Offer], Offer]) -> None:
        self._open = fabric.open_channel
        self._twist = twist

    def __call__(self, transport: str, spec: ChannelSpec, link: Link) -> Channel:
        channel = self._open(transport, spec, link)
        offer = channel.offer
        channel.offer = lambda: self._twist(offer())  # type: ignore[method-assign]
        return channel


def odd_fd(rng: random.Random, held: list[int]) -> int:
    """A descriptor that is not what it should be; the campaign closes it."""
    match rng.randrange(5):
        case 0:
            reading, writing = os.pipe()
            held += [reading, writing]
            return writing
        case 1:
            fd = os.memfd_create("unsealed")
            os.ftruncate(fd, rng.choice((0, 4096, 1 << 20)))
        case 2:
            fd = os.open("/dev/null", os.O_RDWR)
        case 3:
            fd = os.eventfd(0, 0)  # blocks when full
        case _:
            fd = os.open("/proc/self/maps", os.O_RDONLY)
    held.append(fd)
    return fd


@pytest.mark.parametrize("evil", [A0, F0], ids=str)
def test_evil_descriptors(evil: RankId) -> None:
    """shm: memory that could shrink, bells that could block, the wrong number of either; refused, nothing kept."""
    num_rounds = volume(150, 6)
    rng = generator(f"{evil} with odd descriptors", num_rounds)
    victim = F0 if evil is A0 else A0

    def twist(offer: Offer) -> Offer:
        fds, which = list(offer.fds), rng.randrange(2)
        match rng.randrange(4):
            case 0:
                fds[which] = odd_fd(rng, held)
            case 1:
                fds = fds[:which]
            case 2:
                fds.append(odd_fd(rng, held))
            case _:
                key = rng.choice(sorted(offer.descriptor))
                return Offer({**offer.descriptor, key: rng.choice((None, -1, "x", 1 << 70, [1], {}))}, offer.fds)
        return Offer(offer.descriptor, tuple(fds))

    with nothing_left():
        for _ in range(num_rounds):
            held: list[int] = []
            world = World("shm")
            world.add(A0)
            world.add(F0)
            fabric = world.meshes[evil]._fabric
            assert isinstance(fabric, HostFabric)
            fabric.open_channel = EvilOffer(fabric, twist)  # type: ignore[method-assign, assignment]
            world.form(1)
            world.until(
                lambda world=world, held=held: held or world.events[A0] or world.meshes[F0].stats()["turned_away"]
            )
            world.settle(0.02)
            assert evil not in world.meshes[victim].peers
            world.close()
            for fd in held:
                os.close(fd)
