"""Requests a second and their lengths -> how many of what: every way to serve them, the cheapest of each kind.

Prompts are computed in the steps of the decodes, or on a pool beside them (PD) that sends their caches over; AFD
decodes, or a colocated deployment. Planned servers are busy for at most a given share of the time; requests come as
they like (Poisson), so that some wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from afd.plan.baselines import layouts_on, server_template
from afd.plan.colocated import Colocated
from afd.plan.estimate import Estimate, Estimator, Objective, whole_steps
from afd.plan.prefill import PrefillUnit, prefill_units
from afd.plan.request_rate import RequestShape
from afd.plan.search import TIE, SearchSpace, search
from afd.plan.waiting import Waiting, waiting

MAX_PLANS = 40
"""Topologies, best first, that are tried with a pool and in several copies; and the smallest ones."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What clients ask. rate: requests a second, 0 = as many as the chips serve. ttft_s: bound of the 99th percentile.

    utilisation: share of what they could serve that servers are planned for.
    """

    requests: RequestShape
    rate: float
    ttft_s: float
    utilisation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """One way to serve the traffic, in whole deployments and whole units of a pool.

    decode, copies: what decodes, and how many of it.  pool, units: what prefills; None and 0 = in the same steps.
    rate: requests a second at which TTFT is forecast: what is asked, or the most.
    max_rate: the most within TTFT and utilisation.
    prefill_share: of the chips, with a pool; else of the requests that the decodes' chips would serve with one.
    """

    way: str
    decode: Estimate | Colocated
    copies: int
    pool: PrefillUnit | None
    units: int
    rate: float
    max_rate: float
    ttft_s: float
    ttft_p99_s: float
    prefill_share: float

    @property
    def chips(self) -> dict[str, int]:
        used = {name: self.copies * count for name, count in self.decode.chips.items()}
        if self.pool is not None:
            used[self.pool.chip.name] = used.get(self.pool.chip.name, 0) + self.units * self.pool.num_chips
        return used

    @property
    def num_chips(self) -> int:
        return sum(self.chips.values())

    @property
    def usd_per_hour(self) -> float | None:
        pool_usd = 0.0 if self.pool is None else self.pool.usd_per_hour
        if self.decode.usd_per_hour is None or pool_usd is None:
            return None
        return self.copies * self.decode.usd_per_hour + self.units * pool_usd

    @property
    def cost(self) -> float:
        """USD an hour, or chips where a price is missing."""
        return self.num_chips if self.usd_per_hour is None else self.usd_per_hour


@dataclass(frozen=True, slots=True)
class Served:
    """Every way to serve the traffic, best first.

    today: the best that the software can start, workers of one chip with prefill in their steps; None = nothing such.
    enough: the ways serve what was asked; else the most that they can.
    """

    traffic: Traffic
    ways: tuple[Fleet, ...]
    today: Fleet | None
    enough: bool


def serve(
    space: SearchSpace,
    estimator: Estimator,
    objective: Objective,
    traffic: Traffic,
    plans: Sequence[Estimate],
    single: Sequence[Estimate],
) -> Served:
    """plans: AFD with prefill in its steps, best first.  single: with workers of one chip."""
    ways = _ways(space, estimator, objective, traffic, plans)
    today = _Way("AFD, one chip a worker", single, None)
    for wanted in (traffic, replace(traffic, rate=0.0)):
        found = [best for way in ways if (best := _best(way.fleets(space, wanted), wanted, space)) is not None]
        if found:
            break
    alone = [c for way in ways if way.units is not None for c in way.plans if isinstance(c, Colocated)]
    shared = [_with_share(fleet, estimator, alone) for fleet in sorted(found, key=_badness(wanted, space))]
    same = bool(plans) and single[:1] == plans[:1]
    now = next((f for f in found if f.way == ways[0].name), None) if same else None
    now = now or _best(today.fleets(space, wanted), wanted, space)
    return Served(
        traffic=traffic,
        ways=tuple(shared),
        today=None if now is None else _with_share(now, estimator, alone),
        enough=bool(found) and wanted is traffic,
    )


def _with_share(fleet: Fleet, estimator: Estimator, alone: Sequence[Colocated]) -> Fleet:
    """alone: colocated layouts whose prefill is elsewhere."""
    decode = fleet.decode
    if fleet.pool is not None:
        return fleet
    if isinstance(decode, Estimate):
        return replace(fleet, prefill_share=estimator.prefill_share(decode))
    same = [c.tgs for c in alone if (c.layout, c.chip.name) == (decode.layout, decode.chip.name)]
    return replace(fleet, prefill_share=max(0.0, 1.0 - decode.tgs / max(same, default=decode.tgs)))


def _ways(
    space: SearchSpace, estimator: Estimator, objective: Objective, traffic: Traffic, plans: Sequence[Estimate]
) -> list[_Way]:
    beside = replace(objective, requests=None)
    inside, colocated = (
        [c for chip in space.chips for c in layouts_on(space, estimator, wanted, chip)]
        for wanted in (objective, beside)
    )
    prompt, efficiency = traffic.requests.prompt, estimator.efficiency
    units = [
        unit
        for chip in space.chips
        for unit in prefill_units(server_template(space, chip), efficiency, prompt, space.limit(chip))
    ]
    return [
        _Way("AFD", plans, None),
        _Way("AFD + prefill pool", search(space, estimator, beside), units),
        _Way("colocated", inside, None),
        _Way("colocated + prefill pool", colocated, units),
    ]


@dataclass(frozen=True, slots=True)
class _Way:
    """A kind of fleet. units: of pools that are tried; None = prefill in the steps of the decodes."""

    name: str
    plans: Sequence[Estimate] | Sequence[Colocated]
    units: Sequence[PrefillUnit] | None

    def fleets(self, space: SearchSpace, traffic: Traffic) -> Iterator[Fleet]:
        small = sorted(self.plans, key=lambda plan: sum(plan.chips.values()))[:MAX_PLANS]
        for plan in dict.fromkeys((*self.plans[:MAX_PLANS], *small)):
            for copies in _copies(space, traffic, plan):
                if self.units is None:
                    yield from self._grown(space, traffic, plan, copies)
                else:
                    yield from self._with_pool(space, traffic, plan, copies)

    def _grown(self, space: SearchSpace, traffic: Traffic, plan: Estimate | Colocated, copies: int) -> Iterator[Fleet]:
        """The smallest fleet of `copies` copies or more that keeps the TTFT target, if it is not too large."""
        for more in range(1 + (copies if traffic.rate else 0)):
            fleet = self._fleet(traffic, plan, copies + more, None, 0)
            if fleet is not None and _within(space, fleet.chips):
                yield fleet
                return

    def _with_pool(
        self, space: SearchSpace, traffic: Traffic, plan: Estimate | Colocated, copies: int
    ) -> Iterator[Fleet]:
        rate = traffic.rate or copies * traffic.utilisation * _rate(traffic, plan)
        for unit in self.units or ():
            wanted = max(1, math.ceil(rate * unit.pass_s / unit.num_prompts / traffic.utilisation - 1e-9))
            room = _room(space, plan, copies, unit) if space.inventory or not traffic.rate else 2 * wanted
            counts = range(wanted, min(room, 2 * wanted) + 1) if traffic.rate else [min(room, wanted)]
            for count in counts:
                fleet = self._fleet(traffic, plan, copies, unit, count) if count else None
                if fleet is not None:
                    yield fleet
                    break

    def _fleet(
        self, traffic: Traffic, plan: Estimate | Colocated, copies: int, pool: PrefillUnit | None, units: int
    ) -> Fleet | None:
        """None where the traffic is more than it serves within TTFT."""
        most = copies * traffic.utilisation * _rate(traffic, plan)
        if pool is not None:
            most = min(most, traffic.utilisation * units * pool.num_prompts / pool.pass_s)

        def ttft(rate: float) -> Waiting:
            return _ttft(plan, copies, pool, units, rate)

        if ttft(0.0).p99_s > traffic.ttft_s:
            return None
        if ttft(most).p99_s > traffic.ttft_s:
            low, high = 0.0, most
            for _ in range(30):
                middle = (low + high) / 2
                low, high = (middle, high) if ttft(middle).p99_s <= traffic.ttft_s else (low, middle)
            most = low
        rate = traffic.rate or most
        if rate > most * (1 + 1e-9) or not most:
            return None
        first, num_chips = ttft(rate), copies * sum(plan.chips.values()) + (units * pool.num_chips if pool else 0)
        return Fleet(
            way=self.name,
            decode=plan,
            copies=copies,
            pool=pool,
            units=units,
            rate=rate,
            max_rate=most,
            ttft_s=first.mean_s,
            ttft_p99_s=first.p99_s,
            prefill_share=0.0 if pool is None else units * pool.num_chips / num_chips,
        )


def _rate(traffic: Traffic, plan: Estimate | Colocated) -> float:
    """Requests a second of one copy with a full batch."""
    return plan.batch / (traffic.requests.output - 1.0) / plan.tpot_s


def _ttft(plan: Estimate | Colocated, copies: int, pool: PrefillUnit | None, units: int, rate: float) -> Waiting:
    """Time to the first token: queue and prompt; the rest of a step beside decodes, the cache's way from a pool."""
    if pool is None:
        queue = waiting(rate, plan.prompt_s, copies * plan.lanes)
        steps_s = whole_steps(plan.prompt_s, plan.step_s)
        return Waiting(queue.mean_s + plan.step_s / 2 + steps_s, queue.p99_s + plan.step_s + steps_s)
    queue = waiting(rate / pool.num_prompts, pool.pass_s, units)
    receiver = plan.chip if isinstance(plan, Colocated) else plan.deployment.attention_chip
    after_s = pool.pass_s + pool.cache_s(receiver)
    return Waiting(queue.mean_s + after_s, queue.p99_s + after_s)


