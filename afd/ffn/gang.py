"""Which dispatches an FFN rank computes together. Pure: arrivals and `now` in, batches and a deadline out.

A **gang** is the set of attention workers that go through one step of one stream in lock-step, so that the FFN sees
one big batch per layer. FFN rank `stream mod num_ffn` (the *former*) decides it at layer 0 and answers with
(gang_id, member mask); members echo both at every later layer, so every FFN rank waits for the same set and needs no
agreement. Other ranks answer layer 0 with whatever is there.

Two epochs may be live for a moment. A gang is of one epoch, since its members must reach the same FFN ranks; who still
begins steps in an older one is served at once, beside the gang.

Bounds, so that nobody waits for ever:
  layer 0, members of the last gang     `window_s` (a quarter of the measured step, at most the plan's window)
  layer 0, newcomers while a gang runs  one predicted step and its window, then all of them as a gang of their own
  later layers                          `straggler_s`; who is missing then is detached: served alone until its layer 0
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

import msgspec

WINDOW_SHARE = 0.25
"""Share of the measured step for which members may wait for one that is late. Going without it costs the late one a
whole step (it is parked until the next layer 0), so waiting pays while less than half a step is to be expected."""


class Arrival(msgspec.Struct, frozen=True):
    """One dispatch as the gang logic sees it. token: the caller's handle, given back in the batch.

    A struct: one is made for every exchange, at a tenth of what a frozen dataclass costs.
    """

    rank: int
    stream: int
    layer: int
    epoch: int
    gang_id: int
    mask: int
    num_tokens: int
    at_s: float
    token: object = None


@dataclass(frozen=True, slots=True)
class GangBatch:
    """Arrivals to compute as one batch, in rank order. gang_id/mask: for the answer (0 where not the former)."""

    stream: int
    layer: int
    gang_id: int
    mask: int
    arrivals: tuple[Arrival, ...]
    first_s: float

    @property
    def num_tokens(self) -> int:
        return sum(a.num_tokens for a in self.arrivals)


class ReservedGang(NamedTuple):
    """A gang of one attention worker for a step that has not begun; see `GangTable.reserve`."""

    rank: int
    stream: int
    epoch: int
    id: int
    mask: int


@dataclass(slots=True)
class _Group:
    """Arrivals that are computed together. ranks: mask of those that are here; mask: of those that ought to come.

    alone: of one that is detached.
    first_s: when the first came.
    regular_s: likewise of members of the last gang.
    """

    layer: int
    epoch: int
    mask: int
    alone: bool
    arrivals: dict[int, Arrival] = field(default_factory=dict)  # by attention rank
    ranks: int = 0
    first_s: float = inf
    regular_s: float = inf

    def put(self, arrival: Arrival, members: int) -> None:
        bit = 1 << arrival.rank
        self.arrivals[arrival.rank] = arrival
        self.ranks |= bit
        self.first_s = min(self.first_s, arrival.at_s)
        if members & bit:
            self.regular_s = min(self.regular_s, arrival.at_s)


_Key = tuple[int, int, int, int]  # layer, epoch, gang_id, attention rank of one that is detached or -1


@dataclass(slots=True)
class _Stream:
    """Attention ranks are kept as masks: with 64 workers there are 64 arrivals a layer, each of which looks at all."""

    pending: dict[int, _Key] = field(default_factory=dict)  # by attention rank: at most one exchange each
    groups: dict[_Key, _Group] = field(default_factory=dict)
    at_zero: int = 0  # pending at layer 0
    active: int = 0  # not idle in this stream
    members: int = 0  # of the gang that runs; shrinks as they come back to layer 0
    detached: int = 0  # left out mid-step: served alone until their next layer 0
    epochs: dict[int, int] = field(default_factory=dict)  # by attention rank: of the newest step that it began
    epoch: int = 0  # the newest of them
    step_s: float = 0.0  # moving average of the time between two formations
    formed_s: float | None = None  # last formation

    @property
    def running(self) -> int:
        """Members of the last gang that others may wait for."""
        return self.members & ~self.detached

    def put(self, arrival: Arrival) -> None:
        rank, layer, epoch = arrival.rank, arrival.layer, arrival.epoch
        alone = layer > 0 and bool(self.detached >> rank & 1)
        key = (layer, epoch, arrival.gang_id if layer else 0, rank if alone else -1)
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = _Group(layer, epoch, arrival.mask, alone)
        group.put(arrival, self.members)
        self.pending[rank] = key
        if layer == 0:
            self.at_zero |= 1 << rank

    def remove(self, rank: int) -> Arrival | None:
        """Forget what is pending of an attention rank."""
        key = self.pending.pop(rank, None)
        if key is None:
            return None
        self.at_zero &= ~(1 << rank)
        group = self.groups.pop(key)
        arrival = group.arrivals.pop(rank)
        for other in group.arrivals.values():
            self.put(other)
        return arrival

    def take(self, key: _Key) -> list[Arrival]:
        """Forget a group, whose arrivals are computed now."""
        group = self.groups.pop(key)
        for rank in group.arrivals:
            del self.pending[rank]
        self.at_zero &= ~group.ranks
        return sorted(group.arrivals.values(), key=lambda a: a.rank)

    def form(self, members: int, now: float) -> None:
        """A gang of these members begins a step."""
        if self.formed_s is not None and self.members:
            took_s = now - self.formed_s
            self.step_s = took_s if self.step_s == 0.0 else 0.8 * self.step_s + 0.2 * took_s
        self.formed_s = now
        self.members = members

    def began(self, rank: int, epoch: int | None) -> None:
        """The epoch of the rank's newest step; None = the rank is gone."""
        if self.epochs.get(rank) != epoch:
            if epoch is None:
                del self.epochs[rank]
            else:
                self.epochs[rank] = epoch
            self.epoch = max(self.epochs.values(), default=0)


