"""Deterministic transport inside one process: virtual clock, seeded faults. For tests, simulations and examples.

    network = InprocNetwork(seed=1, faults=Faults(drop=0.01))
    mesh = Mesh(config, network.fabric(config))
    ... mesh.progress(0.0) ...; network.advance(0.001)

Nothing happens but in `advance`, which moves the clock and carries out what has become due, in a fixed order: the
same seed and the same calls give the same run. Faults hit data frames (drop, duplicate, reorder, delay, corrupt,
disconnect); control links are ordered streams, as sockets are, which can be late, cut or silently severed. A data
frame is copied when it is posted and copied again when it lands, so a late one is late for real.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stepmesh.config import MeshConfig
from stepmesh.errors import ProtocolError, TransportError
from stepmesh.layout import HEADER_BYTES, NUM_PARITIES
from stepmesh.transports.base import (
    Channel,
    ChannelSpec,
    Fabric,
    Failure,
    Link,
    Offer,
    Posted,
    Received,
    Wakeups,
    close_fds,
)
from stepmesh.types import Address, RankId, Role
from stepmesh.wire import ControlParser

_MAX_INBOX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities per data frame (0..1) and delays in seconds."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0  # the frame is held back so that later ones overtake it
    corrupt: float = 0.0  # one payload bit flips
    disconnect: float = 0.0  # the pair's links break instead of carrying the frame
    max_delay_s: float = 0.0  # uniform extra delay of frames, control and data


class InprocNetwork:
    """The clock, the random source and everything in flight. Single-threaded."""

    def __init__(self, seed: int = 0, faults: Faults | None = None, latency_s: float = 10e-6) -> None:
        self.faults = faults or Faults()
        self.rng = random.Random(seed)
        self.latency_s = latency_s
        self.now = 1.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._names = itertools.count(1)
        self._listening: dict[str, InprocFabric] = {}
        self._channels: dict[int, InprocChannel] = {}
        self._links: list[InprocLink] = []
        self._severed: set[frozenset[RankId]] = set()

    def fabric(self, config: MeshConfig) -> InprocFabric:
        """The outside world of one more rank."""
        return InprocFabric(self, config)

    @property
    def next_due(self) -> float:
        """When the next frame arrives, or the next timer ends."""
        return self._due[0][0] if self._due else math.inf

    def advance(self, seconds: float) -> None:
        """Move the clock and carry out what falls due, earliest first."""
        end = self.now + seconds
        while self._due and self._due[0][0] <= end:
            at, _, action = heapq.heappop(self._due)
            self.now = max(self.now, at)
            action()
        self.now = end

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Schedule an action."""
        heapq.heappush(self._due, (when, next(self._order), action))

    def cut(self, one: RankId, other: RankId) -> None:
        """Break the links between two ranks; both ends notice at once."""
        for link in [link for link in self._links if link.between(one, other)]:
            link.break_off("the link was cut")

    def sever(self, one: RankId, other: RankId) -> None:
        """Swallow everything between two ranks from now on, without a sign (half-open). `heal` ends it."""
        self._severed.add(frozenset((one, other)))

    def heal(self, one: RankId, other: RankId) -> None:
        self._severed.discard(frozenset((one, other)))

    def severed(self, pair: frozenset[RankId]) -> bool:
        return pair in self._severed

    def delay_s(self) -> float:
        return self.latency_s + self.rng.uniform(0.0, self.faults.max_delay_s)

    def listen(self, fabric: InprocFabric) -> str:
        name = f"inproc-{next(self._names)}"
        self._listening[name] = fabric
        return name

    def unlisten(self, name: str) -> None:
        self._listening.pop(name, None)

    def connect(self, fabric: InprocFabric, name: str) -> InprocLink:
        remote = self._listening.get(name)
        if remote is None:
            raise TransportError(f"nobody listens at {name!r}")
        near, far = InprocLink(self, fabric, remote), InprocLink(self, remote, fabric)
        near.other, far.other = far, near
        self._links = [link for link in self._links if link.alive] + [near, far]
        fabric.links.append(near)
        remote.accept(far)
        return near

    def add_channel(self, channel: InprocChannel) -> int:
        number = next(self._names)
        self._channels[number] = channel
        return number

    def channel(self, number: int) -> InprocChannel:
        try:
            return self._channels[number]
        except KeyError:
            raise ProtocolError(f"descriptor names channel {number}, which does not exist") from None

    def drop_channel(self, number: int) -> None:
        self._channels.pop(number, None)


