"""One generation of a pair over RDMA: slots registered with the device, written into by the peer's.

A post is a WRITE of payload and trailer, then a WRITE_WITH_IMM of the header, on one queue pair: the receiver's
completion of the immediate says that all of it is in place. Small frames are a single write. The immediate names
(stream, low bits of seq); header and trailer carry the whole seq and are checked by the pair, as everywhere.

Receives are posted ahead, twice as many as the windows of both roles allow frames under way, and given back before the
engine sees the arrival, so a peer that keeps the protocol never finds none. What the send queue cannot take waits in
a queue of ours, bounded by the same windows.
"""

from __future__ import annotations

import hmac
import ipaddress
import mmap
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from stepmesh.config import VerbsOptions
from stepmesh.errors import ProtocolError, TransportError
from stepmesh.layout import HEADER_BYTES, NUM_PARITIES
from stepmesh.transports.base import Channel, ChannelSpec, Failure, Offer, Posted, close_fds
from stepmesh.transports.verbs.base import Adapter, QueueLimits, QueuePair, Region, Remote, RowSource, Wire
from stepmesh.transports.verbs.ledger import SendLedger
from stepmesh.transports.verbs.selection import Selection, common_mtu
from stepmesh.transports.verbs.status import FLUSHED, SUCCESS, explain

_SEQ_BITS = 26  # the immediate's lower part; the upper six name the stream
_SEQ_MASK = (1 << _SEQ_BITS) - 1
# wr_id: serial of the channel, then kind and number of send entries that a completion gives back
SERIAL_SHIFT = 32
_RECEIVE = 1 << 31
_PROBE = 1 << 30
_COVERED_MASK = _PROBE - 1
_WRITES_PER_FRAME = 3  # rows from elsewhere, the rest of the payload, the header
_NOTHING: tuple[Posted, ...] = ()


def limits(num_streams: int) -> QueueLimits:
    """What a pair's queues must hold: every slot's frame, twice over."""
    num_slots = num_streams * NUM_PARITIES
    return QueueLimits(num_writes=max(24, 2 * _WRITES_PER_FRAME * num_slots), num_receives=2 * num_slots)


class Endpoint(Protocol):
    """The opened port, as its channels see it."""

    adapter: Adapter
    selection: Selection

    def drain(self) -> bool:
        """Hand completions to their channels; True when there were any."""

    def forget(self, serial: int) -> None:
        """The channel is closed."""