def _copies(space: SearchSpace, traffic: Traffic, plan: Estimate | Colocated) -> Iterable[int]:
    """Numbers of copies to try: what the rate needs, else as many as there are chips for."""
    fitting = space.max_chips // sum(plan.chips.values())
    if space.inventory:
        fitting = min(space.inventory.get(name, 0) // count for name, count in plan.chips.items())
    if not traffic.rate:
        return range(1, fitting + 1)
    needed = max(1, math.ceil(traffic.rate / (traffic.utilisation * _rate(traffic, plan)) - 1e-9))
    return [] if space.inventory and needed > fitting else [needed]


def _within(space: SearchSpace, chips: Mapping[str, int]) -> bool:
    return not space.inventory or all(space.inventory.get(name, 0) >= count for name, count in chips.items())


def _room(space: SearchSpace, plan: Estimate | Colocated, copies: int, unit: PrefillUnit) -> int:
    """Units that find chips beside so many copies."""
    if space.inventory:
        name = unit.chip.name
        return (space.inventory.get(name, 0) - copies * plan.chips.get(name, 0)) // unit.num_chips
    return (space.max_chips - copies * sum(plan.chips.values())) // unit.num_chips


def _badness(traffic: Traffic, space: SearchSpace) -> Callable[[Fleet], float]:
    """What the asked rate costs; the most that an inventory serves; else what a request costs."""
    if traffic.rate:
        return lambda fleet: fleet.cost
    if space.inventory:
        return lambda fleet: -fleet.max_rate
    return lambda fleet: fleet.cost / fleet.max_rate


def _best(found: Iterable[Fleet], traffic: Traffic, space: SearchSpace) -> Fleet | None:
    """The fleet with the fewest chips, then the shortest wait, of those within TIE of the best."""
    badness, options = _badness(traffic, space), list(found)
    if not options:
        return None
    least = min(badness(fleet) for fleet in options)
    tied = [fleet for fleet in options if badness(fleet) <= least + TIE * abs(least)]
    return min(tied, key=lambda fleet: (fleet.num_chips, badness(fleet), fleet.ttft_p99_s))
