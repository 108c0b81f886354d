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

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

from stepmesh.config import MeshConfig
from stepmesh.connector import Dialler, Doorman
from stepmesh.errors import (
    ConfigError,
    FrameError,
    MeshClosedError,
    PeerNotConnectedError,
    ProtocolError,
    StaleArrivalError,
)
from stepmesh.pair import AttentionPair, Environment, FfnPair, Pair
from stepmesh.session import Draining, Ended, Idle, Notice
from stepmesh.slots import copy_parts, rises_below, take_parts
from stepmesh.spin import SpinPolicy
from stepmesh.stats import MeshStats
from stepmesh.topology import Membership, MembershipChange
from stepmesh.trace import Stage, Trace
from stepmesh.transports.base import Fabric, Link, Posted
from stepmesh.transports.host import HostFabric
from stepmesh.types import (
    Address,
    CombineMeta,
    DispatchArrived,
    DispatchMeta,
    DispatchParts,
    Event,
    FrameRejected,
    IdleNotice,
    Member,
    PeerDown,
    PeerDraining,
    PeerUp,
    RankId,
    Role,
    RowIdx,
    Rows,
)
from stepmesh.window import Exchange
from stepmesh.wire import ControlFrame, ControlKind, encode_control, encode_idle

log = logging.getLogger("stepmesh")

MAX_WAIT_S = 0.1  # no blocking wait is longer, whatever happens to a wake-up
_LOOK_S = 0.02  # control sockets are looked at this often even when data never pauses