class VerbsChannel(Channel):
    """Made by an endpoint, which routes completions here by serial.

    The end that attaches last (the FFN rank's, its peer is ready to receive by then) `probes` the path.
    """

    kind = "verbs"

    def __init__(
        self, spec: ChannelSpec, endpoint: Endpoint, serial: int, options: VerbsOptions, *, probes: bool
    ) -> None:
        self._spec = spec
        self._endpoint = endpoint
        self._serial = serial << SERIAL_SHIFT
        self._options = options
        self._psn = int.from_bytes(hmac.digest(spec.session_secret, b"psn", "sha256")[:3], "little")
        queues = limits(spec.num_streams)
        self._ledger = SendLedger(queues.num_writes, _WRITES_PER_FRAME)
        # Posts that the send queue had no room for.
        self._backlog: deque[tuple[int, int, int, int, RowSource | None]] = deque()
        self._arrived: list[Posted] = []
        self._last_seq = [0] * spec.num_streams
        self._addresses: list[tuple[int, int]] = []  # of each slot: here, and at the peer
        self._connected = False
        self._probes = probes
        self._reachable = not probes
        self._failure: Failure | None = None
        self._cause_unknown = False
        self._regions: list[Region] = []
        self._qp: QueuePair | None = None
        try:
            self._rx = _Slots(spec.num_streams, spec.rx_slot_bytes, endpoint, self._regions, remote=True)
            self._tx = _Slots(spec.num_streams, spec.tx_slot_bytes, endpoint, self._regions, remote=False)
            self._qp = endpoint.adapter.create_queue_pair(endpoint.selection.gid.number, queues)
            for _ in range(queues.num_receives):
                self._qp.post_receive(self._serial | _RECEIVE)
        except TransportError:
            self.close()
            raise

    def offer(self) -> Offer:
        assert self._qp is not None
        selection = self._endpoint.selection
        return Offer(
            {
                "qp_number": self._qp.number,
                "psn": self._psn,
                "gid": selection.gid.address,
                "lid": selection.port.lid,
                "mtu": selection.port.mtu,
                "base": self._rx.region.base,
                "rkey": self._rx.region.rkey,
                "rx_slot_bytes": self._spec.rx_slot_bytes,
                "num_streams": self._spec.num_streams,
            }
        )

    def attach(self, descriptor: dict[str, Any], fds: Sequence[int]) -> None:
        close_fds(fds)
        theirs = (descriptor.get("rx_slot_bytes"), descriptor.get("num_streams"))
        ours = (self._spec.tx_slot_bytes, self._spec.num_streams)
        if theirs != ours:
            raise ProtocolError(f"peer's slots (bytes, streams) are {theirs}, expected {ours}")
        if self._qp is None:
            raise TransportError(f"{self._spec.name}: the channel is closed")
        remote = Remote(
            qp_number=_number(descriptor, "qp_number", 24),
            psn=_number(descriptor, "psn", 24),
            gid=_gid(descriptor),
            lid=_number(descriptor, "lid", 16),
        )
        target = _number(descriptor, "base", 64)
        offsets = range(0, self._spec.tx_slot_bytes * self._spec.num_streams * NUM_PARITIES, self._spec.tx_slot_bytes)
        self._addresses = [(self._tx.region.base + offset, target + offset) for offset in offsets]
        options = self._options
        wire = Wire(
            mtu=common_mtu(self._endpoint.selection.port.mtu, _number(descriptor, "mtu", 3), options.mtu_bytes),
            service_level=options.service_level,
            traffic_class=options.traffic_class,
            timeout=options.timeout,
            retry_count=options.retry_count,
            rnr_retry=options.rnr_retry,
        )
        self._qp.connect(self._psn, remote, wire, self._tx.region.lkey, _number(descriptor, "rkey", 32))
        self._connected = True
        if self._probes:
            self._qp.post_probe(self._serial | _PROBE | self._ledger.post_alone())

    @property
    def ready(self) -> bool:
        """Connected, and the path is proven: the peer's port has acknowledged a write, where this end probes."""
        return self._connected and self._reachable

    def outgoing(self, stream: int, parity: int) -> memoryview:
        return self._tx.slots[NUM_PARITIES * stream + parity]

    def incoming(self, stream: int, parity: int) -> memoryview:
        return self._rx.slots[NUM_PARITIES * stream + parity]

    def post(self, stream: int, parity: int, seq: int, frame_bytes: int, rows: RowSource | None = None) -> None:
        """Post a frame. rows: memory of the payload's first bytes, which must not change until it is answered."""
        qp = self._qp
        if qp is None or self._failure is not None:
            return
        if self._backlog or not self._ledger.has_room(_WRITES_PER_FRAME):
            self._backlog.append((stream, parity, seq, frame_bytes, rows))
            self._endpoint.drain()
        else:
            self._send(qp, stream, parity, seq, frame_bytes, rows)

    def poll(self) -> Sequence[Posted]:
        if not self._arrived:
            self._endpoint.drain()
            if not self._arrived:
                return _NOTHING
        found, self._arrived = self._arrived, []
        return found

    @property
    def failure(self) -> Failure | None:
        return self._failure

    def close(self) -> None:
        self._endpoint.forget(self._serial >> SERIAL_SHIFT)
        qp, self._qp = self._qp, None
        if qp is not None:
            qp.close()  # first: what the peer still writes must find nobody
        while self._regions:
            self._regions.pop().close()
        self._backlog.clear()

    def completed(self, wr_id: int, status: int, imm: int) -> None:
        """A work request of this channel is over. From the endpoint."""
        qp = self._qp
        if qp is None or (self._failure is not None and not self._cause_unknown):
            return
        if status != SUCCESS:
            self._fail(wr_id, status)
        elif self._failure is not None:
            return
        elif wr_id & _RECEIVE:
            self._receive(qp, imm)
        else:
            self._ledger.completed(wr_id & _COVERED_MASK)
            if wr_id & _PROBE:
                self._reachable = True
            while self._backlog and self._ledger.has_room(_WRITES_PER_FRAME):
                self._send(qp, *self._backlog.popleft())

    def _send(
        self, qp: QueuePair, stream: int, parity: int, seq: int, frame_bytes: int, rows: RowSource | None
    ) -> None:
        head = frame_bytes if frame_bytes <= qp.inline_bytes and rows is None else HEADER_BYTES
        covered = self._ledger.post(1 if head == frame_bytes else 2 if rows is None else _WRITES_PER_FRAME)
        source, target = self._addresses[NUM_PARITIES * stream + parity]
        imm = stream << _SEQ_BITS | seq & _SEQ_MASK
        try:
            qp.post_frame(self._serial | covered, covered > 0, source, target, head, frame_bytes, imm, rows)
        except TransportError as error:
            self._failure = Failure(str(error), False)

    def _receive(self, qp: QueuePair, imm: int) -> None:
        stream = imm >> _SEQ_BITS
        if stream >= self._spec.num_streams:
            self._failure = Failure(f"immediate {imm:#010x} names stream {stream} of {self._spec.num_streams}", True)
            return
        # The sequence only goes up: the next number above the last one with these low bits. What went down or stood
        # still becomes a number that the header contradicts, and is rejected there.
        seq = self._last_seq[stream]
        seq += (imm - seq) & _SEQ_MASK
        self._last_seq[stream] = seq
        try:
            qp.post_receive(self._serial | _RECEIVE)
        except TransportError as error:
            self._failure = Failure(str(error), False)
        self._arrived.append(Posted(stream, seq & 1, seq))

    def _fail(self, wr_id: int, status: int) -> None:
        what = "receive" if wr_id & _RECEIVE else "probe of the path" if wr_id & _PROBE else "write"
        # What fails for the failure of another request may report first; the other one's status is the cause.
        self._cause_unknown = status == FLUSHED
        self._failure = Failure(f"RDMA {what} over {self._endpoint.selection.port.device}: {explain(status)}", False)
        self._backlog.clear()


