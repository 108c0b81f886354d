"""How many attention and FFN workers a load needs: what one observation asks for, and steady advice over many. Pure.

A candidate's cycle is predicted from what steps of the present workers cost (`afd.cluster.autoscale.capacity`). The
wish is the cheapest size whose cycle holds the target with room to spare, for the load there is. A size that is enough
stays; it goes when it was too small for a minute, or when a cheaper one would have been enough for ten.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from afd.cluster.autoscale.capacity import Bounds, CostModel
from afd.errors import ConfigError
from afd.sched.rules import HEADROOM
from afd.types import Topology

DRAINS = 0.97  # of those that were live a minute before: fewer, and a backlog shrinks
GROWTH = 2  # times as many of a kind at most, in one step: what is predicted of far sizes is learnt on the way
MORE = 1.2  # times the capacity
ALMOST = 0.95  # of the largest capacity: more workers for the rest are not worth their cost


@dataclass(frozen=True, slots=True)
class Observation:
    """The cluster over the last interval.

    tokens_per_s: output tokens that are asked for, of requests that found no room too.
    num_running: sequences in the workers.
    num_live: these, and those that wait anywhere.
    costs: of a step; None = not known yet.
    kv_used: share of the fullest KV cache.
    num_finished: sequences behind the p99 figures (0: they say nothing), in seconds.
    attention_busy, ffn_busy: share of the time that a worker of the kind computed, 0..1, mean over its workers; shown,
        not decided by.
    """

    size: Topology
    tokens_per_s: float = 0.0
    num_running: int = 0
    num_live: int = 0
    costs: CostModel | None = None
    kv_used: float = 0.0
    num_finished: int = 0
    tpot_p99_s: float = 0.0
    ttft_p99_s: float = 0.0
    attention_busy: float = 0.0
    ffn_busy: float = 0.0


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

    def clamp(self, size: Topology) -> Topology:
        small, large = self.smallest, self.largest
        return Topology(
            min(max(size.num_attention, small.num_attention), large.num_attention),
            min(max(size.num_ffn, small.num_ffn), large.num_ffn),
        )

    def with_ffn(self, num_ffn: int) -> Limits:
        """The sizes with so many FFN workers: what can be set while a cluster runs."""
        small, large = self.smallest.num_attention, self.largest.num_attention
        return Limits(Topology(small, num_ffn), Topology(large, num_ffn))

    def sizes(self) -> list[Topology]:
        """All that are allowed."""
        small, large = self.smallest, self.largest
        return [
            Topology(x, y)
            for x in range(small.num_attention, large.num_attention + 1)
            for y in range(small.num_ffn, large.num_ffn + 1)
        ]


@dataclass(frozen=True, slots=True)
class Policy:
    """What is promised, and when a cluster should grow or shrink.

    Growth waits until it was needed during grow_s, shrinking until it was possible during shrink_s. After a change of
    the cluster nothing is decided for settle_s: a new worker loads its model, windows of measurement fill.

    max_num_seqs: of an attention worker.
    ffn_cost: of an FFN worker; an attention worker costs 1.
    full: load of its capacity, at all of the target, from which a size is too small.
    sized_for: at most so much of its capacity is asked of a new size.
    kv_high: a KV cache this full is a lack of attention workers.
    near: share of the TPOT target up to which a size is not called too small.
    tight: share of the TPOT target from which nothing shrinks.
    min_finished: sequences that a p99 needs to count.
    remember_s: a size that missed a target is not wished for again so soon, unless the load has fallen.
    """

    tpot_s: float = 0.05
    ttft_s: float = 5.0
    max_num_seqs: int = 256
    ffn_cost: float = 1.0
    full: float = 0.92
    sized_for: float = 0.8
    kv_high: float = 0.9
    near: float = 0.8
    tight: float = 0.9
    min_finished: int = 10
    grow_s: float = 60.0
    shrink_s: float = 600.0
    settle_s: float = 180.0
    remember_s: float = 3600.0

    def bounds(self, seen: Observation) -> Bounds:
        """How long a cycle may take, and what an attention worker holds of sequences like the present ones."""
        kv_seqs = math.inf
        if seen.num_running and seen.kv_used > 0.0:
            kv_seqs = self.kv_high / seen.kv_used * seen.num_running / seen.size.num_attention
        return Bounds(HEADROOM * self.tpot_s, min(float(self.max_num_seqs), kv_seqs))

    def cost(self, size: Topology) -> float:
        """What a size costs, in attention workers."""
        return size.num_attention + self.ffn_cost * size.num_ffn

    def near_to(self, present: Topology, size: Topology) -> bool:
        """Whether what is known at the present size says enough of the other one."""
        most_x, most_y = GROWTH * present.num_attention, GROWTH * present.num_ffn
        return size.num_attention <= most_x and size.num_ffn <= most_y

    def is_full(self, seen: Observation) -> bool:
        """The KV cache is: a lack of attention workers."""
        return seen.kv_used > self.kv_high

    def missed(self, seen: Observation) -> str:
        """The target that is missed, in words; "" when none is."""
        if self.is_full(seen):
            return f"KV cache {seen.kv_used:.0%} full"
        if seen.num_finished >= self.min_finished:
            if seen.tpot_p99_s > self.tpot_s:
                return f"TPOT p99 {seen.tpot_p99_s * 1e3:.0f} ms over {self.tpot_s * 1e3:.0f} ms"
            if seen.ttft_p99_s > self.ttft_s:
                return f"TTFT p99 {seen.ttft_p99_s:.1f} s over {self.ttft_s:.1f} s"
        return ""

    def may_be_full(self, seen: Observation) -> bool:
        """What is measured counts for more than what is predicted: far below the target, the load is no problem yet."""
        counts = seen.num_finished >= self.min_finished
        return not counts or bool(self.missed(seen)) or seen.tpot_p99_s > self.near * self.tpot_s

    def may_shrink(self, seen: Observation) -> bool:
        """Nothing shrinks while a target is missed or nearly so."""
        counts = seen.num_finished >= self.min_finished
        return not self.missed(seen) and not (counts and seen.tpot_p99_s > self.tight * self.tpot_s)


@dataclass(frozen=True, slots=True)
class Demand:
    """Tokens/s to size for.

    least, most: what was asked for all the time of late, and at any time of it; inf = not looked at for long enough.
    calm: all targets were kept with room, all the time.
    missed: the target that was missed all the time, in words.
    outgrown: sizes that did not hold the target although they were thought to.
    """

    least: float
    now: float
    most: float
    calm: bool = True
    missed: str = ""
    outgrown: tuple[Topology, ...] = ()

    @classmethod
    def of(cls, seen: Observation, policy: Policy) -> Demand:
        """One observation, as if it had been so for long."""
        asked = seen.tokens_per_s
        return cls(asked, asked, asked, policy.may_shrink(seen), policy.missed(seen))

    def rules_out(self, size: Topology) -> bool:
        """Neither side of it is larger than that of a size that was too small."""
        return any(size.num_attention <= x.num_attention and size.num_ffn <= x.num_ffn for x in self.outgrown)


@dataclass(frozen=True, slots=True)
class Wish:
    """The numbers of workers that are asked for, and why in one line."""

    size: Topology
    reason: str


def wish(seen: Observation, demand: Demand, policy: Policy, limits: Limits, base: Topology | None = None) -> Wish:
    """The size for this demand. base: the size that stays while it is enough; None = the present one."""
    base, costs = base or seen.size, seen.costs
    if demand.most == 0.0 and not seen.num_running:
        return Wish(limits.smallest, "nothing is asked for")
    if costs is None:
        return Wish(base, "what a step costs is not known yet")
    bounds = policy.bounds(seen)

    def capacity(size: Topology) -> float:
        return costs.capacity(size, bounds)

    def cheapest(sizes: Iterable[Topology], tokens_per_s: float) -> Topology | None:
        """The cheapest that serves it with room to spare; of equally cheap ones the one with most room."""
        enough = [size for size in sizes if costs.serves(size, tokens_per_s / policy.sized_for, bounds)]
        least = min(map(policy.cost, enough), default=0.0)
        return max((size for size in enough if policy.cost(size) == least), key=capacity, default=None)

    def most(sizes: list[Topology]) -> Topology:
        """Where none serves it: the cheapest that serves about as much as any, unless `base` does."""
        rates = {size: capacity(size) for size in sizes}
        enough = [size for size, rate in rates.items() if rate >= ALMOST * max(rates.values())]
        return base if base in enough else min(enough, key=policy.cost)

    sizes = [each for each in limits.sizes() if not demand.rules_out(each) and policy.near_to(seen.size, each)]
    size = base
    if policy.may_be_full(seen) and not costs.serves(
        base, demand.least / policy.full, replace(bounds, tpot_s=policy.tpot_s)
    ):
        size = cheapest(sizes, demand.now) or most([each for each in limits.sizes() if policy.near_to(seen.size, each)])
    elif demand.missed and base == seen.size:  # not for the load that is known: one worker more where it helps most
        more = [Topology(base.num_attention + 1, base.num_ffn), Topology(base.num_attention, base.num_ffn + 1)]
        allowed = [size for size in more[: 1 if policy.is_full(seen) else 2] if limits.clamp(size) == size]
        size = max(allowed, key=capacity, default=base)
    elif demand.most < math.inf:
        cheaper = [each for each in sizes if policy.cost(each) < policy.cost(base)]
        if not demand.calm:  # nothing shrinks then, but another ratio may do more with less
            cheaper = [each for each in cheaper if capacity(each) >= MORE * capacity(base)]
        size = cheapest(cheaper, demand.most) or base
    load = f"{seen.tokens_per_s:,.0f} tokens/s are asked for; within {bounds.tpot_s * 1e3:.0f} ms "
    serves = ", ".join(f"{each} serves {capacity(each):,.0f}" for each in dict.fromkeys((seen.size, size)))
    num_seqs = max(1.0, seen.tokens_per_s * bounds.tpot_s)
    bound = f"the {costs.bound(seen.size, num_seqs)} binds in {seen.size}"
    return Wish(size, "; ".join(filter(None, [demand.missed, load + serves, bound])))


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The size that is advised.

    reason: one line.
    changed: another change is advised than before, or none any more.
    """

    size: Topology
    reason: str
    changed: bool


