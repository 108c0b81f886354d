"""How pairs come to be and come back: the attention rank dials its members, the FFN rank receives visits.

Both connectors take `now` and what has become readable, and hand back pairs that are up, or PeerDown for peers that
cannot be reached. Main thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from stepmesh.errors import HandshakeError, MeshError
from stepmesh.handshake import Hello
from stepmesh.pair import AttentionPair, Environment, FfnPair
from stepmesh.peering import Dialling, Visit
from stepmesh.repeats import Repeats
from stepmesh.stats import MeshStats
from stepmesh.topology import Epochs, Refusal, admit
from stepmesh.transports.base import Link
from stepmesh.types import Member, PeerDown, RankId

log = logging.getLogger("stepmesh")

_FIRST_BACKOFF_S = 0.05
_LONGEST_BACKOFF_S = 0.5  # a link that broke is to be back within a second
_STEADY_S = 5.0  # a pair that was up for so long is dialled again at once; one that breaks sooner has to wait longer


@dataclass(slots=True)
class _Target:
    """One member that this attention rank wants to be connected to."""

    member: Member
    attempt: Dialling | None = None
    up_since: float | None = None  # set while the pair is up
    refused: bool = False  # for good: only another incarnation can change it
    retry_at: float = 0.0
    backoff_s: float = _FIRST_BACKOFF_S
    failing_since: float | None = None
    withheld: str = ""  # "verbs: why": RDMA was agreed on and did not work, so it is not offered until the next loss
    reported: bool = False


class Dialler:
    """Attention side: keeps one connection, or one attempt, to every member."""

    def __init__(self, env: Environment, stats: MeshStats) -> None:
        self._env = env
        self._stats = stats
        self._targets: dict[RankId, _Target] = {}
        self._generations: dict[RankId, int] = {}  # the last one used; never goes back, over all incarnations

    def want(self, member: Member) -> None:
        """A member is to be reached; the next step dials."""
        self._targets[member.id] = _Target(member)

    def refresh(self, member: Member) -> None:
        """The same process may have become reachable elsewhere: the next attempt uses the new address."""
        target = self._targets.get(member.id)
        if target is not None:
            target.member = member

    def forget(self, rank_id: RankId) -> None:
        """The rank is no member any more."""
        target = self._targets.pop(rank_id, None)
        if target is not None and target.attempt is not None:
            target.attempt.abandon()

    def lost(self, rank_id: RankId, now: float, *, retryable: bool) -> None:
        """The pair is down. It is dialled again, unless it went for good: at once if it was steady, else after a pause
        that doubles each time.
        """
        target = self._targets.get(rank_id)
        if target is None:
            return
        fresh = self._targets[rank_id] = _Target(target.member, refused=not retryable)
        if target.up_since is not None and now - target.up_since < _STEADY_S:
            fresh.retry_at = now + target.backoff_s
            fresh.backoff_s = min(2 * target.backoff_s, _LONGEST_BACKOFF_S)

    def step(self, now: float, readable: Collection[Link]) -> list[AttentionPair | PeerDown]:
        """Begin due attempts and carry on those that something has happened to."""
        outcomes: list[AttentionPair | PeerDown] = []
        for target in self._targets.values():
            if target.up_since is not None or target.refused:
                continue
            try:
                pair = self._advance(target, now, readable)
            except MeshError as error:
                outcomes.extend(self._failed(target, error, now))
            else:
                if pair is not None:
                    outcomes.append(pair)
        return outcomes

    def close(self) -> None:
        for rank_id in list(self._targets):
            self.forget(rank_id)

    def _advance(self, target: _Target, now: float, readable: Collection[Link]) -> AttentionPair | None:
        rank_id = target.member.id
        if target.attempt is None:
            if now < target.retry_at:
                return None
            if target.failing_since is None:
                target.failing_since = now
            link = self._env.fabric.connect(target.member.address)
            if link is None:
                return None
            generation = self._generations.get(rank_id, 0) + 1
            stats = self._stats.peer(str(rank_id))
            target.attempt = Dialling(self._env, link, target.member, generation, stats, target.withheld)
        elif not target.attempt.broken and target.attempt.link not in readable and now <= target.attempt.deadline:
            return None
        attempt = target.attempt
        pair = attempt.advance()
        if attempt.accepted:
            self._generations[rank_id] = attempt.generation
        if pair is not None:
            target.attempt = None
            target.up_since = now
        return pair

    def _failed(self, target: _Target, error: MeshError, now: float) -> list[PeerDown]:
        attempt, target.attempt = target.attempt, None
        if attempt is not None:
            if attempt.accepted:
                self._generations[target.member.id] = attempt.generation
            if attempt.transport == "verbs" and len(self._env.fabric.transports) > 1:
                target.withheld = f"verbs: {error}"
                log.warning(
                    "%s: %s: RDMA does not work, falling back: %s", self._env.config.id, target.member.id, error
                )
            attempt.abandon()
        peer, reason = target.member.id, str(error)
        if not error.retryable:
            target.refused = True
            return [PeerDown(peer, reason, retryable=False)]
        target.retry_at = now + target.backoff_s
        target.backoff_s = min(2 * target.backoff_s, _LONGEST_BACKOFF_S)
        failing_s = now - (now if target.failing_since is None else target.failing_since)
        if target.reported or failing_s < self._env.config.connect_timeout_s:
            log.debug("%s: %s: %s", self._env.config.id, peer, reason)
            return []
        target.reported = True
        address = target.member.address
        where = f"{address.host}:{address.port}" + (f" or {address.unix}" if address.unix else "")
        return [PeerDown(peer, f"cannot be reached at {where} for {failing_s:.1f} s: {reason}", retryable=True)]


class Doorman:
    """FFN side: carries handshakes with those who connect, and turns strangers away."""

    def __init__(self, env: Environment, stats: MeshStats, epochs: Epochs) -> None:
        self._env = env
        self._stats = stats
        self._epochs = epochs
        self._visits: list[Visit] = []
        # The last generation that was up, of the incarnation that had it.
        self._generations: dict[RankId, tuple[str, int]] = {}
        self._repeats = Repeats()

    def receive(self, link: Link) -> None:
        """Somebody has connected. With too many strangers at the door the one who waits longest has to go."""
        strangers = [visit for visit in self._visits if not visit.authenticated]
        if len(strangers) >= self._env.config.max_pending:
            self._turn_away(strangers[0], HandshakeError("too many unauthenticated connections"))
        self._visits.append(
            Visit(self._env, link, self._epochs, self._decide, lambda peer: self._stats.peer(str(peer)))
        )

    def step(self, now: float, readable: Collection[Link]) -> list[FfnPair | PeerDown]:
        outcomes: list[FfnPair | PeerDown] = []
        for visit in list(self._visits):
            if visit.link not in readable and not visit.awaits_channel and now <= visit.deadline:
                continue
            try:
                pair = visit.advance()
            except MeshError as error:
                self._turn_away(visit, error)
                if visit.hello is not None and not error.retryable:
                    outcomes.append(PeerDown(visit.hello.id, str(error), retryable=False))
                continue
            if pair is not None:
                self._visits.remove(visit)
                self._generations[pair.peer] = (pair.identity.incarnation, pair.generation)
                outcomes.append(pair)
        return outcomes

    def close(self) -> None:
        for visit in self._visits:
            visit.abandon()
        self._visits.clear()

    def _decide(self, hello: Hello) -> Refusal | None:
        incarnation, generation = self._generations.get(hello.id, ("", 0))
        last = generation if incarnation == hello.incarnation else 0
        return admit(hello, self._env.config, self._epochs.members(), last)

    def _turn_away(self, visit: Visit, error: MeshError) -> None:
        self._visits.remove(visit)
        visit.abandon()
        self._stats.turned_away += 1
        known = visit.hello is not None
        who = str(visit.hello.id) if visit.hello is not None else visit.link.peer_name
        is_news = not (known and error.retryable) and self._repeats.is_news(who, str(error), self._env.fabric.now())
        level = logging.WARNING if is_news else logging.DEBUG
        # As text: an exception kept by a log handler would keep the frames it came through, and their mappings.
        log.log(level, "%s: turned away %s: %s", self._env.config.id, who, str(error))
