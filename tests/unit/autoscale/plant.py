"""A cluster as the autoscaler sees it, simulated: fluid arrivals, two kinds of workers, a queue, start-up times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from afd.cluster.autoscale.decision import Observation, Recommendation

TPOT_TARGET_S = 0.05


@dataclass
class Plant:
    """Work per token on each side, in seconds of one worker; start_s: from being asked for to serving.

    tpot rises as base / (1 - busy) of the busier side, as a pipeline's waiting does.
    """

    attention_s: float
    ffn_s: float
    num_attention: int
    num_ffn: int
    start_s: float = 90.0
    base_tpot_s: float = 0.010
    backlog: float = 0.0
    starting: list[tuple[float, int, int]] = field(default_factory=list)
    target: tuple[int, int] = (0, 0)
    num_changes: int = 0

    def __post_init__(self) -> None:
        self.target = (self.num_attention, self.num_ffn)

    def step(self, tokens_per_s: float, interval_s: float, now: float) -> Observation:
        """One interval under this load."""
        for entry in [entry for entry in self.starting if entry[0] <= now]:
            self.starting.remove(entry)
            self.num_attention, self.num_ffn = entry[1], entry[2]
        capacity = min(self.num_attention / self.attention_s, self.num_ffn / self.ffn_s)
        offered = tokens_per_s + self.backlog / interval_s
        served = min(offered, capacity)
        self.backlog = min((offered - served) * interval_s, 100_000.0)
        busy = (served * self.attention_s / self.num_attention, served * self.ffn_s / self.num_ffn)
        tpot_s = self.base_tpot_s / max(0.05, 1.0 - max(busy))
        return Observation(
            *(self.num_attention, self.num_ffn, *busy),
            kv_used=min(1.0, 0.8 * busy[0]),
            queued=int(self.backlog / 100),
            num_finished=100 if served else 0,
            tpot_p99_s=tpot_s,
            ttft_p99_s=0.5,
        )

    def follow(self, advice: Recommendation, now: float) -> None:
        """Do what was advised: more workers start slowly, fewer are gone at once."""
        wanted = (advice.num_attention, advice.num_ffn)
        if wanted == self.target:
            return
        self.num_changes += 1
        self.target = wanted
        grows = wanted[0] > self.num_attention or wanted[1] > self.num_ffn
        self.starting = [(now + (self.start_s if grows else 0.0), *wanted)]


@dataclass
class Run:
    """What happened: sizes and observations over time."""

    plant: Plant
    seen: list[Observation] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def missed_share(self, skip: int = 0) -> float:
        """Of the observations after the first `skip`, how many missed the TPOT target."""
        seen = self.seen[skip:]
        return sum(one.tpot_p99_s > TPOT_TARGET_S for one in seen) / len(seen)


def simulate(
    plant: Plant,
    observe: Callable[[Observation, float], Recommendation],
    load: Callable[[float], float],
    *,
    seconds: float,
    interval_s: float = 15.0,
) -> Run:
    """load: tokens per second at a time."""
    run = Run(plant)
    now = 0.0
    while now < seconds:
        now += interval_s
        seen = plant.step(load(now), interval_s, now)
        run.seen.append(seen)
        run.sizes.append((plant.num_attention, plant.num_ffn))
        plant.follow(observe(seen, now), now)
    return run
