"""The pipeline plan: a plan version, never an epoch. Pure: what workers have measured and `now` in, a plan out.

Maximum of streams   raised where more promise GAIN, lowered to those that are worth a trial (workers choose within it)
Tokens of a step     under `sla.policy = enforce`: halved until a prefill at every worker keeps to the TPOT target
Gang window          a share of the predicted cycle, at most the configured one; 0 for one attention worker

What the configuration fixes stays. A plan must not flap: measurements change it at most every INTERVAL_S, and each
number has a dead band. Only a change between one and several attention workers takes effect at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from afd.config import ClusterConfig
from afd.coordinator.forecast import busy, forecast, usable
from afd.messages.membership import Forecast, Plan, StepCosts
from afd.sched.rules import HEADROOM, TRIAL_WORSE
from afd.types import MAX_STREAMS

DEFAULT_MAX_STREAMS = 3
INTERVAL_S = 10.0
GAIN = 0.1  # of the cycle, that more streams must promise
ROOM = 0.8  # of the target, that twice the tokens must keep to before they are allowed again
WINDOW_SHARE = 0.25  # of the cycle: what a member left out loses is a whole step (afd.ffn.gang)
WINDOW_BAND = 1.25  # a window is replaced by one that is longer or shorter by that factor


@dataclass(frozen=True, slots=True)
class PlanRules:
    """What a plan may be.

    base: where it begins; it never has more tokens or a longer window.
    least_streams, most_streams: bounds of its maximum; equal where the configuration fixes the number.
    min_chunk_tokens: prefill that a step must have room for beside its decodes.
    target_s: of the cycle, by which tokens are limited; 0 = they are not.
    """

    base: Plan
    least_streams: int = 1
    most_streams: int = MAX_STREAMS
    min_chunk_tokens: int = 8
    target_s: float = 0.0

    @classmethod
    def of(cls, config: ClusterConfig) -> PlanRules:
        """The rules that a configuration sets."""
        fixed = config.attention.streams
        return cls(
            Plan(
                max_streams=fixed or DEFAULT_MAX_STREAMS,
                max_step_tokens=config.attention.max_step_tokens,
                gang_window_s=config.ffn.gang_window_ms / 1e3,
            ),
            least_streams=fixed or 1,
            most_streams=fixed or MAX_STREAMS,
            min_chunk_tokens=config.attention.min_chunk_tokens,
            target_s=HEADROOM * config.sla.tpot_ms / 1e3 if config.sla.policy == "enforce" else 0.0,
        )


class Planner:
    """Next versions of a plan. decide: on measurements; fit: on a change of members."""

    def __init__(self, rules: PlanRules):
        self._rules = rules
        self._decided_at: float | None = None

    def fit(self, plan: Plan, num_attention: int) -> Plan:
        """`plan`, or its next version where it breaks the rules, or where one worker became several or several one.

        A lone worker has no window.
        """
        rules = self._rules
        window_s = rules.base.gang_window_s
        return _version_of(
            plan,
            max_streams=max(rules.least_streams, min(plan.max_streams, rules.most_streams)),
            max_step_tokens=min(plan.max_step_tokens, rules.base.max_step_tokens),
            gang_window_s=min(plan.gang_window_s or window_s, window_s) if num_attention > 1 else 0.0,
        )

    def decide(self, plan: Plan, costs: Sequence[StepCosts], now: float) -> Plan:
        """The plan for what the workers measure: `plan` itself unless a change is due and pays."""
        workers = usable(costs)
        if not workers or len(workers) < len(busy(costs)):
            return plan  # what an unmeasured one costs the others is not known
        if self._decided_at is not None and now - self._decided_at < INTERVAL_S:
            return plan
        self._decided_at = now
        forecasts = self.forecasts(workers)
        max_streams = _max_streams(plan.max_streams, forecasts, self._rules)
        best = min(forecasts[:max_streams], key=_cycle_s)
        return _version_of(
            plan,
            max_streams=max_streams,
            max_step_tokens=self._step_tokens(plan.max_step_tokens, workers, best.num_streams),
            gang_window_s=self._window_s(plan.gang_window_s, best.cycle_s),
        )

    def forecasts(self, costs: Sequence[StepCosts]) -> list[Forecast]:
        """Forecasts for 1, 2, ... streams, as far as the rules allow; [] while nothing was measured."""
        workers = usable(costs)
        return [forecast(workers, m) for m in range(1, self._rules.most_streams + 1)] if workers else []

    def _step_tokens(self, current: int, workers: Sequence[StepCosts], num_streams: int) -> int:
        """Powers of two of the configured number: the plan's own, half, or twice as many."""
        rules, most = self._rules, self._rules.base.max_step_tokens
        if not rules.target_s:
            return most
        least = rules.min_chunk_tokens + max(worker.tokens / worker.num_streams for worker in workers)

        def cycle_s(tokens: int) -> float:
            return forecast(workers, num_streams, extra_tokens=tokens).cycle_s

        more = min(2 * current, most)
        if current < least or (more > current and cycle_s(more) <= ROOM * rules.target_s):
            return more
        if current // 2 >= least and cycle_s(current) > rules.target_s:
            return current // 2
        return current

    def _window_s(self, current_s: float, cycle_s: float) -> float:
        wanted_s = min(self._rules.base.gang_window_s, WINDOW_SHARE * cycle_s)
        if current_s == 0.0 or current_s / WINDOW_BAND <= wanted_s <= current_s * WINDOW_BAND:
            return current_s
        return round(wanted_s, 6)


def _max_streams(current: int, forecasts: Sequence[Forecast], rules: PlanRules) -> int:
    """More, where one of more promises GAIN; fewer, where the most allowed is not worth a trial."""
    allowed_s = min(map(_cycle_s, forecasts[:current]))
    best = min(forecasts, key=_cycle_s)
    if best.num_streams > current:
        return best.num_streams if best.cycle_s < (1.0 - GAIN) * allowed_s else current
    if forecasts[current - 1].cycle_s <= TRIAL_WORSE * best.cycle_s:
        return current
    worthy = max(f.num_streams for f in forecasts[:current] if f.cycle_s <= TRIAL_WORSE * best.cycle_s)
    return max(worthy, rules.least_streams)


def _version_of(plan: Plan, **numbers: float) -> Plan:
    """`plan` where the numbers are its own, else one version later."""
    wanted = msgspec.structs.replace(plan, **numbers)
    return plan if wanted == plan else msgspec.structs.replace(wanted, version=plan.version + 1)


def _cycle_s(forecast: Forecast) -> float:
    return forecast.cycle_s