class InprocLink(Link):
    """One end of a control stream."""

    kind = "inproc"

    def __init__(self, network: InprocNetwork, owner: InprocFabric, remote: InprocFabric) -> None:
        self.peer_name = str(remote.id)
        self.other: InprocLink | None = None
        self.alive = True
        self._network = network
        self.pair = frozenset((owner.id, remote.id))
        self._parser = ControlParser()
        self._inbox = bytearray()
        self._ended: str | None = None
        self._last_arrival = 0.0

    def between(self, one: RankId, other: RankId) -> bool:
        return self.alive and self.pair == frozenset((one, other))

    @property
    def readable(self) -> bool:
        return self.alive and (bool(self._inbox) or self._ended is not None)

    def trust(self) -> None:
        self._parser.trusted = True

    def send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        self._deliver(lambda end: end.take(frame))

    def receive(self) -> Received:
        self._parser.feed(bytes(self._inbox))
        self._inbox.clear()
        frames = []
        closed = self._ended
        try:
            while (frame := self._parser.next_frame()) is not None:
                frames.append(frame)
        except ProtocolError as error:
            closed = str(error)
        return Received(frames, closed)

    def close(self) -> None:
        if self.alive:
            self._deliver(lambda end: end.break_off("the peer closed the connection"))
            self.alive = False

    def take(self, data: bytes) -> None:
        if len(self._inbox) + len(data) > _MAX_INBOX_BYTES:
            self.break_off("the peer does not read its control link")
        else:
            self._inbox += data

    def break_off(self, reason: str) -> None:
        self._ended = self._ended or reason

    def _deliver(self, action: Callable[[InprocLink], None]) -> None:
        far = self.other
        if not self.alive or far is None or self._network.severed(self.pair):
            return
        # Never before what was sent earlier: a stream keeps its order.
        self._last_arrival = max(self._last_arrival, self._network.now + self._network.delay_s())

        def land() -> None:
            if far.alive and not self._network.severed(self.pair):
                action(far)

        self._network.at(self._last_arrival, land)


