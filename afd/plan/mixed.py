"""Several kinds of chips in one role: attention instances with different batches, FFN instances with different shares.

Attention instances of different chips are given as many requests as make their stages take as long as each other (or as
their memory holds); FFN instances get whole experts in proportion to bandwidth, peak or memory, whichever serves most.
The search starts at the best topologies of one kind a role and takes the step that serves most, until none serves more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from afd.errors import ConfigError
from afd.plan.deployment import Deployment, Part
from afd.plan.estimate import Estimate, Estimator, Objective
from afd.plan.hardware import Chip
from afd.plan.memory import max_requests
from afd.plan.search import MAX_ATTENTION, SearchSpace
from afd.types import Topology

Counts = tuple[tuple[str, int], ...]
"""Instances of a role by the chip's name, sorted, none of 0."""

GAIN = 1.002
"""A step that serves less than this much more is not taken."""

MAX_STEPS = 24

STARTS = 3
"""Topologies of one kind a role from which the search starts, of different pairs of chips."""

MEASURES: tuple[Callable[[Chip], float], ...] = (
    lambda chip: chip.memory_bytes_per_s,
    lambda chip: chip.peak_flops,
    lambda chip: chip.memory_bytes,
)


@dataclass(frozen=True, slots=True)
class MixedSearch:
    """Deployments of a space whose roles may have several kinds of chips each. The inventory bounds them."""

    space: SearchSpace
    estimator: Estimator
    objective: Objective

    def plans(self, pure: Sequence[Estimate]) -> list[Estimate]:
        """The best found from each start, where it is mixed. pure: of one kind a role, best first."""
        if len(self.space.inventory) < 2:
            return []
        starts: dict[tuple[str, str], Estimate] = {}
        for plan in pure:
            starts.setdefault((plan.deployment.attention_chip.name, plan.deployment.ffn_chip.name), plan)
        found: dict[tuple[Counts, Counts], Estimate] = {}
        for plan in list(starts.values())[:STARTS]:
            top = self._climb(plan)
            if top.deployment.mixed:
                found[_state(top.deployment)] = top
        return list(found.values())

    def best(self, attention: Counts, ffn: Counts, streams: Sequence[int]) -> Estimate | None:
        """The best depth and shares of so many instances of each kind; None where nothing holds the SLA."""
        shapes = (shape for number in streams for shape in self.shapes(attention, ffn, number))
        options = [self.estimator.best(shape, self.objective) for shape in shapes]
        return max((e for e in options if e is not None), key=lambda e: e.tgs, default=None)

    def shapes(self, attention: Counts, ffn: Counts, streams: int) -> list[Deployment]:
        """The ways to share work out among so many instances of each kind, at one depth."""
        return [balanced for shape in self._shapes(attention, ffn, streams) for balanced in self._balanced(shape)]

    def _climb(self, plan: Estimate) -> Estimate:
        for _ in range(MAX_STEPS):
            streams = [plan.deployment.streams]
            near = [self.best(*state, streams) for state in self._steps(*_state(plan.deployment))]
            best = max((e for e in near if e is not None), key=self.space.tokens_per_s, default=plan)
            if self.space.tokens_per_s(best) < GAIN * self.space.tokens_per_s(plan):
                break
            plan = best
        return self.best(*_state(plan.deployment), self.space.streams) or plan

    def _steps(self, attention: Counts, ffn: Counts) -> Iterator[tuple[Counts, Counts]]:
        """One instance more or less, of another kind, or in the other role."""
        mine = {"attention": dict(attention), "ffn": dict(ffn)}
        roles = {
            "attention": [chip.name for chip in self.space.attention_chips],
            "ffn": [chip.name for chip in self.space.ffn_chips],
        }
        places = [(role, name) for role, names in roles.items() for name in names]
        for leaves in (None, *places):
            for joins in (None, *places):
                if leaves == joins:
                    continue
                counts = {role: dict(by_name) for role, by_name in mine.items()}
                for place, by in ((leaves, -1), (joins, 1)):
                    if place is not None:
                        counts[place[0]][place[1]] = counts[place[0]].get(place[1], 0) + by
                after = [tuple(sorted((n, c) for n, c in counts[role].items() if c)) for role in roles]
                if all(after) and all(c > 0 for side in after for _, c in side) and self._within(after):
                    yield after[0], after[1]

    def _within(self, roles: Sequence[Counts]) -> bool:
        ranks, used = self._ranks(), dict.fromkeys(self.space.inventory, 0)
        for name, count in (one for role in roles for one in role):
            used[name] += count * ranks
        few = sum(count for _, count in roles[0]) <= MAX_ATTENTION
        return few and all(used[name] <= limit for name, limit in self.space.inventory.items())

    def _ranks(self) -> int:
        attention, ffn = self.space.attention_chips[0], self.space.ffn_chips[0]
        return self.space.deployment(attention, ffn, Topology(1, 1), 1).ranks_per_instance

    def _shapes(self, attention: Counts, ffn: Counts, streams: int) -> Iterator[Deployment]:
        """The FFN divided by each measure; attention not yet balanced."""
        chips = {chip.name: chip for chip in self.space.chips}
        first = [[(chips[name], count) for name, count in side] for side in (attention, ffn)]
        topology = Topology(sum(count for _, count in attention), sum(count for _, count in ffn))
        plain = self.space.deployment(first[0][0][0], first[1][0][0], topology, streams)
        for measure in MEASURES if len(ffn) > 1 else MEASURES[:1]:
            total = sum(count * measure(chip) for chip, count in first[1])
            more = [Part(c, n, measure(c) * topology.num_ffn / total) for c, n in first[1][1:]]
            yield dataclasses.replace(
                plain, ffn_more=tuple(more), attention_more=tuple(Part(c, n) for c, n in first[0][1:])
            )

    def _balanced(self, shape: Deployment) -> Iterator[Deployment]:
        """Attention instances with loads by memory, and with loads by which all take equally long at the best batch."""
        if not shape.attention_more:
            yield shape
            return
        views = [view for view, _ in shape.attention_views()]
        by_memory = _with_loads(
            shape, [max_requests(v, self.estimator.efficiency, self.objective.context) for v in views]
        )
        if by_memory is None:
            return
        balanced = by_memory
        for _ in range(3):  # what is fixed in a stage weighs differently at another batch
            best = self.estimator.best(balanced, self.objective)
            if best is None:
                break
            loads = self._equal_times(views, balanced, best.num_tokens)
            balanced = (_with_loads(shape, loads) if loads else None) or balanced
        yield balanced
        yield by_memory

    def _equal_times(self, views: Sequence[Deployment], shape: Deployment, num_tokens: int) -> list[float]:
        """Tokens a rank of each kind, `num_tokens` in the mean, by lines near what it has now; [] = one gets none."""
        lines = []
        for view, part in zip(views, shape.attention_parts, strict=True):
            few = max(1, int(0.8 * part.load * num_tokens))
            many = max(few + 1, math.ceil(1.25 * part.load * num_tokens))
            low, high = (self.estimator.estimate(view, self.objective, n).stage.attention_s for n in (few, many))
            slope = max((high - low) / (many - few), 1e-12)
            lines.append((low - slope * few, slope))
        counts = [part.instances for part in shape.attention_parts]
        total = float(num_tokens * sum(counts))
        total += sum(count * base / slope for count, (base, slope) in zip(counts, lines, strict=True))
        equal_s = total / sum(count / slope for count, (_, slope) in zip(counts, lines, strict=True))
        tokens = [(equal_s - base) / slope for base, slope in lines]
        return tokens if min(tokens) > 0.0 else []


