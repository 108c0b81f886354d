"""Which sequence numbers a pair may send, accept and answer: the slots' flow control. Pure.

A stream's dispatches are numbered by its attention rank; a pair sees a rising subsequence of them. Number seq
uses the slots of parity seq & 1. Rules, for one pair in one generation:

- A dispatch may use a parity only when the exchange that used it before has been answered. Answers are
  cumulative: the answer to a later seq of the stream also settles earlier ones.
- The FFN side accepts a seq only if it is higher than any before it on that stream and its slot is not one that
  still waits for an answer, and an epoch only if it is live and not lower than the stream's last one.
- The FFN side answers a seq once, and never one older than the newest it has answered.
- The attention side takes a combine for the newest dispatch; one for an older, still unanswered dispatch is
  superseded (counted, not delivered); anything else is an error.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from enum import Enum, auto

from stepmesh.errors import FrameError, SlotBusyError, StaleArrivalError
from stepmesh.types import Header


class Verdict(Enum):
    """What to do with a frame that is well-formed."""

    DELIVER = auto()
    SUPERSEDED = auto()  # a newer dispatch took its place: drop it silently
    FUTURE_EPOCH = auto()  # keep it: this end has not heard of that epoch yet


@dataclass(slots=True)
class _Exchange:
    """A dispatch on its way, as the attention side remembers it."""

    seq: int
    epoch: int
    num_tokens: int
    sent_ns: int


class DispatchWindow:
    """Attention side of a pair."""

    def __init__(self, num_streams: int) -> None:
        # open[stream]: unanswered exchanges, oldest first; at most one per parity.
        self._open: list[list[_Exchange]] = [[] for _ in range(num_streams)]
        self._num_open = 0

    @property
    def pending(self) -> bool:
        """True while any dispatch waits for its answer."""
        return self._num_open > 0

    def check_free(self, stream: int, seq: int) -> None:
        """Raise SlotBusyError when the slot for `seq` still belongs to an unanswered exchange."""
        for exchange in self._open[stream]:
            if (exchange.seq ^ seq) & 1 == 0:
                raise SlotBusyError(f"stream {stream}: seq {exchange.seq} has no answer yet, {seq} needs its slot")

    def sent(self, stream: int, seq: int, epoch: int, num_tokens: int, now_ns: int) -> None:
        self._open[stream].append(_Exchange(seq, epoch, num_tokens, now_ns))
        self._num_open += 1

    def accept(self, header: Header) -> tuple[Verdict, int]:
        """Judge a combine; returns (verdict, time the dispatch was sent). Raises FrameError."""
        exchanges = self._open[header.stream]
        place = len(exchanges) - 1
        while place >= 0 and exchanges[place].seq != header.seq:
            place -= 1
        if place < 0:
            raise FrameError(f"combine for seq {header.seq} of stream {header.stream}, which awaits no answer")
        exchange = exchanges[place]
        if header.epoch != exchange.epoch:
            raise FrameError(f"combine of epoch {header.epoch} for a dispatch of epoch {exchange.epoch}")
        if header.num_tokens != exchange.num_tokens:
            raise FrameError(f"combine of {header.num_tokens} rows for a dispatch of {exchange.num_tokens}")
        newest = place == len(exchanges) - 1
        del exchanges[: place + 1]
        self._num_open -= place + 1
        return (Verdict.DELIVER if newest else Verdict.SUPERSEDED), exchange.sent_ns

    def oldest_sent_ns(self) -> int | None:
        """When the oldest unanswered dispatch was sent, or None."""
        return min((stream[0].sent_ns for stream in self._open if stream), default=None)


class CombineWindow:
    """FFN side of a pair."""

    def __init__(self, num_streams: int) -> None:
        self._seen_seq = [0] * num_streams
        self._seen_epoch = [0] * num_streams
        self._open: list[set[int]] = [set() for _ in range(num_streams)]

    @property
    def pending(self) -> bool:
        """True while any accepted dispatch waits for this rank's answer."""
        return any(self._open)

    def accept(self, header: Header, live_epochs: Container[int], newest_epoch: int) -> Verdict:
        """Judge a dispatch. Raises FrameError."""
        stream = header.stream
        if header.seq <= self._seen_seq[stream]:
            raise FrameError(f"seq {header.seq} of stream {stream} is not above {self._seen_seq[stream]}")
        if header.epoch < self._seen_epoch[stream]:
            raise FrameError(f"epoch {header.epoch}, stream {stream} is already in {self._seen_epoch[stream]}")
        for other in self._open[stream]:
            if (other ^ header.seq) & 1 == 0:
                raise FrameError(
                    f"seq {header.seq} of stream {stream} took the slot of {other}, which has no answer yet"
                )
        if header.epoch > newest_epoch:
            return Verdict.FUTURE_EPOCH
        if header.epoch not in live_epochs:
            raise FrameError(f"epoch {header.epoch} is not live (newest {newest_epoch})")
        self._seen_seq[stream] = header.seq
        self._seen_epoch[stream] = header.epoch
        self._open[stream].add(header.seq)
        return Verdict.DELIVER

    def check_answerable(self, stream: int, seq: int) -> None:
        """Raise StaleArrivalError unless `seq` was accepted here and awaits its answer."""
        if seq not in self._open[stream]:
            raise StaleArrivalError(f"seq {seq} of stream {stream} awaits no answer (answered or superseded)")

    def answered(self, stream: int, seq: int) -> None:
        """`seq` was answered; older ones of the stream are settled with it."""
        self._open[stream] = {other for other in self._open[stream] if other > seq}

    def idle_is_current(self, stream: int, after_seq: int) -> bool:
        """False when a dispatch newer than the idle notice was seen."""
        return after_seq >= self._seen_seq[stream]
