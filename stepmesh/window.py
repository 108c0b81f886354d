"""Which sequence numbers a pair may send, accept and answer: the slots' flow control. Pure.

A stream's dispatches are numbered by its attention rank; a pair sees a rising subsequence of them. Number seq
uses the slots of parity seq & 1. Rules, for one pair in one generation:

- A dispatch may use a parity only when the exchange that used it before has been answered. Answers are
  cumulative: the answer to a later seq of the stream also settles earlier ones.
- The FFN side accepts a seq only if it is higher than any before it on that stream and its slot is not one that
  still waits for an answer, and an epoch only if the peer may be in it (`PeerEpochs`) and it is not lower than the
  stream's last one.
- The FFN side answers a seq once, and never one older than the newest it has answered.
- The attention side takes a combine for the newest dispatch; one for an older, still unanswered dispatch is
  superseded (counted, not delivered); anything else is an error.
"""

from __future__ import annotations

from typing import NamedTuple

from stepmesh.errors import FrameError, SlotBusyError, StaleArrivalError
from stepmesh.layout import NUM_PARITIES
from stepmesh.topology import PeerEpochs
from stepmesh.types import Header, RowIdx
from stepmesh.wire import check_answer


class Exchange(NamedTuple):
    """A dispatch on its way, as the attention side remembers it. The pairs of one dispatch share it."""

    seq: int
    epoch: int
    step: int
    layer: int
    num_tokens: int
    sent_at: float
    row_idx: RowIdx | None = None  # which rows went, if not all


class DispatchWindow:
    """Attention side of a pair."""

    def __init__(self, num_streams: int) -> None:
        # By slot: the exchange that waits for its answer.
        self._open: list[Exchange | None] = [None] * (NUM_PARITIES * num_streams)

    @property
    def pending(self) -> bool:
        """True while any dispatch waits for its answer. Any thread."""
        return any(self._open)

    def check_free(self, stream: int, seq: int) -> None:
        """Raise SlotBusyError when the slot for `seq` still belongs to an unanswered exchange."""
        exchange = self._open[NUM_PARITIES * stream + (seq & 1)]
        if exchange is not None:
            raise SlotBusyError(f"stream {stream}: seq {exchange.seq} has no answer yet, {seq} needs its slot")

    def is_free(self, stream: int) -> bool:
        """True while no exchange of the stream waits for its answer."""
        first = NUM_PARITIES * stream
        return not any(self._open[first : first + NUM_PARITIES])

    def sent(self, stream: int, exchange: Exchange) -> None:
        self._open[NUM_PARITIES * stream + (exchange.seq & 1)] = exchange

    def accept(self, header: Header) -> Exchange | None:
        """Judge a combine: the exchange that it answers, or None if a newer one took its place. Raises FrameError."""
        slot = NUM_PARITIES * header.stream + (header.seq & 1)
        exchange = self._open[slot]
        if exchange is None or exchange.seq != header.seq:
            raise FrameError(f"combine for seq {header.seq} of stream {header.stream}, which awaits no answer")
        check_answer(header, exchange)
        self._open[slot] = None
        other = self._open[slot ^ 1]
        if other is None:
            return exchange
        if other.seq > exchange.seq:
            return None
        self._open[slot ^ 1] = None
        return exchange

    def oldest_sent_at(self) -> float | None:
        """When the oldest unanswered dispatch was sent, or None."""
        return min((exchange.sent_at for exchange in self._open if exchange is not None), default=None)


class CombineWindow:
    """FFN side of a pair. An exchange is named by the very header that was accepted for it."""

    def __init__(self, num_streams: int) -> None:
        self._seen_seq = [0] * num_streams
        self._seen_epoch = [0] * num_streams
        self._open: list[Header | None] = [None] * (NUM_PARITIES * num_streams)  # by slot: accepted, not answered

    @property
    def pending(self) -> bool:
        """True while any accepted dispatch waits for this rank's answer. Any thread."""
        return any(self._open)

    def accept(self, header: Header, epochs: PeerEpochs) -> bool:
        """Judge a dispatch. False: keep it, this end has not heard of its epoch yet. Raises FrameError."""
        stream, seq, epoch = header.stream, header.seq, header.epoch
        if seq <= self._seen_seq[stream]:
            raise FrameError(f"seq {seq} of stream {stream} is not above {self._seen_seq[stream]}")
        if epoch < self._seen_epoch[stream]:
            raise FrameError(f"epoch {epoch}, stream {stream} is already in {self._seen_epoch[stream]}")
        slot = NUM_PARITIES * stream + (seq & 1)
        other = self._open[slot]
        if other is not None:
            raise FrameError(f"seq {seq} of stream {stream} took the slot of {other.seq}, which has no answer yet")
        if not epochs.hold(epoch):
            if epoch > epochs.newest:
                return False
            raise FrameError(epochs.objection(epoch))
        self._seen_seq[stream] = seq
        self._seen_epoch[stream] = epoch
        self._open[slot] = header
        return True

    def check_answerable(self, header: Header) -> None:
        """Raise StaleArrivalError unless it was accepted here and awaits its answer."""
        if self._open[NUM_PARITIES * header.stream + (header.seq & 1)] is not header:
            raise StaleArrivalError(
                f"seq {header.seq} of stream {header.stream} awaits no answer: answered, superseded, or of a lost pair"
            )

    def answered(self, header: Header) -> None:
        """It was answered; an older one of the stream is settled with it."""
        slot = NUM_PARITIES * header.stream + (header.seq & 1)
        self._open[slot] = None
        other = self._open[slot ^ 1]
        if other is not None and other.seq < header.seq:
            self._open[slot ^ 1] = None

    def is_settled(self, header: Header) -> bool:
        """True while it is the stream's newest dispatch, and nothing of the stream waits for an answer."""
        first = NUM_PARITIES * header.stream
        settled = not any(self._open[first : first + NUM_PARITIES])
        return settled and self._seen_seq[header.stream] == header.seq

    def passed(self, stream: int, seq: int) -> None:
        """All dispatches up to `seq`, of the epoch of the last one before them, were taken and answered."""
        self._seen_seq[stream] = seq

    def idle_is_current(self, stream: int, after_seq: int) -> bool:
        """False when a dispatch newer than the idle notice was seen."""
        return after_seq >= self._seen_seq[stream]
