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

WINDOW_SHARE = 0.25
"""Of the measured step: how long members may wait for one that is late. Going without it costs the late one a whole
step (it is parked until the next layer 0), so waiting pays for as long as less than half a step is to be expected."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One dispatch as the gang logic sees it. token: the caller's handle, given back in the batch."""

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


@dataclass(slots=True)
class _Stream:
    pending: dict[int, Arrival] = field(default_factory=dict)  # by attention rank: at most one exchange each
    active: set[int] = field(default_factory=set)  # ranks that are not idle in this stream
    members: set[int] = field(default_factory=set)  # of the gang that runs; shrinks as they come back to layer 0
    detached: set[int] = field(default_factory=set)  # left out mid-step: served alone until their next layer 0
    epochs: dict[int, int] = field(default_factory=dict)  # by attention rank: of the newest step that it began
    step_s: float = 0.0  # moving average of the time between two formations
    formed_s: float | None = None  # last formation

    @property
    def epoch(self) -> int:
        """The newest that anyone began a step in."""
        return max(self.epochs.values(), default=0)


def mask_of(ranks: Iterable[int]) -> int:
    """Attention ranks -> member mask (bit r = rank r)."""
    mask = 0
    for rank in ranks:
        mask |= 1 << rank
    return mask


class GangTable:
    """All streams of one FFN rank. Times are seconds of any monotonic clock."""

    def __init__(self, rank: int, num_ffn: int, *, max_window_s: float = 0.005, straggler_s: float = 0.5):
        self._rank = rank
        self._num_ffn = num_ffn
        self._max_window_s = max_window_s
        self._straggler_s = straggler_s
        self._streams: dict[int, _Stream] = {}
        self._present: set[int] = set()
        self._counter = 0
        self.num_stragglers: dict[int, int] = {}

    # -- events -------------------------------------------------------------------------------------------

    def arrive(self, arrival: Arrival) -> None:
        """A dispatch came in. A second one of the same (rank, stream) replaces the first (it was re-sent)."""
        stream = self._stream(arrival.stream)
        self._present.add(arrival.rank)
        stream.pending[arrival.rank] = arrival
        stream.active.add(arrival.rank)
        if arrival.layer == 0:
            stream.detached.discard(arrival.rank)
            stream.epochs[arrival.rank] = arrival.epoch

    def idle(self, rank: int, stream_idx: int) -> None:
        """The attention rank has nothing to run in that stream: nobody waits for it."""
        stream = self._stream(stream_idx)
        if rank not in stream.pending:
            stream.active.discard(rank)
            stream.members.discard(rank)

    def lost(self, rank: int) -> list[Arrival]:
        """The attention rank is gone: its arrivals (returned, to be dropped) and memberships end."""
        self._present.discard(rank)
        dropped = []
        for stream in self._streams.values():
            arrival = stream.pending.pop(rank, None)
            if arrival is not None:
                dropped.append(arrival)
            for group in (stream.active, stream.members, stream.detached):
                group.discard(rank)
            stream.epochs.pop(rank, None)
        return dropped

    def limit_window(self, max_window_s: float) -> None:
        """A new plan: no window at layer 0 is longer."""
        self._max_window_s = max_window_s

    # -- decisions ----------------------------------------------------------------------------------------

    def next_batch(self, now: float) -> GangBatch | None:
        """The complete gang whose first arrival is oldest, or None. The caller computes and answers it."""
        best: tuple[float, int, list[Arrival]] | None = None
        for idx, stream in self._streams.items():
            for group in self._ready(idx, stream, now):
                first_s = min([a.at_s for a in group])
                if best is None or first_s < best[0]:
                    best = (first_s, idx, group)
        if best is None:
            return None
        first_s, idx, group = best
        return self._take(idx, group, first_s, now)

    def deadline(self) -> float | None:
        """When `next_batch` may have something without a new arrival; None = only an arrival can help."""
        times: list[float] = []
        for idx, stream in self._streams.items():
            if stream.pending:
                wait_s = self._layer0_wait_s(idx, stream)
                times += [a.at_s + (self._straggler_s if a.layer else wait_s) for a in stream.pending.values()]
        return min(times, default=None)

    @property
    def num_active_streams(self) -> int:
        """Streams in which any attention worker is at work: with one, all of them wait for this side's answer."""
        return sum(1 for stream in self._streams.values() if stream.active)

    @property
    def has_pending(self) -> bool:
        return any(stream.pending for stream in self._streams.values())

    @property
    def under_way(self) -> bool:
        """An attention worker is in the middle of a step, here or at its own side: rows are here, or will come."""
        return any(stream.active for stream in self._streams.values())

    def step_s(self, stream_idx: int) -> float:
        """Moving average of that stream's step; 0 where another rank forms its gangs, or too early to tell."""
        return self._stream(stream_idx).step_s

    # -- details ------------------------------------------------------------------------------------------

    def _stream(self, idx: int) -> _Stream:
        stream = self._streams.get(idx)
        if stream is None:
            stream = self._streams[idx] = _Stream()
        return stream

    def _is_former(self, stream_idx: int) -> bool:
        return stream_idx % self._num_ffn == self._rank

    def window_s(self, stream_idx: int) -> float:
        """How long layer 0 may wait for the members of the last gang: 0 with one attention worker."""
        if len(self._present) < 2:
            return 0.0
        return min(self._max_window_s, WINDOW_SHARE * self._stream(stream_idx).step_s)

    def _layer0_wait_s(self, idx: int, stream: _Stream) -> float:
        """Longest wait of an arrival at layer 0."""
        if not self._is_former(idx):
            return 0.0
        return self._patience_s(idx, stream) if self._parks(stream) else self.window_s(idx)

    def _patience_s(self, idx: int, stream: _Stream) -> float:
        """How long newcomers wait for a gang that is under way: a step and the window at its end."""
        return max(stream.step_s + self.window_s(idx), self._max_window_s)

    def _parks(self, stream: _Stream) -> bool:
        """Arrivals at layer 0 are newcomers while a gang is under way: no member has come back to layer 0 yet."""
        running = stream.members - stream.detached if stream.detached else stream.members
        return bool(running) and not any(a.layer == 0 and a.rank in running for a in stream.pending.values())

    def _ready(self, idx: int, stream: _Stream, now: float) -> list[list[Arrival]]:
        groups: list[list[Arrival]] = []
        at_zero: list[Arrival] = []
        later: dict[tuple[int, int, int], list[Arrival]] = {}
        for arrival in stream.pending.values():
            if arrival.layer == 0:
                at_zero.append(arrival)
            elif arrival.rank in stream.detached:
                groups.append([arrival])
            else:
                later.setdefault((arrival.layer, arrival.epoch, arrival.gang_id), []).append(arrival)
        for group in later.values():
            waited = now - min([a.at_s for a in group]) >= self._straggler_s
            if waited or not self._missing(stream, group):
                groups.append(group)
        if at_zero:
            groups.extend(self._ready_at_zero(idx, stream, at_zero, now))
        return groups

    def _missing(self, stream: _Stream, group: list[Arrival]) -> set[int]:
        """Members of the group's gang that are alive, attached, not past its epoch (a restarted one) and not here."""
        mask, epoch = group[0].mask, group[0].epoch
        wanted = {r for r in self._present if mask >> r & 1 and stream.epochs.get(r, epoch) <= epoch}
        return wanted - stream.detached - {a.rank for a in group}

    def _ready_at_zero(self, idx: int, stream: _Stream, at_zero: list[Arrival], now: float) -> list[list[Arrival]]:
        if not self._is_former(idx):
            return [at_zero]
        oldest = min([a.epoch for a in at_zero])
        if oldest < stream.epoch:
            return [[a for a in at_zero if a.epoch == oldest]]
        if self._parks(stream):
            waited_s = now - min(a.at_s for a in at_zero)
            return [at_zero] if waited_s >= self._patience_s(idx, stream) else []
        if not self._awaits_members(stream):
            return [at_zero]
        regulars = [a.at_s for a in at_zero if a.rank in stream.members] or [a.at_s for a in at_zero]
        return [at_zero] if now - min(regulars) >= self.window_s(idx) else []

    def _awaits_members(self, stream: _Stream) -> bool:
        """A member of the last gang has work in this stream and is not at layer 0 yet. Ends at the first such."""
        pending, active, detached = stream.pending, stream.active, stream.detached
        return any(
            rank in active and rank not in detached and (rank not in pending or pending[rank].layer > 0)
            for rank in stream.members
        )

    def _take(self, idx: int, group: list[Arrival], first_s: float, now: float) -> GangBatch:
        stream = self._streams[idx]
        layer = group[0].layer
        gang_id, mask = group[0].gang_id, group[0].mask
        if layer == 0:
            gang_id = mask = 0
            if self._is_former(idx):
                gang_id, mask = self._form(stream, group, now)
        else:
            for rank in self._missing(stream, group) if group[0].rank not in stream.detached else ():
                stream.detached.add(rank)
                stream.members.discard(rank)
                self.num_stragglers[rank] = self.num_stragglers.get(rank, 0) + 1
        for arrival in group:
            del stream.pending[arrival.rank]
        group.sort(key=lambda a: a.rank)
        return GangBatch(idx, layer, gang_id, mask, tuple(group), first_s)

    def _form(self, stream: _Stream, group: list[Arrival], now: float) -> tuple[int, int]:
        ranks = {a.rank for a in group}
        beside = self._parks(stream) or group[0].epoch < stream.epoch
        if not beside:  # newcomers that lost patience, or an older epoch, do not replace the gang that runs
            if stream.formed_s is not None and stream.members:
                took_s = now - stream.formed_s
                stream.step_s = took_s if stream.step_s == 0.0 else 0.8 * stream.step_s + 0.2 * took_s
            stream.formed_s = now
            stream.members = set(ranks)
        self._counter += 1
        gang_id = (group[0].epoch & 0xFFFF) << 48 | self._rank << 32 | (self._counter & 0xFFFFFFFF)
        return gang_id, mask_of(ranks)