class InprocChannel(Channel):
    """Slots in ordinary memory; frames cross the network as copies."""

    kind = "inproc"

    def __init__(self, network: InprocNetwork, spec: ChannelSpec, pair: frozenset[RankId]) -> None:
        num_slots = spec.num_streams * NUM_PARITIES
        self._network = network
        self._pair = pair
        self._rx_slots = [memoryview(bytearray(spec.rx_slot_bytes)) for _ in range(num_slots)]
        self._tx_slots = [memoryview(bytearray(spec.tx_slot_bytes)) for _ in range(num_slots)]
        self._arrived: deque[Posted] = deque()
        self._peer: InprocChannel | None = None
        self._open = True
        self._last_arrival = 0.0
        self._number = network.add_channel(self)

    def offer(self) -> Offer:
        return Offer({"channel": self._number})

    def attach(self, descriptor: dict[str, Any], fds: Sequence[int]) -> None:
        close_fds(fds)
        self._peer = self._network.channel(int(descriptor.get("channel", -1)))

    @property
    def ready(self) -> bool:
        return self._peer is not None

    def outgoing(self, stream: int, parity: int) -> memoryview:
        return self._tx_slots[NUM_PARITIES * stream + parity]

    def incoming(self, stream: int, parity: int) -> memoryview:
        return self._rx_slots[NUM_PARITIES * stream + parity]

    def post(self, stream: int, parity: int, seq: int, frame_bytes: int) -> None:
        peer, network, faults = self._peer, self._network, self._network.faults
        if peer is None or network.severed(self._pair):
            return
        chance = network.rng.random
        if chance() < faults.disconnect:
            network.cut(*self._pair)
            return
        frame = bytearray(self.outgoing(stream, parity)[:frame_bytes])
        if chance() < faults.corrupt:
            frame[network.rng.randrange(HEADER_BYTES, frame_bytes)] ^= 1 << network.rng.randrange(8)
        copies = 0 if chance() < faults.drop else 2 if chance() < faults.duplicate else 1
        for _ in range(copies):
            arrival = network.now + network.delay_s()
            if chance() < faults.reorder:
                arrival += network.rng.uniform(0.0, 100 * network.latency_s + faults.max_delay_s)
            else:
                arrival = self._last_arrival = max(self._last_arrival, arrival)
            network.at(arrival, lambda: peer.land(Posted(stream, parity, seq), frame))

    def land(self, posted: Posted, frame: bytearray) -> None:
        """A frame arrives. Revoked: it falls on the floor, as it would at a deregistered region."""
        if self._open and not self._network.severed(self._pair):
            self.incoming(posted.stream, posted.parity)[: len(frame)] = frame
            self._arrived.append(posted)

    def poll(self) -> Sequence[Posted]:
        if not self._arrived:
            return ()
        found = list(self._arrived)
        self._arrived.clear()
        return found

    @property
    def failure(self) -> Failure | None:
        return None

    def close(self) -> None:
        self._open = False
        self._peer = None
        self._network.drop_channel(self._number)


class InprocFabric(Fabric):
    """One rank's view of the network."""

    waits = False

    def __init__(self, network: InprocNetwork, config: MeshConfig) -> None:
        self.id = config.id
        self.links: list[InprocLink] = []
        self._network = network
        self._accepted: list[Link] = []
        self._woken = False
        self._open = True
        self._name = network.listen(self) if config.id.role is Role.FFN else ""
        self.address = Address("", self._name, 1 if self._name else 0)

    def now(self) -> float:
        return self._network.now

    def nonce(self, num_bytes: int) -> bytes:
        return self._network.rng.randbytes(num_bytes)

    @property
    def transports(self) -> tuple[str, ...]:
        return ("inproc",)

    def accept(self, link: InprocLink) -> None:
        self.links.append(link)
        self._accepted.append(link)

    def connect(self, address: Address) -> Link:
        return self._network.connect(self, address.host)

    def open_channel(self, transport: str, spec: ChannelSpec, link: Link) -> Channel:
        if transport != "inproc" or not isinstance(link, InprocLink):
            raise TransportError(f"transport {transport!r} does not exist here")
        return InprocChannel(self._network, spec, link.pair)

    def collect(self) -> None:
        pass  # a channel has what was sent to it

    def leave(self) -> None:
        pass

    def wait(self, timeout_s: float) -> Wakeups:
        self.links = [link for link in self.links if link.alive]
        wakeups = Wakeups(self._accepted, [link for link in self.links if link.readable], self._woken)
        self._accepted, self._woken = [], False
        return wakeups

    def every(self, interval_s: float, call: Callable[[], None]) -> None:
        def fire() -> None:
            if self._open:
                call()
                self._network.at(self._network.now + interval_s, fire)

        self._network.at(self._network.now + interval_s, fire)

    def watch(self, fd: int) -> None:
        raise TransportError("inproc has no descriptors to watch: time is virtual")

    def unwatch(self, fd: int) -> None:
        pass

    def wake(self) -> None:
        self._woken = True

    def close(self) -> None:
        self._open = False
        self._network.unlisten(self._name)
