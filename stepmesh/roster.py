"""Who is up: pairs from their handshake to their loss, what their control links say, and the events of all that.

Everything runs in the mesh's main thread, but for `beat`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from stepmesh.connector import Dialler, Doorman
from stepmesh.errors import FrameError, ProtocolError
from stepmesh.pair import Environment, FfnPair, Pair
from stepmesh.repeats import Repeats
from stepmesh.session import Draining, Ended, Idle, Notice
from stepmesh.stats import MeshStats
from stepmesh.topology import EpochChange, Epochs
from stepmesh.trace import Stage
from stepmesh.transports.base import Channel, Link, Posted
from stepmesh.types import (
    Event,
    FrameRejected,
    IdleNotice,
    Member,
    PeerDown,
    PeerDraining,
    PeerUp,
    RankId,
    Role,
)
from stepmesh.wire import ControlFrame, ControlKind, encode_control

log = logging.getLogger("stepmesh")

_LOOK_S = 0.02  # control sockets are looked at this often even when data never pauses


class Roster:
    """The pairs of one rank. `on_change` is called with the channels that are up, whenever those change."""

    def __init__(self, env: Environment, stats: MeshStats, on_change: Callable[[Sequence[Channel]], None]) -> None:
        self.epochs = Epochs(env.config)
        self.pairs: dict[RankId, Pair] = {}
        self.live: tuple[Pair, ...] = ()  # the same pairs, for loops and for the heartbeat thread
        self.events: list[Event] = []
        self.look_at = 0.0  # when control links are due
        self.judge_at = 0.0
        self._env = env
        self._id = env.config.id
        self._fabric = env.fabric
        self._stats = stats
        self._on_change = on_change
        self._polls: tuple[tuple[Callable[[], Sequence[Posted]], Pair], ...] = ()
        self._of_link: dict[Link, Pair] = {}
        self._dialler = Dialler(env, stats)
        self._doorman = Doorman(env, stats, self.epochs)
        self._draining = False
        self._repeats = Repeats()

    def set_members(self, epoch: int, members: Iterable[Member]) -> None:
        """Make an epoch live. Raises ConfigError."""
        self._apply(self.epochs.set_members(epoch, members))
        for pair in self.live:
            if isinstance(pair, FfnPair):
                self._take(pair, pair.unpark())

    def retire_epoch(self, epoch: int) -> None:
        """This epoch and all before it are over."""
        self._apply(self.epochs.retire_epoch(epoch))

    def poll(self) -> list[Event]:
        """Take what has arrived in the slots. The events so far, which stay here."""
        self._fabric.collect()
        for poll, pair in self._polls:
            if posts := poll():
                self._take(pair, posts)
        return self.events

    def take_events(self) -> list[Event]:
        """Hand the events over."""
        events, self.events = self.events, []
        return events

    def reject(self, pair: Pair, reason: str) -> None:
        """Reset a pair that sent what cannot be taken."""
        if self.pairs.get(pair.peer) is pair:
            pair.stats.rejected_frames += 1
            self.events.append(FrameRejected(pair.peer, reason))
            self.drop(pair, f"rejected a frame: {reason}", retryable=True)

    def drain(self) -> None:
        """Ask all peers, those to come as well, to leave this rank out."""
        self._draining = True
        for pair in self.live:
            pair.link.send(encode_control(ControlKind.DRAIN))

    def beat(self, counter: int, pending: bool) -> None:
        """Send heartbeats. Heartbeat thread: reads the tuple of pairs, which is replaced and never changed."""
        for pair in self.live:
            pair.beat(counter, pending)

    def close(self) -> None:
        """Part from all peers, for good."""
        self.live = ()
        for pair in self.pairs.values():
            pair.close(f"{self._id} closed its mesh", retryable=False)
        self.pairs.clear()
        self._of_link.clear()
        self._refresh()
        self._dialler.close()
        self._doorman.close()

    def _apply(self, change: EpochChange) -> None:
        for rank_id in change.dropped:
            pair = self.pairs.get(rank_id)
            self._dialler.forget(rank_id)
            if pair is not None:
                self.drop(pair, f"{rank_id} is no member of a live epoch any more", retryable=False)
        if self._id.role is Role.ATTENTION:
            for member in change.added:
                self._dialler.want(member)
            for member in self.epochs.members().values():
                self._dialler.refresh(member)
        for pair in self.live:
            if isinstance(pair, FfnPair):
                pair.epochs = self.epochs.of(pair.peer, pair.identity.incarnation)
        self.look_at = 0.0  # dial in the very next progress

    def _take(self, pair: Pair, posts: Sequence[Posted]) -> None:
        try:
            arrived = pair.take(posts)
        except FrameError as error:
            self.reject(pair, str(error))
            return
        self.events.extend(arrived)

    def _take_last(self, pair: Pair) -> None:
        """What a peer sent before it went."""
        self._fabric.collect()
        self._take(pair, pair.channel.poll())

    def look(self, timeout_s: float) -> bool:
        """Wait, read every control socket that has something, let connections progress, judge. True: woken."""
        began = self._fabric.now()
        wakeups = self._fabric.wait(timeout_s)
        now = self._fabric.now()
        self._stats.polls += 1
        self._stats.blocked_ns += int((now - began) * 1e9)
        self.look_at = now + _LOOK_S
        self._stats.turned_away += wakeups.num_turned_away
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
        for pair in self.live:
            if (failure := pair.channel.failure) is not None:
                if failure.rejected:
                    self.reject(pair, failure.reason)
                else:
                    self._take_control(pair, *pair.link.receive(), now)  # its CLOSE says more than a closed channel
                    self.drop(pair, failure.reason, retryable=True)
        if now >= self.judge_at:
            self._judge(now)
        return wakeups.external

    def _take_control(self, pair: Pair, frames: Sequence[ControlFrame], closed: str | None, now: float) -> None:
        try:
            notices = pair.receive(frames, now)
        except ProtocolError as error:
            self.drop(pair, f"protocol: {error}", retryable=True)
            return
        for notice in notices:
            if self.pairs.get(pair.peer) is pair:  # nothing is heard of a peer behind its CLOSE
                self._heed(pair, notice)
        if closed is not None and self.pairs.get(pair.peer) is pair:
            self._take_last(pair)
        if closed is not None:
            self.drop(pair, closed, retryable=True)

    def _heed(self, pair: Pair, notice: Notice) -> None:
        if isinstance(notice, Idle):
            if isinstance(pair, FfnPair) and pair.window.idle_is_current(notice.stream, notice.after_seq):
                self.events.append(IdleNotice(pair.peer, notice.stream, notice.after_seq))
        elif isinstance(notice, Draining):
            self.events.append(PeerDraining(pair.peer))
        elif isinstance(notice, Ended):
            self._take_last(pair)
            self.drop(pair, notice.reason, retryable=notice.retryable)

    def _bring_up(self, pair: Pair, now: float) -> None:
        peer, generation = pair.peer, pair.generation
        member = self.epochs.members().get(peer)
        if member is None or member.incarnation != pair.identity.incarnation:
            pair.close(f"{peer} is no member of a live epoch any more", retryable=True)
            return
        former = self.pairs.get(peer)
        if former is not None:
            self.drop(former, f"superseded by generation {generation}", retryable=True)
        self.pairs[peer] = pair
        self._of_link[pair.link] = pair
        self._refresh()
        stats = pair.stats
        stats.up, stats.generation, stats.connects = True, generation, stats.connects + 1
        stats.transport, stats.transport_reason = pair.channel.kind, pair.identity.transport_reason
        self._env.trace.record((now, Stage.PEER_UP, peer, 0, 0, generation))
        log.info(
            "%s: %s up over %s (%s), generation %d", self._id, peer, stats.transport, stats.transport_reason, generation
        )
        self.events.append(PeerUp(peer, stats.transport, stats.transport_reason, generation))
        if self._draining:
            pair.link.send(encode_control(ControlKind.DRAIN))
        leftover, pair.leftover = pair.leftover, []
        self._take_control(pair, leftover, None, now)

    def drop(self, pair: Pair, reason: str, *, retryable: bool) -> None:
        """Revoke a generation: answers to its arrivals are refused from now on."""
        if self.pairs.get(pair.peer) is not pair:
            return
        del self.pairs[pair.peer], self._of_link[pair.link]
        self._refresh()
        pair.close(reason, retryable=True)
        pair.stats.up = False
        pair.stats.last_down_reason = reason
        pair.stats.losses += retryable
        self._dialler.lost(pair.peer, self._fabric.now(), retryable=retryable)
        self.look_at = 0.0  # dial again in the very next progress
        self._report_down(PeerDown(pair.peer, reason, retryable))

    def _report_down(self, down: PeerDown) -> None:
        if down.peer in self.pairs:
            log.warning("%s: another process that calls itself %s: %s", self._id, down.peer, down.reason)
            return
        now = self._fabric.now()
        kind = "retryable" if down.retryable else "final"
        level = logging.WARNING if self._repeats.is_news(str(down.peer), down.reason, now) else logging.DEBUG
        log.log(level, "%s: %s down (%s): %s", self._id, down.peer, kind, down.reason)
        self._env.trace.record((now, Stage.PEER_DOWN, down.peer, 0, 0, 0))
        self._stats.peer(str(down.peer)).last_down_reason = down.reason
        self.events.append(down)

    def _refresh(self) -> None:
        self.live = tuple(self.pairs.values())
        self._polls = tuple((pair.channel.poll, pair) for pair in self.live)
        self._on_change([pair.channel for pair in self.live])

    def _judge(self, now: float) -> None:
        """Drop lost peers, each behind a last reading: heartbeats may have waited while this thread computed."""
        self.judge_at = now + self._env.config.heartbeat_s / 2
        for pair in self.live:
            self._take_control(pair, *pair.link.receive(), now)
            if self.pairs.get(pair.peer) is not pair:
                continue
            lost = pair.session.judge(now, oldest_sent_at=pair.oldest_sent_at())
            if lost is not None:
                self.drop(pair, lost, retryable=True)
            elif isinstance(pair, FfnPair):
                try:
                    pair.check_parked(now, self._env.config.stall_timeout_s)
                except FrameError as error:
                    self.reject(pair, str(error))