class _Slots:
    """Slots in page-aligned anonymous memory, registered as one region. The memory goes with its last view."""

    def __init__(
        self, num_streams: int, slot_bytes: int, endpoint: Endpoint, regions: list[Region], *, remote: bool
    ) -> None:
        if slot_bytes > endpoint.selection.port.max_message_bytes:
            raise TransportError(
                f"a slot of {slot_bytes} bytes exceeds the port's messages of "
                f"{endpoint.selection.port.max_message_bytes}: lower max_tokens"
            )
        num_bytes = num_streams * NUM_PARITIES * slot_bytes
        mapping = mmap.mmap(-1, num_bytes)
        memory = memoryview(mapping)
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        self.slots = [memory[offset : offset + slot_bytes] for offset in range(0, num_bytes, slot_bytes)]
        self.region = endpoint.adapter.register(address, num_bytes, remote=remote)
        regions.append(self.region)


def _number(descriptor: dict[str, Any], name: str, num_bits: int) -> int:
    value = descriptor.get(name)
    if type(value) is not int or not 0 <= value < 1 << num_bits:
        raise ProtocolError(f"verbs descriptor: {name} is {str(value)[:40]!a}, expected {num_bits} bits")
    return value


def _gid(descriptor: dict[str, Any]) -> str:
    value = str(descriptor.get("gid"))  # an integer would pass for an address
    try:
        return str(ipaddress.IPv6Address(value))
    except ValueError:
        raise ProtocolError(f"verbs descriptor: {value[:40]!a} is no GID") from None