class Adviser:
    """Turns observations into steady advice; one per cluster. `now` is of one monotonic clock, in seconds.

    fixed_ffn: the number of FFN workers stays as it is.
    """

    def __init__(self, policy: Policy, limits: Limits, *, fixed_ffn: bool = False):
        self.limits = limits
        self._policy = policy
        self._fixed_ffn = fixed_ffn
        self._looks: deque[_Look] = deque()
        self._size: Topology | None = None
        self._advised: Topology | None = None  # stays while it is enough, whether or not anybody follows
        self._wanted: Topology | None = None  # advised, where that is not the present size
        self._settled_at = 0.0
        self._outgrown: dict[Topology, _Outgrown] = {}

    def observe(self, seen: Observation, now: float) -> Recommendation:
        """The advice after one more observation. A size outside the limits is corrected at once."""
        policy, size = self._policy, seen.size
        limits = self.limits.with_ffn(size.num_ffn) if self._fixed_ffn else self.limits
        if size != self._size:
            self._settled_at = now if self._size is None else now + policy.settle_s
            self._size, self._advised = size, None
            self._looks.clear()
        allowed = limits.clamp(size)
        if allowed != size:
            return self._advise(allowed, f"{size} is outside the limits")
        if now < self._settled_at:
            return self._advise(size, "settling after a change")
        self._looks.append(_Look(now, seen.tokens_per_s, seen.num_live, policy.missed(seen), policy.may_shrink(seen)))
        while self._looks[0].at_s < now - policy.shrink_s:
            self._looks.popleft()
        asked = wish(seen, self._demand(seen, now), policy, limits, self._advised)
        return self._advise(asked.size, asked.reason)

    def for_running(self) -> Adviser:
        """Another one, for what can be set while the cluster runs: the number of FFN workers stays."""
        return Adviser(self._policy, self.limits, fixed_ffn=True)

    def _demand(self, seen: Observation, now: float) -> Demand:
        """What the last minutes say together; growing and shrinking wait until they have been looked at for long."""
        policy, looks = self._policy, self._looks
        recent = [look for look in looks if look.at_s >= now - policy.grow_s]
        passed_s, most = now - looks[0].at_s, max(look.tokens_per_s for look in looks)
        long = passed_s >= policy.grow_s
        least = min(look.tokens_per_s for look in recent) if long else 0.0
        missed = recent[-1].missed if long and all(look.missed for look in recent) else ""
        if seen.num_live < DRAINS * recent[0].num_live:
            missed = ""  # what piled up before is being worked off
        if missed:
            self._outgrown[seen.size] = _Outgrown(now, least)
        outgrown = tuple(
            size
            for size, was in self._outgrown.items()
            if now - was.at_s < policy.remember_s and most >= policy.sized_for * was.tokens_per_s
        )
        if passed_s < 0.95 * policy.shrink_s:
            most = math.inf
        calm = all(look.may_shrink for look in looks)
        return Demand(least, seen.tokens_per_s, most, calm, missed, outgrown)

    def _advise(self, size: Topology, reason: str) -> Recommendation:
        wanted = size if size != self._size else None
        changed = wanted != self._wanted
        self._advised, self._wanted = size, wanted
        return Recommendation(size, reason, changed)


@dataclass(frozen=True, slots=True)
class _Look:
    at_s: float
    tokens_per_s: float
    num_live: int
    missed: str
    may_shrink: bool


@dataclass(frozen=True, slots=True)
class _Outgrown:
    """A size missed a target with so many tokens/s."""

    at_s: float
    tokens_per_s: float