class Mesh:
    """One rank. Raises ConfigError or TransportError when it cannot listen. Close it, or use it in a `with`."""

    def __init__(self, config: MeshConfig, fabric: Fabric | None = None) -> None:
        self.config = config
        self.id = config.id
        self.trace = Trace(config.trace_events)
        self._fabric = fabric if fabric is not None else HostFabric(config)
        self._env = Environment(config, self._fabric, self.trace)
        self._stats = MeshStats()
        self._membership = Membership(config)
        self._dialler = Dialler(self._env, self._stats)
        self._doorman = Doorman(self._env, self._stats, self._membership)
        self._pairs: dict[RankId, Pair] = {}
        self._live: tuple[Pair, ...] = ()  # the same pairs, for loops and for the heartbeat thread
        self._of_link: dict[Link, Pair] = {}
        self._spin_policy = SpinPolicy(config.spin_us * 1e-6)
        self._events: list[Event] = []
        self._dispatches = config.id.role is Role.ATTENTION
        self._seq = [0] * config.num_streams  # attention: last seq of each stream
        self._active = [False] * config.num_streams  # attention: dispatched, and not idle since
        self._counter = 0
        self._look_at = 0.0
        self._judge_at = 0.0
        self._draining = False
        self._closed = False
        self._fabric.every(config.heartbeat_s, self._beat)

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> Address:
        """Where others reach this rank; pass it on in its `Member`."""
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
        self._apply(self._membership.set_members(epoch, members))
        for pair in self._live:
            if isinstance(pair, FfnPair):
                self._take(pair, pair.unpark())

    def retire_epoch(self, epoch: int) -> None:
        """This epoch and all before it are over: ranks that are in no other are dropped. Idempotent."""
        self._check_open()
        self._apply(self._membership.retire_epoch(epoch))

    def _apply(self, change: MembershipChange) -> None:
        for rank_id in change.dropped:
            pair = self._pairs.get(rank_id)
            self._dialler.forget(rank_id)
            if pair is not None:
                self._drop(pair, f"{rank_id} is no member of a live epoch any more", retryable=False)
        if self._dispatches:
            for member in change.added:
                self._dialler.want(member)
            for member in self._membership.members().values():
                self._dialler.refresh(member)
        self._look_at = 0.0  # dial in the very next progress

    # Progress

    def progress(self, timeout_s: float, *, spin: bool = True) -> list[Event]:
        """Do what is due and return at the first events, at the time-out, on wake() or when a watched fd is readable.

        Polls for about config.spin_us first where that has paid lately, then blocks, at most MAX_WAIT_S at a time. A
        mesh on a virtual clock never waits.
        """
        self._check_open()
        self._counter += 1
        fabric = self._fabric
        start = fabric.now()
        deadline = start + timeout_s
        self._poll()
        budget_s = 0.0
        if start < self._look_at:
            if self._events:
                return self._take_events()
            if spin and timeout_s > 0.0 and self._live and fabric.waits:
                budget_s = self._spin_policy.budget_s()
            if budget_s and self._spin(min(start + budget_s, deadline)):
                return self._take_events()
        while True:
            now = fabric.now()
            wait_s = 0.0 if self._events else min(deadline - now, MAX_WAIT_S, self._judge_at - now)
            woken = self._look(max(wait_s, 0.0))
            self._poll()
            now = fabric.now()
            if self._events or woken or not fabric.waits or now >= deadline:
                if budget_s:
                    self._spin_policy.missed(now - start)
                return self._take_events()

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
        view, payload_bytes = first.tx_slot(stream, seq).dispatch(num_tokens, top_k)
        if parts is not view:
            copy_parts(view, parts)
        written = slot = first.write_dispatch(seq, meta, num_tokens, top_k, payload_bytes, None)
        self._seq[stream] = seq
        self._active[stream] = True
        exchange = Exchange(seq, meta.epoch, num_tokens, self._fabric.now())
        for pair in pairs:
            if pair is not first:
                slot = pair.copy_dispatch(written, stream, seq, payload_bytes)
            pair.post_dispatch(slot, stream, meta.layer, exchange, payload_bytes)
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
            view, payload_bytes = pair.tx_slot(stream, seq).dispatch(row_idx.size, top_k, True)
            take_parts(view, parts, row_idx)
            slot = pair.write_dispatch(seq, meta, row_idx.size, top_k, payload_bytes, batch_tokens)
            written.append((pair, slot, row_idx, payload_bytes))
        self._seq[stream] = seq
        self._active[stream] = True
        now = self._fabric.now()
        for pair, slot, row_idx, payload_bytes in written:
            exchange = Exchange(seq, meta.epoch, row_idx.size, now, row_idx)
            pair.post_dispatch(slot, stream, meta.layer, exchange, payload_bytes)
        return seq

    def dispatch_view(self, peer: RankId, stream: int, num_tokens: int, top_k: int) -> DispatchParts:
        """Writable views of the slot that the stream's next dispatch to `peer` will use. Raises as dispatch does."""
        seq = self._next_seq(stream)
        return self._attention_pair(peer, stream, seq).tx_slot(stream, seq).dispatch(num_tokens, top_k).parts

    def idle(self, stream: int) -> None:
        """Tell all FFN peers that nothing more comes on this stream for now, so that no gang waits for this rank."""
        frame = encode_idle(stream, self._next_seq(stream) - 1)
        self._active[stream] = False
        for pair in self._live:
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
            self._reject(pair, reason)

    # Ending

    def drain(self) -> None:
        """Ask all peers to leave this rank out from now on; exchanges in flight are still served."""
        self._check_open()
        self._draining = True
        for pair in self._live:
            pair.link.send(encode_control(ControlKind.DRAIN))

    def close(self) -> None:
        """Leave: peers see PeerDown (not retryable). Frees everything; views that are still held stay readable."""
        if self._closed:
            return
        self._closed = True
        self._live = ()
        for pair in self._pairs.values():
            pair.close(f"{self.id} closed its mesh", retryable=False)
        self._pairs.clear()
        self._of_link.clear()
        self._dialler.close()
        self._doorman.close()
        self._fabric.close()

    def stats(self) -> dict[str, Any]:
        """Counters as plain values: the mesh's own, and under "peers" those of every peer by name. Any thread."""
        return {"id": str(self.id), "progress_counter": self._counter, **self._stats.snapshot()}

    # Inside

    def _check_open(self) -> None:
        if self._closed:
            raise MeshClosedError(f"the mesh of {self.id} is closed")

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _next_seq(self, stream: int) -> int:
        if not self._dispatches:
            raise ConfigError(f"{self.id} cannot dispatch: only attention ranks do")
        if not 0 <= stream < len(self._seq):
            raise ConfigError(f"stream {stream} is not in 0..{self.config.num_streams - 1}")
        return self._seq[stream] + 1

    def _begin(self, peers: Sequence[RankId], meta: DispatchMeta) -> tuple[int, list[AttentionPair]]:
        """The dispatch's seq and its pairs, whose slots are free. Nothing has changed yet."""
        seq = self._next_seq(meta.stream)
        if meta.epoch not in self._membership.live_epochs:
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

    def _poll(self) -> None:
        for pair in self._live:
            if posts := pair.channel.poll():
                self._take(pair, posts)

    def _spin(self, until: float) -> bool:
        """Poll until something has arrived; False when nothing has in time."""
        now = self._fabric.now
        while now() < until:
            self._poll()
            if self._events:
                self._spin_policy.hit()
                return True
            os.sched_yield()  # whoever else wants this core gets it
        return False

    def _take(self, pair: Pair, posts: Sequence[Posted]) -> None:
        try:
            arrived = pair.take(posts)
        except FrameError as error:
            self._reject(pair, str(error))
            return
        self._events.extend(arrived)

    def _look(self, timeout_s: float) -> bool:
        """Wait, read every control socket that has something, let connections progress, judge. True: woken."""
        began = self._fabric.now()
        wakeups = self._fabric.wait(timeout_s)
        now = self._fabric.now()
        self._stats.polls += 1
        self._stats.blocked_ns += int((now - began) * 1e9)
        self._look_at = now + _LOOK_S
        for link in wakeups.accepted:
            self._doorman.receive(link)
        for link in wakeups.readable:
            if (pair := self._of_link.get(link)) is not None:
                frames, closed = link.receive()
                self._take_control(pair, frames, closed, now)
        for outcome in (*self._dialler.step(now, wakeups.readable), *self._doorman.step(now, wakeups.readable)):
            if isinstance(outcome, PeerDown):
                self._report_down(outcome)
            else:
                self._bring_up(outcome, now)
        for pair in self._live:
            if (failure := pair.channel.failure) is not None:
                if failure.rejected:
                    self._reject(pair, failure.reason)
                else:
                    self._take_control(pair, *pair.link.receive(), now)  # its CLOSE says more than a closed channel
                    self._drop(pair, failure.reason, retryable=True)
        if now >= self._judge_at:
            self._judge(now)
        return wakeups.external

    def _take_control(self, pair: Pair, frames: Sequence[ControlFrame], closed: str | None, now: float) -> None:
        try:
            notices = pair.receive(frames, now)
        except ProtocolError as error:
            self._drop(pair, f"protocol: {error}", retryable=True)
            return
        for notice in notices:
            if self._pairs.get(pair.peer) is pair:  # nothing is heard of a peer behind its CLOSE
                self._heed(pair, notice)
        if closed is not None and self._pairs.get(pair.peer) is pair:
            self._take(pair, pair.channel.poll())  # what it sent before it went
        if closed is not None:
            self._drop(pair, closed, retryable=True)

    def _heed(self, pair: Pair, notice: Notice) -> None:
        if isinstance(notice, Idle):
            if isinstance(pair, FfnPair) and pair.window.idle_is_current(notice.stream, notice.after_seq):
                self._events.append(IdleNotice(pair.peer, notice.stream, notice.after_seq))
        elif isinstance(notice, Draining):
            self._events.append(PeerDraining(pair.peer))
        elif isinstance(notice, Ended):
            self._take(pair, pair.channel.poll())
            self._drop(pair, notice.reason, retryable=notice.retryable)

    def _bring_up(self, pair: Pair, now: float) -> None:
        peer, generation = pair.peer, pair.generation
        member = self._membership.members().get(peer)
        if member is None or member.incarnation != pair.identity.incarnation:
            pair.close(f"{peer} is no member of a live epoch any more", retryable=True)
            return
        former = self._pairs.get(peer)
        if former is not None:
            self._drop(former, f"superseded by generation {generation}", retryable=True)
        self._pairs[peer] = pair
        self._of_link[pair.link] = pair
        self._refresh()
        stats = pair.stats
        stats.up, stats.generation, stats.connects = True, generation, stats.connects + 1
        stats.transport, stats.transport_reason = pair.channel.kind, pair.identity.transport_reason
        self.trace.record(now, Stage.PEER_UP, peer, 0, 0, generation)
        log.info(
            "%s: %s up over %s (%s), generation %d", self.id, peer, stats.transport, stats.transport_reason, generation
        )
        self._events.append(PeerUp(peer, stats.transport, stats.transport_reason, generation))
        if self._draining:
            pair.link.send(encode_control(ControlKind.DRAIN))
        leftover, pair.leftover = pair.leftover, []
        self._take_control(pair, leftover, None, now)

    def _reject(self, pair: Pair, reason: str) -> None:
        if self._pairs.get(pair.peer) is pair:
            pair.stats.rejected_frames += 1
            self._events.append(FrameRejected(pair.peer, reason))
            self._drop(pair, f"rejected a frame: {reason}", retryable=True)

    def _drop(self, pair: Pair, reason: str, *, retryable: bool) -> None:
        """Revoke a generation: answers to its arrivals are refused from now on."""
        if self._pairs.get(pair.peer) is not pair:
            return
        del self._pairs[pair.peer], self._of_link[pair.link]
        self._refresh()
        pair.close(reason, retryable=True)
        pair.stats.up = False
        pair.stats.last_down_reason = reason
        pair.stats.losses += retryable
        self._dialler.lost(pair.peer, retryable=retryable)
        self._look_at = 0.0  # dial again in the very next progress
        self._report_down(PeerDown(pair.peer, reason, retryable))

    def _report_down(self, down: PeerDown) -> None:
        if down.peer in self._pairs:
            log.warning("%s: another process that calls itself %s: %s", self.id, down.peer, down.reason)
            return
        log.warning("%s: %s down (%s): %s", self.id, down.peer, "retryable" if down.retryable else "final", down.reason)
        self.trace.record(self._fabric.now(), Stage.PEER_DOWN, down.peer, 0, 0, 0)
        self._stats.peer(str(down.peer)).last_down_reason = down.reason
        self._events.append(down)

    def _refresh(self) -> None:
        self._live = tuple(self._pairs.values())

    def _judge(self, now: float) -> None:
        """Drop lost peers, each behind a last reading: heartbeats may have waited while this thread computed."""
        self._judge_at = now + self.config.heartbeat_s / 2
        for pair in self._live:
            self._take_control(pair, *pair.link.receive(), now)
            if self._pairs.get(pair.peer) is not pair:
                continue
            lost = pair.session.judge(now, oldest_sent_at=pair.oldest_sent_at())
            if lost is not None:
                self._drop(pair, lost, retryable=True)
            elif isinstance(pair, FfnPair):
                try:
                    pair.check_parked(now, self.config.stall_timeout_s)
                except FrameError as error:
                    self._reject(pair, str(error))

    def _beat(self) -> None:
        """Send heartbeats. Heartbeat thread: reads the tuple of pairs, which is replaced and never changed."""
        pending = any(self._active)
        for pair in self._live:
            pair.beat(self._counter, pending)
