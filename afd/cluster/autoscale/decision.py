"""How many attention and FFN workers a load needs: a wish for each observation, smoothed into a recommendation. Pure.

A pipeline of two kinds of workers is served best when both are about equally busy and neither is the reason for a
missed target. So each kind is sized by its own busy share (as a horizontal autoscaler would), a miss of the SLA adds
to the kind that is the bottleneck, and nothing shrinks while a target is missed or would be by the smaller number.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from afd.errors import ConfigError
from afd.types import Topology

ROUNDING = 1e-9  # a busy share of exactly the target must not need one more worker


@dataclass(frozen=True, slots=True)
class Observation:
    """The cluster over the last interval.

    *_busy: share of the time that a worker of the kind computed, 0..1, mean over its workers.
    kv_used: share of the fullest KV cache.
    queued: sequences without a place, at gateways and workers.
    num_finished: sequences behind the p99 figures (0: they say nothing), in seconds.
    """

    num_attention: int
    num_ffn: int
    attention_busy: float
    ffn_busy: float
    kv_used: float = 0.0
    queued: int = 0
    num_finished: int = 0
    tpot_p99_s: float = 0.0
    ttft_p99_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """The smallest and the largest topology that may be recommended."""

    smallest: Topology
    largest: Topology

    def __post_init__(self) -> None:
        small, large = self.smallest, self.largest
        if small.mono or large.mono:
            raise ConfigError("--min and --max are of the form xAyF")
        if small.num_attention > large.num_attention or small.num_ffn > large.num_ffn:
            raise ConfigError(f"--min {small} exceeds --max {large}")

    def clamp(self, num_attention: int, num_ffn: int) -> tuple[int, int]:
        small, large = self.smallest, self.largest
        return (
            min(max(num_attention, small.num_attention), large.num_attention),
            min(max(num_ffn, small.num_ffn), large.num_ffn),
        )


@dataclass(frozen=True, slots=True)
class Policy:
    """When a cluster should grow or shrink.

    Growth waits until it was wished for during grow_s, shrinking for shrink_s. After a change of the cluster nothing is
    decided for settle_s: a new worker loads its model, windows of measurement fill.

    target_busy: the share at which a kind of worker is sized right.
    tolerance: relative, around it.
    kv_high: a KV cache this full is a lack of attention workers.
    shrink_below: share of the TPOT target under which a worker may go.
    min_finished: sequences that a p99 needs to count.
    """

    tpot_s: float = 0.05
    ttft_s: float = 5.0
    target_busy: float = 0.75
    tolerance: float = 0.05
    kv_high: float = 0.9
    shrink_below: float = 0.8
    min_finished: int = 10
    grow_s: float = 60.0
    shrink_s: float = 600.0
    settle_s: float = 180.0


@dataclass(frozen=True, slots=True)
class Wish:
    """Numbers of workers that one observation asks for, and why in one line."""

    num_attention: int
    num_ffn: int
    reason: str


def wish(seen: Observation, policy: Policy) -> Wish:
    """The topology that this observation alone would choose; no limits, no memory."""
    x, y = seen.num_attention, seen.num_ffn
    missed = _missed(seen, policy)
    want_x = _sized(x, seen.attention_busy, policy)
    want_y = _sized(y, seen.ffn_busy, policy)
    busy = f"attention {seen.attention_busy:.0%} busy, FFN {seen.ffn_busy:.0%}"
    if missed:
        want_x, want_y = max(want_x, x), max(want_y, y)
        if (want_x, want_y) == (x, y):
            if seen.kv_used > policy.kv_high or seen.attention_busy >= seen.ffn_busy:
                want_x += 1
            else:
                want_y += 1
        return Wish(want_x, want_y, f"{missed}; {busy}")
    if want_x < x and not _may_shrink(seen, policy, x, want_x):
        want_x = x
    if want_y < y and _tight(seen, policy):
        want_y = y
    return Wish(want_x, want_y, busy)


def _sized(num: int, busy: float, policy: Policy) -> int:
    """Workers of one kind for the work that `num` do now."""
    if num == 0 or abs(busy / policy.target_busy - 1.0) <= policy.tolerance:
        return num
    return max(1, math.ceil(num * busy / policy.target_busy - ROUNDING))


def _missed(seen: Observation, policy: Policy) -> str:
    """The target that is missed, in words; "" when none is."""
    if seen.kv_used > policy.kv_high:
        return f"KV cache {seen.kv_used:.0%} full"
    if seen.num_finished >= policy.min_finished:
        if seen.tpot_p99_s > policy.tpot_s:
            return f"TPOT p99 {seen.tpot_p99_s * 1e3:.0f} ms over {policy.tpot_s * 1e3:.0f} ms"
        if seen.ttft_p99_s > policy.ttft_s:
            return f"TTFT p99 {seen.ttft_p99_s:.1f} s over {policy.ttft_s:.1f} s"
    if seen.queued > 0 and max(seen.attention_busy, seen.ffn_busy) > policy.target_busy:
        return f"{seen.queued} sequences queue"
    return ""


def _tight(seen: Observation, policy: Policy) -> bool:
    """TPOT has no room for a smaller cluster."""
    return seen.num_finished >= policy.min_finished and seen.tpot_p99_s > policy.shrink_below * policy.tpot_s


def _may_shrink(seen: Observation, policy: Policy, x: int, want_x: int) -> bool:
    """Fewer attention workers hold the same KV and the same requests."""
    return seen.queued == 0 and not _tight(seen, policy) and seen.kv_used * x / want_x <= policy.kv_high


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The numbers of workers that are advised.

    reason: one line.
    changed: another change is advised than before, or none any more.
    """

    num_attention: int
    num_ffn: int
    reason: str
    changed: bool

    def __str__(self) -> str:
        return f"{self.num_attention}A{self.num_ffn}F"