def mask_of(ranks: Iterable[int]) -> int:
    """Attention ranks -> member mask (bit r = rank r)."""
    mask = 0
    for rank in ranks:
        mask |= 1 << rank
    return mask


def ranks_of(mask: int) -> list[int]:
    """Member mask -> attention ranks, ascending."""
    return [rank for rank in range(mask.bit_length()) if mask >> rank & 1]


class GangTable:
    """All streams of one FFN rank. Times are seconds of any monotonic clock.

    Main thread only, but for `has_pending`, `under_way` and `num_active_streams`, which any thread may ask.
    """

    def __init__(
        self,
        rank: int,
        num_ffn: int,
        *,
        num_streams: int = 4,
        max_window_s: float = 0.005,
        straggler_s: float = 0.5,
    ):
        self._rank = rank
        self._num_ffn = num_ffn
        self._max_window_s = max_window_s
        self._straggler_s = straggler_s
        self._streams = tuple(_Stream() for _ in range(num_streams))
        self._present = 0  # mask of attention ranks
        self._counter = 0
        self.num_stragglers: dict[int, int] = {}

    # -- events -------------------------------------------------------------------------------------------

    def arrive(self, arrival: Arrival) -> None:
        """A dispatch came in. A second one of the same (rank, stream) replaces the first (it was re-sent)."""
        stream, bit = self._streams[arrival.stream], 1 << arrival.rank
        self._present |= bit
        stream.remove(arrival.rank)
        stream.active |= bit
        if arrival.layer == 0:
            stream.detached &= ~bit
            stream.began(arrival.rank, arrival.epoch)
        stream.put(arrival)

    def idle(self, rank: int, stream_idx: int) -> None:
        """The attention rank has nothing to run in that stream: nobody waits for it."""
        stream = self._streams[stream_idx]
        if rank not in stream.pending:
            stream.active &= ~(1 << rank)
            stream.members &= ~(1 << rank)

    def lost(self, rank: int) -> list[Arrival]:
        """The attention rank is gone: its arrivals (returned, to be dropped) and memberships end."""
        others = ~(1 << rank)
        self._present &= others
        dropped = []
        for stream in self._streams:
            stream.active &= others
            stream.members &= others
            stream.detached &= others
            stream.began(rank, None)
            if (arrival := stream.remove(rank)) is not None:
                dropped.append(arrival)
        return dropped

    def limit_window(self, max_window_s: float) -> None:
        """A new plan: no window at layer 0 is longer."""
        self._max_window_s = max_window_s

    # -- decisions ----------------------------------------------------------------------------------------

    def next_batch(self, now: float) -> GangBatch | None:
        """The complete gang whose first arrival is oldest, or None. The caller computes and answers it."""
        best_s, best = inf, None
        for idx, stream in enumerate(self._streams):
            for key, group in stream.groups.items():
                if group.first_s < best_s and self._goes_at(idx, stream, group) <= now:
                    best_s, best = group.first_s, (idx, key)
        return self._take(*best, now) if best is not None else None

    def deadline(self) -> float | None:
        """When `next_batch` may have something without a new arrival; None = only an arrival can help."""
        times = [
            self._goes_at(idx, stream, group)
            for idx, stream in enumerate(self._streams)
            for group in stream.groups.values()
        ]
        return min(times, default=None)

    @property
    def num_active_streams(self) -> int:
        """Streams in which any attention worker is at work: with one, all of them wait for this side's answer."""
        return sum(1 for stream in self._streams if stream.active)

    @property
    def has_pending(self) -> bool:
        return any(stream.pending for stream in self._streams)

    @property
    def under_way(self) -> bool:
        """An attention worker is in the middle of a step, here or at its own side: rows are here, or will come."""
        return any(stream.active for stream in self._streams)

    def step_s(self, stream_idx: int) -> float:
        """Moving average of that stream's step; 0 where another rank forms its gangs, or too early to tell."""
        return self._streams[stream_idx].step_s

    def reserve(self, rank: int, stream_idx: int, epoch: int) -> ReservedGang | None:
        """A gang for this attention worker's next step in the stream, which nobody else can be waited for in.

        For a caller that answers layer 0 itself, before anything else arrives, and says so to `form`. A reservation
        that is not used binds nobody. None where anybody else is at work, or another rank forms the stream's gangs.
        """
        stream, bit = self._streams[stream_idx], 1 << rank
        if self._present != bit or stream.active != bit or self.has_pending or self.num_active_streams > 1:
            return None
        if stream.epoch != epoch or not self._is_former(stream_idx):
            return None
        return ReservedGang(rank, stream_idx, epoch, self._next_id(epoch), bit)

    def form(self, gang: ReservedGang, now: float) -> None:
        """The step for which the gang was reserved has begun."""
        stream = self._streams[gang.stream]
        stream.detached &= ~gang.mask
        stream.began(gang.rank, gang.epoch)
        stream.form(gang.mask, now)

    # -- details ------------------------------------------------------------------------------------------

    def _is_former(self, stream_idx: int) -> bool:
        return stream_idx % self._num_ffn == self._rank

    def window_s(self, stream_idx: int) -> float:
        """How long layer 0 may wait for the members of the last gang: 0 with one attention worker."""
        if not self._present & (self._present - 1):
            return 0.0
        return min(self._max_window_s, WINDOW_SHARE * self._streams[stream_idx].step_s)

    def _goes_at(self, idx: int, stream: _Stream, group: _Group) -> float:
        """When a group is computed if nobody else arrives; when it began if it waits for nobody."""
        if group.layer:
            waits = not group.alone and self._missing(stream, group)
            return group.first_s + self._straggler_s if waits else group.first_s
        if not self._is_former(idx) or group.epoch < stream.epoch:
            return group.first_s
        if self._parks(stream):  # newcomers: a step, and the window at its end
            return group.first_s + max(stream.step_s + self.window_s(idx), self._max_window_s)
        if stream.running & stream.active & ~stream.at_zero:
            began_s = group.regular_s if group.regular_s < inf else group.first_s
            return began_s + self.window_s(idx)
        return group.first_s

    def _parks(self, stream: _Stream) -> bool:
        """Arrivals at layer 0 are newcomers while a gang is under way: no member has come back to layer 0 yet."""
        running = stream.running
        return bool(running) and not running & stream.at_zero

    def _missing(self, stream: _Stream, group: _Group) -> int:
        """Members of the group's gang that are alive, attached, not past its epoch (a restarted one) and not here."""
        missing = group.mask & self._present & ~stream.detached & ~group.ranks
        if missing and stream.epoch > group.epoch:
            missing = mask_of(r for r in ranks_of(missing) if stream.epochs.get(r, 0) <= group.epoch)
        return missing

    def _take(self, idx: int, key: _Key, now: float) -> GangBatch:
        stream = self._streams[idx]
        group = stream.groups[key]
        layer, _, gang_id, _ = key
        mask = group.mask
        if layer == 0:
            gang_id = mask = 0
            if self._is_former(idx):
                gang_id, mask = self._form(stream, group, now)
        arrivals = stream.take(key)
        if layer and not group.alone:
            for rank in ranks_of(self._missing(stream, group)):
                self._detach(stream, rank)
        return GangBatch(idx, layer, gang_id, mask, tuple(arrivals), group.first_s)

    def _detach(self, stream: _Stream, rank: int) -> None:
        stream.detached |= 1 << rank
        stream.members &= ~(1 << rank)
        self.num_stragglers[rank] = self.num_stragglers.get(rank, 0) + 1
        if (arrival := stream.remove(rank)) is not None:  # it is elsewhere in its step: alone from here on
            stream.put(arrival)

    def _form(self, stream: _Stream, group: _Group, now: float) -> tuple[int, int]:
        beside = self._parks(stream) or group.epoch < stream.epoch
        if not beside:  # newcomers that lost patience, or an older epoch, do not replace the gang that runs
            stream.form(group.ranks, now)
        return self._next_id(group.epoch), group.ranks

    def _next_id(self, epoch: int) -> int:
        self._counter += 1
        return (epoch & 0xFFFF) << 48 | self._rank << 32 | (self._counter & 0xFFFFFFFF)
