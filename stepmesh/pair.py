"""A pair that is up: one generation of this rank and one peer. Joins link, session, channel, window and slots.

`AttentionPair` sends dispatches and takes combines, `FfnPair` the other way round. Everything here runs in the
mesh's main thread, but for `beat`. A FrameError out of `poll`, or any failure the mesh sees, ends the generation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from stepmesh.config import MeshConfig
from stepmesh.errors import ConfigError, FrameError
from stepmesh.lane import Lane
from stepmesh.layout import NUM_PARITIES
from stepmesh.session import Notice, Session
from stepmesh.slots import CombineView, DispatchView, Slot, copy_section, rises_below
from stepmesh.stats import PeerStats
from stepmesh.topology import PeerEpochs
from stepmesh.trace import Stage, Trace
from stepmesh.transports.base import Channel, Fabric, Link, Posted, close_fds
from stepmesh.types import (
    CombineArrived,
    CombineMeta,
    DispatchArrived,
    DispatchMeta,
    FrameKind,
    Header,
    RankId,
    Rows,
)
from stepmesh.window import CombineWindow, DispatchWindow, Exchange
from stepmesh.wire import (
    CHECKSUM_CRC32,
    CHECKSUM_NONE,
    FIELD_ERRORS,
    ControlFrame,
    HeaderRules,
    Heartbeat,
    check_frame,
    check_header,
    encode_close,
    encode_heartbeat,
    read_good_frame,
    read_header,
    seal_checksum,
    write_frame,
    write_generation,
)

_LOW64 = (1 << 64) - 1
# Looked up once: a member of an enum costs a call, each time.
_DISPATCH, _COMBINE, _SPARSE_DISPATCH = int(FrameKind.DISPATCH), int(FrameKind.COMBINE), int(FrameKind.SPARSE_DISPATCH)
_DISPATCH_POSTED, _DISPATCH_ARRIVED = Stage.DISPATCH_POSTED, Stage.DISPATCH_ARRIVED
_COMBINE_POSTED, _COMBINE_ARRIVED = Stage.COMBINE_POSTED, Stage.COMBINE_ARRIVED

_new = tuple.__new__  # a NamedTuple without the Python call that its own constructor is


class Environment(NamedTuple):
    """What every pair of a mesh shares."""

    config: MeshConfig
    fabric: Fabric
    trace: Trace


class Identity(NamedTuple):
    """Which peer, which process of it, which generation of the pair, over what and why."""

    peer: RankId
    incarnation: str
    generation: int
    transport_reason: str


class Pair(ABC):
    """What both roles have in common."""

    receives: FrameKind

    def __init__(self, env: Environment, identity: Identity, link: Link, channel: Channel, stats: PeerStats) -> None:
        config = env.config
        self.env = env
        self.identity = identity
        self.peer = identity.peer
        self.generation = identity.generation
        self.link = link
        self.channel = channel
        self.stats = stats
        self.session = Session(config, env.fabric.now())
        self.leftover: list[ControlFrame] = []  # frames that came right behind the handshake
        self._layout = config.layout
        self.rules = HeaderRules.of(self.receives, config.layout, config.num_streams, identity.generation)
        self._record = env.trace.record
        self._now = env.fabric.now
        self._checksum_kind = CHECKSUM_CRC32 if config.checksum else CHECKSUM_NONE
        places = [(stream, parity) for stream in range(config.num_streams) for parity in range(NUM_PARITIES)]
        self.lanes: dict[int, Lane] = {}  # by stream: kept as long as the pair is, see stepmesh.lanes
        self._tx = [Slot(channel.outgoing(*place), config.layout) for place in places]
        self._rx = [Slot(channel.incoming(*place), config.layout) for place in places]

    @property
    @abstractmethod
    def pending(self) -> bool:
        """This rank owes the peer an answer, or waits for one. Any thread."""

    def poll(self) -> Sequence[DispatchArrived | CombineArrived]:
        """What has arrived in this rank's slots. Raises FrameError."""
        return self.take(self.channel.poll())

    @abstractmethod
    def take(self, posts: Sequence[Posted]) -> Sequence[DispatchArrived | CombineArrived]:
        """Check and map what the channel says has arrived. Raises FrameError."""

    def oldest_sent_at(self) -> float | None:
        """When this rank's oldest unanswered dispatch was sent, in seconds."""
        return None

    def tx_slot(self, stream: int, seq: int) -> Slot:
        return self._tx[NUM_PARITIES * stream + (seq & 1)]

    def beat(self, counter: int, pending: bool) -> None:
        """Send a heartbeat. Any thread."""
        self.link.send(encode_heartbeat(Heartbeat(counter, pending or self.pending)))

    def receive(self, frames: Sequence[ControlFrame], now: float) -> list[Notice]:
        """Take control frames; what they mean for the mesh. Raises ProtocolError."""
        notices = []
        for frame in frames:
            close_fds(frame.fds)  # all of them first: a bad frame must not keep those behind it open
        for frame in frames:
            notice = self.session.receive(frame, now)
            if notice is not None:
                notices.append(notice)
        return notices

    def close(self, reason: str, *, retryable: bool) -> None:
        """Tell the peer why, then revoke: nothing it writes from now on is ever looked at."""
        for frame in self.leftover:
            close_fds(frame.fds)
        self.leftover = []
        self.link.send(encode_close(reason, retryable=retryable))
        self.link.close()
        self.channel.close()

    def _read_header(self, slot: Slot, posted: Posted) -> Header:
        """The header in a slot of ours, checked against the pair and the slot. Raises FrameError."""
        stream, parity, seq = posted
        header = read_header(slot.memory)
        check_header(header, self.rules)
        if header.seq != seq or header.stream != stream or seq & 1 != parity:
            raise FrameError(f"frame says stream {header.stream} seq {header.seq}, its slot stream {stream} seq {seq}")
        return header

    def _publish(self, slot: Slot, stream: int, seq: int, payload_bytes: int, frame_bytes: int) -> None:
        """Hand a frame that is whole, but for its checksum, to the channel."""
        if self._checksum_kind is CHECKSUM_CRC32:
            seal_checksum(slot.memory, payload_bytes)
        self.channel.post(stream, seq & 1, seq, frame_bytes)
        stats = self.stats
        stats.sent_messages += 1
        stats.sent_bytes += payload_bytes


