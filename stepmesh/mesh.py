"""The user's object: one rank of the mesh.

    mesh = Mesh(config)                      # listens (FFN) at mesh.address
    mesh.set_members(epoch, members)         # the other role's ranks; attention ranks connect
    while serving:
        for event in mesh.progress(0.1): ...

Thread rule: one thread, the main thread, calls everything; only `wake` and `stats` may come from any other. The mesh
itself runs a thread for heartbeats and, once a tcp pair exists, one for tcp transfers; neither touches what the main
thread owns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from stepmesh.config import MeshConfig
from stepmesh.errors import ConfigError, MeshClosedError, PeerNotConnectedError, StaleArrivalError
from stepmesh.lanes import Lanes
from stepmesh.pair import AttentionPair, Environment, FfnPair
from stepmesh.polling import Spinner
from stepmesh.roster import Roster
from stepmesh.slots import copy_parts, rises_below, take_parts
from stepmesh.stats import MeshStats
from stepmesh.trace import Trace
from stepmesh.transports.base import Fabric
from stepmesh.transports.host import HostFabric
from stepmesh.types import (
    Address,
    CombineMeta,
    DispatchArrived,
    DispatchMeta,
    DispatchParts,
    Event,
    Member,
    RankId,
    Role,
    RowIdx,
    Rows,
)
from stepmesh.window import Exchange
from stepmesh.wire import encode_idle

MAX_WAIT_S = 0.1  # no blocking wait is longer, whatever happens to a wake-up


class Mesh:
    """One rank. Raises ConfigError or TransportError when it cannot listen. Close it, or use it in a `with`."""

    def __init__(self, config: MeshConfig, fabric: Fabric | None = None) -> None:
        self.config = config
        self.id = config.id
        self.trace = Trace(config.trace_events)
        self._fabric = fabric if fabric is not None else HostFabric(config)
        self._now = self._fabric.now
        self._stats = MeshStats()
        self._spinner = Spinner(config.spin_us * 1e-6, self._now)
        self._roster = Roster(Environment(config, self._fabric, self.trace), self._stats, self._spinner.watch)
        self._pairs = self._roster.pairs
        self._dispatches = config.id.role is Role.ATTENTION
        self._seq = [0] * config.num_streams  # attention: last seq of each stream
        self._active = [False] * config.num_streams  # attention: dispatched, and not idle since
        self.lanes = Lanes(self._roster, self._seq.__getitem__, self._lane_booked)
        self._counter = 0
        self._closed = False
        self._fabric.every(config.heartbeat_s, self._beat)

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> Address:
        """The address where others reach this rank; pass it on in its `Member`."""
        return self._fabric.address

    @property
    def peers(self) -> tuple[RankId, ...]:
        """Peers that are up now."""
        return tuple(self._pairs)

    # Membership

    def set_members(self, epoch: int, members: Iterable[Member]) -> None:
        """Make an epoch live: the whole list of the other role's ranks. Idempotent. Raises ConfigError.

        Older epochs stay live until they are retired. A rank with another incarnation replaces its predecessor.
        """
        self._check_open()
        self._roster.set_members(epoch, members)

    def retire_epoch(self, epoch: int) -> None:
        """This epoch and all before it are over: ranks that are in no other are dropped. Idempotent."""
        self._check_open()
        self._roster.retire_epoch(epoch)

    # Progress

    def progress(self, timeout_s: float, *, spin: bool = True) -> list[Event]:
        """Do what is due and return at the first events, at the time-out, on wake() or when a watched fd is readable.

        Polls for about config.spin_us first where that has paid lately, then blocks, at most MAX_WAIT_S at a time. A
        mesh on a virtual clock never waits.
        """
        self._check_open()
        self._counter += 1
        roster, fabric = self._roster, self._fabric
        start = self._now()
        deadline = start + timeout_s
        if roster.poll() and start < roster.look_at:
            return self._leave()
        spun = False
        if spin and timeout_s > 0.0 and start < roster.look_at and roster.live and fabric.waits:
            budget_s = self._spinner.budget_s()
            spun = budget_s > 0.0
            if spun and self._spinner.spin(budget_s, min(deadline, roster.look_at), roster.poll):
                return self._leave()
        while True:
            now = self._now()
            wait_s = 0.0 if roster.events else min(deadline - now, MAX_WAIT_S, roster.judge_at - now)
            woken = roster.look(max(wait_s, 0.0))
            roster.poll()
            now = self._now()
            if roster.events or woken or not fabric.waits or now >= deadline:
                if spun:
                    self._spinner.missed(now - start)
                return self._leave()

    def has_news(self) -> bool:
        """Whether a frame of the data path has come, which the next progress will return: a look, for long computations
        between calls of it.
        """
        self._check_open()
        self.tick()
        if self._roster.poll():
            return True
        self._fabric.leave()
        return False

    def watch_fd(self, fd: int) -> None:
        """Let progress return when `fd` is readable (it says nothing more; the caller looks itself)."""
        self._fabric.watch(fd)

    def unwatch_fd(self, fd: int) -> None:
        """Undo watch_fd. Idempotent."""
        self._fabric.unwatch(fd)

    def wake(self) -> None:
        """Make a running progress return, or the next one. Any thread."""
        self._fabric.wake()

    def tick(self) -> None:
        """The main loop is alive: call it in long computations between calls of progress (which does it, too)."""
        self._counter += 1

    # Exchange, attention side

    def dispatch(self, peers: Sequence[RankId], meta: DispatchMeta, parts: DispatchParts) -> int:
        """Send one micro-batch's rows to `peers` and return its seq, the same for all of them.

        All or nothing: raises PeerNotConnectedError, SlotBusyError or ConfigError before anything was sent. `parts` may
        be the views that dispatch_view(peers[0], ...) gave; then nothing is copied for that peer.
        """
        seq, pairs = self._begin(peers, meta)
        stream, num_tokens = meta.stream, len(parts.rows)
        top_k = 0 if parts.expert_ids is None else parts.expert_ids.shape[1]
        first = pairs[0]
        written = slot = first.tx_slot(stream, seq)
        view = slot.dispatch(num_tokens, top_k)
        if parts is not view.parts:
            copy_parts(view.parts, parts)
        first.write_dispatch(slot, seq, meta, num_tokens, top_k, view.payload_bytes, None)
        self._seq[stream] = seq
        self._active[stream] = True
        exchange = Exchange(seq, meta.epoch, meta.step, meta.layer, num_tokens, self._now())
        for pair in pairs:
            if pair is not first:
                slot = pair.copy_dispatch(written, stream, seq, view.frame_bytes)
            pair.post_dispatch(slot, stream, exchange, view)
        return seq

    def dispatch_sparse(
        self, peers: Sequence[RankId], meta: DispatchMeta, parts: DispatchParts, rows_of_peer: Sequence[RowIdx]
    ) -> int:
        """Send each peer only its rows of the micro-batch: peers[i] gets parts[rows_of_peer[i]], with their indices.

        Indices rise strictly (as np.flatnonzero gives them) and may be none; a row may go to several peers. The arrays
        must not change before the combine, whose `row_idx` they are. All or nothing, raises as dispatch does.
        """
        seq, pairs = self._begin(peers, meta)
        stream, batch_tokens = meta.stream, parts.rows.shape[0]
        if len(rows_of_peer) != len(pairs):
            raise ConfigError(f"{len(rows_of_peer)} lists of rows for {len(pairs)} peers")
        if batch_tokens > self.config.layout.max_tokens:
            raise ConfigError(f"{batch_tokens} tokens exceed the slot ({self.config.layout.max_tokens})")
        top_k = 0 if parts.expert_ids is None else parts.expert_ids.shape[1]
        written = []
        for pair, row_idx in zip(pairs, rows_of_peer, strict=True):
            if not rises_below(row_idx, batch_tokens):
                raise ConfigError(f"row indices for {pair.peer} do not rise strictly within {batch_tokens} rows")
            slot = pair.tx_slot(stream, seq)
            view = slot.dispatch(row_idx.size, top_k, True)
            take_parts(view.parts, parts, row_idx)
            pair.write_dispatch(slot, seq, meta, row_idx.size, top_k, view.payload_bytes, batch_tokens)
            written.append((pair, slot, row_idx, view))
        self._seq[stream] = seq
        self._active[stream] = True
        now = self._now()
        for pair, slot, row_idx, view in written:
            exchange = Exchange(seq, meta.epoch, meta.step, meta.layer, row_idx.size, now, row_idx)
            pair.post_dispatch(slot, stream, exchange, view)
        return seq

    def dispatch_view(self, peer: RankId, stream: int, num_tokens: int, top_k: int) -> DispatchParts:
        """Writable views of the slot that the stream's next dispatch to `peer` will use. Raises as dispatch does."""
        seq = self._next_seq(stream)
        return self._attention_pair(peer, stream, seq).tx_slot(stream, seq).dispatch(num_tokens, top_k).parts

    def idle(self, stream: int) -> None:
        """Tell all FFN peers that nothing more comes on this stream for now, so that no gang waits for this rank."""
        frame = encode_idle(stream, self._next_seq(stream) - 1)
        self._active[stream] = False
        for pair in self._roster.live:
            pair.link.send(frame)

    # Exchange, FFN side

    def combine(self, arrival: DispatchArrived, meta: CombineMeta, rows: Rows, scales: Rows | None = None) -> None:
        """Answer a dispatch with one row per token. Raises StaleArrivalError (drop the answer) or ConfigError.

        `rows` may be the view that combine_view gave; then nothing is copied.
        """
        self._ffn_pair(arrival).post_combine(arrival, meta, rows, scales)

    def combine_view(self, arrival: DispatchArrived) -> Rows:
        """Writable rows [num_tokens, hidden] of the slot that the answer will use. Raises StaleArrivalError."""
        return self._ffn_pair(arrival).combine_slot(arrival).rows

    def reject(self, arrival: DispatchArrived, reason: str) -> None:
        """Refuse a dispatch that only the engine can know to be wrong: its pair is reset, as after any bad frame."""
        self._check_open()
        pair = self._pairs.get(arrival.peer)
        if pair is not None and pair.generation == arrival.header.generation:
            self._roster.reject(pair, reason)

    # Ending

    def drain(self) -> None:
        """Ask all peers to leave this rank out from now on; exchanges in flight are still served."""
        self._check_open()
        self._roster.drain()

    def close(self) -> None:
        """Leave: peers see PeerDown (not retryable). Frees everything; views that are still held stay readable."""
        if self._closed:
            return
        self._closed = True
        self._roster.close()
        self._fabric.close()

    def stats(self) -> dict[str, Any]:
        """Counters as plain values: the mesh's own, and under "peers" those of every peer by name. Any thread."""
        return {"id": str(self.id), "progress_counter": self._counter, **self._stats.snapshot()}

    # Inside

    def _check_open(self) -> None:
        if self._closed:
            raise MeshClosedError(f"the mesh of {self.id} is closed")

    def _leave(self) -> list[Event]:
        """The end of every progress."""
        self._fabric.leave()
        return self._roster.take_events()

    def _lane_booked(self, stream: int, num_sent: int) -> None:
        self._counter += 1
        if self._dispatches:
            self._seq[stream] += num_sent
            self._active[stream] = True

    def _next_seq(self, stream: int) -> int:
        if not self._dispatches:
            raise ConfigError(f"{self.id} cannot dispatch: only attention ranks do")
        if not 0 <= stream < len(self._seq):
            raise ConfigError(f"stream {stream} is not in 0..{self.config.num_streams - 1}")
        return self._seq[stream] + 1

    def _begin(self, peers: Sequence[RankId], meta: DispatchMeta) -> tuple[int, list[AttentionPair]]:
        """The dispatch's seq and its pairs, whose slots are free. Nothing has changed yet."""
        seq = self._next_seq(meta.stream)
        if meta.epoch not in self._roster.epochs.live_epochs:
            raise ConfigError(f"epoch {meta.epoch} is not live here")
        pairs = [self._attention_pair(peer, meta.stream, seq) for peer in peers]
        if not pairs:
            raise ConfigError("dispatch to no peer at all")
        return seq, pairs

    def _attention_pair(self, peer: RankId, stream: int, seq: int) -> AttentionPair:
        pair = self._pairs.get(peer)
        if not isinstance(pair, AttentionPair):
            self._check_open()
            raise PeerNotConnectedError(f"{peer} is not up")
        pair.window.check_free(stream, seq)
        return pair

    def _ffn_pair(self, arrival: DispatchArrived) -> FfnPair:
        pair = self._pairs.get(arrival.peer)
        if not isinstance(pair, FfnPair):
            self._check_open()
            raise StaleArrivalError(f"{arrival.peer} is not up any more")
        return pair

    def _beat(self) -> None:
        """Heartbeat thread."""
        self._roster.beat(self._counter, any(self._active))