def parse_counts(names: Sequence[str], option: str) -> dict[str, int]:
    """["h20:4", "h800:1"] -> instances by chip; {} where no counts are given. ConfigError names the option."""
    if not any(":" in name for name in names):
        return {}
    found: dict[str, int] = {}
    for text in names:
        name, colon, count = (part.strip() for part in text.partition(":"))
        if not colon or not count.isdecimal() or int(count) < 1 or name in found:
            raise ConfigError(f"{option} {','.join(names)}: expected instances of each kind, such as h20:4,h800:1")
        found[name] = int(count)
    return found


def _state(deployment: Deployment) -> tuple[Counts, Counts]:
    return _counts(deployment.attention_parts), _counts(deployment.ffn_parts)


def _counts(parts: Sequence[Part]) -> Counts:
    return tuple(sorted((part.chip.name, part.instances) for part in parts))


def _with_loads(shape: Deployment, weights: Sequence[float]) -> Deployment | None:
    """`shape` with attention loads in proportion to `weights`, one a kind; None where one is 0."""
    counts = [part.instances for part in shape.attention_parts]
    total = sum(count * weight for count, weight in zip(counts, weights, strict=True))
    if not total or min(weights) <= 0.0:
        return None
    loads = [weight * sum(counts) / total for weight in weights]
    more = [dataclasses.replace(part, load=load) for part, load in zip(shape.attention_more, loads[1:], strict=True)]
    return dataclasses.replace(shape, attention_more=tuple(more))