class AttentionPair(Pair):
    """Attention rank's end: dispatches out, combines in."""

    receives = FrameKind.COMBINE

    def __init__(self, env: Environment, identity: Identity, link: Link, channel: Channel, stats: PeerStats) -> None:
        super().__init__(env, identity, link, channel, stats)
        self.window = DispatchWindow(env.config.num_streams)
        self._dtype = int(self._layout.dispatch_dtype)

    @property
    def pending(self) -> bool:
        return self.window.pending

    def oldest_sent_at(self) -> float | None:
        return self.window.oldest_sent_at()

    def write_dispatch(
        self,
        slot: Slot,
        seq: int,
        meta: DispatchMeta,
        num_tokens: int,
        top_k: int,
        payload_bytes: int,
        batch_tokens: int | None,
    ) -> None:
        """Put header and trailer around the payload in the slot of `seq`; of a batch of `batch_tokens` if sparse.

        Nothing is sent yet. Raises ConfigError for a `meta` out of range.
        """
        try:
            write_frame(
                slot.memory,
                _DISPATCH if batch_tokens is None else _SPARSE_DISPATCH,
                meta.flags,
                meta.epoch,
                self.generation,
                seq,
                meta.step,
                meta.gang_id,
                0,
                meta.member_mask & _LOW64,
                meta.member_mask >> 64,
                num_tokens,
                batch_tokens or 0,
                payload_bytes,
                meta.stream,
                meta.layer,
                top_k,
                self._dtype,
                self._checksum_kind,
            )
        except FIELD_ERRORS as error:
            raise ConfigError(f"{meta} does not fit the header: {error}") from None

    def copy_dispatch(self, written: Slot, stream: int, seq: int, frame_bytes: int) -> Slot:
        """The same dispatch as `written` for another peer: one copy of the whole frame, but for the generation."""
        slot = self.tx_slot(stream, seq)
        slot.memory[:frame_bytes] = written.memory[:frame_bytes]
        write_generation(slot.memory, self.generation)
        return slot

    def post_dispatch(self, slot: Slot, stream: int, exchange: Exchange, view: DispatchView) -> None:
        """Publish a dispatch that is written."""
        # Posted first, booked afterwards: the peer is at work meanwhile, and this thread alone takes its answer.
        self._publish(slot, stream, exchange.seq, view.payload_bytes, view.frame_bytes)
        self.window.sent(stream, exchange)
        self._record((exchange.sent_at, _DISPATCH_POSTED, self.peer, stream, exchange.layer, exchange.seq))

    def take(self, posts: Sequence[Posted]) -> list[CombineArrived]:
        arrived = []
        now = self._now()
        stats = self.stats
        for posted in posts:
            slot = self._rx[NUM_PARITIES * posted[0] + posted[1]]
            good = read_good_frame(slot.memory, self.rules, posted, Header)
            header = self._read_header(slot, posted) if good is None else good
            view = slot.combine(header.num_tokens)
            if good is None or header.payload_bytes != view.payload_bytes:
                check_frame(slot.memory, header, view.payload_bytes)
            exchange = self.window.accept(header)
            if exchange is None:
                stats.superseded += 1
                continue
            stats.received_messages += 1
            stats.received_bytes += view.payload_bytes
            stats.answers_waited_ns += int((now - exchange.sent_at) * 1e9)
            self._record((now, _COMBINE_ARRIVED, self.peer, header.stream, header.layer, header.seq))
            arrived.append(_new(CombineArrived, (self.peer, header, view.rows, view.scales, exchange.row_idx)))
        return arrived