class Adviser:
    """Turns wishes into steady advice; one per cluster. `now` is of one monotonic clock, in seconds."""

    def __init__(self, policy: Policy, limits: Limits):
        self.limits = limits
        self._policy = policy
        self._wishes: deque[tuple[float, tuple[int, int]]] = deque()
        self._size: tuple[int, int] | None = None
        self._settled_at = 0.0
        self._wanted: tuple[int, int] | None = None  # advised, where that is not the present size

    def observe(self, seen: Observation, now: float) -> Recommendation:
        """The advice after one more observation. A size outside the limits is corrected at once."""
        size = (seen.num_attention, seen.num_ffn)
        if size != self._size:
            self._settled_at = now if self._size is None else now + self._policy.settle_s
            self._size = size
            self._wishes.clear()
        allowed = self.limits.clamp(*size)
        if allowed != size:
            return self._advise(allowed, f"{size[0]}A{size[1]}F is outside the limits")
        if now < self._settled_at:
            return self._advise(size, "settling after a change")
        asked = wish(seen, self._policy)
        self._wishes.append((now, self.limits.clamp(asked.num_attention, asked.num_ffn)))
        while self._wishes[0][0] < now - self._policy.shrink_s:
            self._wishes.popleft()
        steady = (self._steady(0, size[0], now), self._steady(1, size[1], now))
        return self._advise(steady, asked.reason)

    def _steady(self, kind: int, current: int, now: float) -> int:
        """Grow by what the whole of grow_s asked for at least, shrink by what the whole of shrink_s allows.

        kind: 0 = attention, 1 = FFN.
        """
        begun = self._wishes[0][0]
        recent = [size[kind] for at, size in self._wishes if at >= now - self._policy.grow_s]
        if now - begun >= self._policy.grow_s and min(recent) > current:
            return min(recent)
        if now - begun >= self._policy.shrink_s * 0.95:
            return min(current, max(size[kind] for _, size in self._wishes))
        return current

    def _advise(self, advice: tuple[int, int], reason: str) -> Recommendation:
        wanted = advice if advice != self._size else None
        changed = wanted != self._wanted
        self._wanted = wanted
        return Recommendation(*advice, reason, changed)