class FfnPair(Pair):
    """FFN rank's end: dispatches in, combines out."""

    receives = FrameKind.DISPATCH

    def __init__(
        self,
        env: Environment,
        identity: Identity,
        link: Link,
        channel: Channel,
        stats: PeerStats,
        epochs: PeerEpochs,
    ) -> None:
        super().__init__(env, identity, link, channel, stats)
        self.epochs = epochs  # replaced by the roster whenever the members change
        self.window = CombineWindow(env.config.num_streams)
        self._dtype = int(self._layout.combine_dtype)
        self._parked: list[tuple[Posted, float]] = []  # dispatches of an epoch not heard of yet, and since when

    @property
    def pending(self) -> bool:
        return self.window.pending

    def unpark(self) -> list[Posted]:
        """A new epoch is live: what waited for it, to be taken again."""
        parked, self._parked = self._parked, []
        return [posted for posted, _ in parked]

    def check_parked(self, now: float, limit_s: float) -> None:
        """Raise FrameError when a dispatch has waited longer than `limit_s` for its epoch."""
        for posted, since in self._parked:
            if now - since > limit_s:
                raise FrameError(f"seq {posted.seq} of stream {posted.stream} is of an epoch that never became live")

    def is_settled(self, header: Header) -> bool:
        """True while this dispatch, of a live epoch, is its stream's newest, and nothing waits to be answered."""
        return not self._parked and self.window.is_settled(header) and self.epochs.hold(header.epoch)

    def combine_slot(self, arrival: DispatchArrived) -> CombineView:
        """The slot to write the answer into. Raises StaleArrivalError."""
        header = arrival.header
        self.window.check_answerable(header)
        return self.tx_slot(header.stream, header.seq).combine(header.num_tokens)

    def post_combine(self, arrival: DispatchArrived, meta: CombineMeta, rows: Rows, scales: Rows | None) -> None:
        """Answer a dispatch. Raises StaleArrivalError, or ConfigError for wrong rows."""
        header = arrival.header
        self.window.check_answerable(header)
        stream, seq = header.stream, header.seq
        slot = self.tx_slot(stream, seq)
        view = slot.combine(header.num_tokens)
        copy_section(view.rows, rows, "rows")
        copy_section(view.scales, scales, "scales")
        try:
            write_frame(
                slot.memory,
                _COMBINE,
                meta.flags,
                header.epoch,
                self.generation,
                seq,
                header.step,
                meta.gang_id,
                meta.compute_ns,
                meta.member_mask & _LOW64,
                meta.member_mask >> 64,
                header.num_tokens,
                meta.gang_tokens,
                view.payload_bytes,
                stream,
                header.layer,
                header.top_k,
                self._dtype,
                self._checksum_kind,
            )
        except FIELD_ERRORS as error:
            raise ConfigError(f"{meta} does not fit the header: {error}") from None
        self._publish(slot, stream, seq, view.payload_bytes, view.frame_bytes)
        self.window.answered(header)
        self._record((self._now(), _COMBINE_POSTED, self.peer, stream, header.layer, seq))

    def take(self, posts: Sequence[Posted]) -> list[DispatchArrived]:
        arrived = []
        epochs, stats = self.epochs, self.stats
        now = self._now()
        for posted in posts:
            slot = self._rx[NUM_PARITIES * posted[0] + posted[1]]
            good = read_good_frame(slot.memory, self.rules, posted, Header)
            header = self._read_header(slot, posted) if good is None else good
            view = slot.dispatch(header.num_tokens, header.top_k, header.kind == _SPARSE_DISPATCH)
            if good is None or header.payload_bytes != view.payload_bytes:
                check_frame(slot.memory, header, view.payload_bytes)
            row_idx = view.parts.row_idx
            if row_idx is not None and not rises_below(row_idx, header.gang_tokens):
                raise FrameError(f"row_idx does not rise strictly within a batch of {header.gang_tokens} rows")
            if self._parked:
                self._check_not_parked(posted)
            if not self.window.accept(header, epochs):
                self._parked.append((posted, now))
                continue
            stats.received_messages += 1
            stats.received_bytes += view.payload_bytes
            self._record((now, _DISPATCH_ARRIVED, self.peer, header.stream, header.layer, header.seq))
            arrived.append(_new(DispatchArrived, (self.peer, header, view.parts)))
        return arrived

    def _check_not_parked(self, posted: Posted) -> None:
        """A slot that holds a parked frame has no answer yet: a peer that posts into it breaks the protocol."""
        for other, _ in self._parked:
            if (other.stream, other.parity) == (posted.stream, posted.parity):
                raise FrameError(
                    f"seq {posted.seq} of stream {posted.stream} took the slot of {other.seq}, which has no answer yet"
                )
