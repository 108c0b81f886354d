"""Records in, figures out. Pure: the same records always give the same summary.

Definitions are `vllm bench serve`'s where it has them: TTFT, TPOT, ITL and E2EL over completed requests only;
TPOT = (last - first token time) / (n - 1) per request of two tokens and more; ITL = every gap, pooled; percentiles by
linear interpolation; standard deviation of the population; throughput = tokens of completed requests / duration.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from afd.errors import ConfigError
from afd.load.record import Outcome, RequestRecord

GOAL_NAMES = ("ttft", "tpot", "e2el")
PEAK_WINDOW_S = 1.0


@dataclass(frozen=True, slots=True)
class Distribution:
    """Statistics of some durations, in seconds; zeros when there were none.

    percentiles: (p, value), as asked for.
    """

    count: int
    mean: float
    median: float
    std: float
    max: float
    percentiles: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, values: Iterable[float], percentiles: Sequence[float]) -> Distribution:
        ordered = sorted(values)
        if not ordered:
            return cls(0, 0.0, 0.0, 0.0, 0.0, tuple((p, 0.0) for p in percentiles))
        mean = math.fsum(ordered) / len(ordered)
        variance = math.fsum((value - mean) ** 2 for value in ordered) / len(ordered)
        return cls(
            count=len(ordered),
            mean=mean,
            median=percentile(ordered, 50),
            std=math.sqrt(variance),
            max=ordered[-1],
            percentiles=tuple((p, percentile(ordered, p)) for p in percentiles),
        )


def percentile(ordered: Sequence[float], p: float) -> float:
    """Linear interpolation between the two nearest ranks (numpy's default).

    ordered: sorted, not empty.
    """
    position = (len(ordered) - 1) * p / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True, slots=True)
class Goals:
    """Targets of one request, in seconds: (metric, limit), metric of GOAL_NAMES."""

    limits: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, pairs: Sequence[str]) -> Goals:
        """["tpot:50", "ttft:1000"], milliseconds. ConfigError otherwise."""
        limits: dict[str, float] = {}
        for pair in pairs:
            name, _, text = pair.partition(":")
            try:
                limit_ms = float(text)
            except ValueError:
                limit_ms = -1.0
            if name not in GOAL_NAMES or not 0 <= limit_ms < math.inf:
                raise ConfigError(
                    f"--goodput {pair!r} is not METRIC:MILLISECONDS with a metric of {', '.join(GOAL_NAMES)}"
                )
            limits[name] = limit_ms / 1000
        return cls(tuple(limits.items()))

    def __bool__(self) -> bool:
        return bool(self.limits)


def meets(record: RequestRecord, goal: str, limit_s: float) -> bool | None:
    """Whether a completed request kept a goal; None where the metric does not exist (TPOT of one token)."""
    value = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2el": record.e2el_s}[goal]
    return None if value is None else value <= limit_s


@dataclass(frozen=True, slots=True)
class Attainment:
    """Shares of requests that kept their goals (1 where none could miss).

    per_goal: over completed requests that have the metric.
    joint: all goals, over completed requests.
    joint_of_sent: the same over all requests but interrupted ones: a refusal or a failure is a miss.
    num_good: completed requests that kept all goals.
    """

    num_good: int
    per_goal: tuple[tuple[str, float], ...]
    joint: float
    joint_of_sent: float


@dataclass(frozen=True, slots=True)
class SteadyState:
    """The middle of a run, without its ramps. Output tokens of every request count, however it ended."""

    start_s: float
    end_s: float
    output_throughput: float


@dataclass(frozen=True, slots=True)
class Refusals:
    """503 and 429 answers.

    latency: sent to refused.
    retry_after_s: the smallest and largest seen, None if absent.
    """

    count: int
    latency: Distribution
    num_with_retry_after: int
    retry_after_min_s: float | None
    retry_after_max_s: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """All figures of a run. Durations in seconds, throughputs per second."""

    duration_s: float
    num_completed: int
    num_failed: int
    num_interrupted: int
    outcomes: tuple[tuple[str, int], ...]
    total_input_tokens: int
    total_cached_tokens: int
    total_output_tokens: int
    num_chunks: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2el: Distribution
    client_queue_time: Distribution
    attainment: Attainment | None
    request_goodput: float | None
    steady: SteadyState | None
    refusals: Refusals


def summarise(
    records: Sequence[RequestRecord],
    *,
    duration_s: float,
    percentiles: Sequence[float],
    goals: Goals,
    concurrency: int | None,
) -> Summary:
    """Figures of a whole run.

    concurrency: of a closed loop; None = open loop.
    """
    completed = [record for record in records if record.completed]
    num_output_tokens = sum(record.num_output_tokens for record in completed)
    num_input_tokens = sum(record.num_prompt_tokens for record in completed)
    attainment = attain(records, goals) if goals else None
    output_throughput = num_output_tokens / duration_s
    return Summary(
        duration_s=duration_s,
        num_completed=len(completed),
        num_failed=sum(record.failed for record in records),
        num_interrupted=sum(record.outcome is Outcome.INTERRUPTED for record in records),
        outcomes=tuple(sorted(Counter(record.outcome.value for record in records).items())),
        total_input_tokens=num_input_tokens,
        total_cached_tokens=sum(record.num_cached_tokens for record in completed),
        total_output_tokens=num_output_tokens,
        num_chunks=sum(len(record.token_times) for record in completed),
        request_throughput=len(completed) / duration_s,
        output_throughput=output_throughput,
        total_token_throughput=(num_input_tokens + num_output_tokens) / duration_s,
        max_output_tokens_per_s=output_throughput if duration_s < PEAK_WINDOW_S else peak_output_rate(records),
        max_concurrent_requests=peak_concurrency(records),
        ttft=Distribution.of((ttft for r in completed if (ttft := r.ttft_s) is not None), percentiles),
        tpot=Distribution.of((tpot for r in completed if (tpot := r.tpot_s) is not None), percentiles),
        itl=Distribution.of((gap for r in completed for gap in r.gaps_s()), percentiles),
        e2el=Distribution.of((r.e2el_s for r in completed), percentiles),
        client_queue_time=Distribution.of((r.start_s - r.due_s for r in records), percentiles),
        attainment=attainment,
        request_goodput=attainment.num_good / duration_s if attainment is not None else None,
        steady=steady_state(records, concurrency),
        refusals=count_refusals(records, percentiles),
    )


def attain(records: Sequence[RequestRecord], goals: Goals) -> Attainment:
    """How many requests kept their goals."""
    completed = [record for record in records if record.completed]
    num_sent = sum(record.completed or record.failed for record in records)
    per_goal = []
    for goal, limit_s in goals.limits:
        verdicts = [verdict for record in completed if (verdict := meets(record, goal, limit_s)) is not None]
        per_goal.append((goal, _share(sum(verdicts), len(verdicts))))
    num_good = sum(all(meets(r, goal, limit_s) is not False for goal, limit_s in goals.limits) for r in completed)
    return Attainment(num_good, tuple(per_goal), _share(num_good, len(completed)), _share(num_good, num_sent))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def token_arrivals(records: Iterable[RequestRecord]) -> Iterator[tuple[float, float]]:
    """(time, tokens) of every chunk. A request's tokens are spread evenly over its chunks: usage counts tokens,
    a chunk may bear several."""
    for record in records:
        if record.token_times:
            tokens_per_chunk = record.num_output_tokens / len(record.token_times)
            for time_s in record.token_times:
                yield time_s, tokens_per_chunk


def peak_output_rate(records: Iterable[RequestRecord]) -> float:
    """Most tokens in any half-open window of PEAK_WINDOW_S, per second."""
    arrivals = sorted(token_arrivals(records))
    peak = tokens = 0.0
    oldest = 0
    for time_s, num_tokens in arrivals:
        tokens += num_tokens
        while arrivals[oldest][0] <= time_s - PEAK_WINDOW_S:
            tokens -= arrivals[oldest][1]
            oldest += 1
        peak = max(peak, tokens)
    return peak / PEAK_WINDOW_S


def peak_concurrency(records: Iterable[RequestRecord]) -> int:
    """Most requests between start and end at one time; one that ends as another starts does not overlap it."""
    steps = [(record.start_s, 1) for record in records] + [(record.end_s, -1) for record in records]
    peak = current = 0
    for _, step in sorted(steps):
        current += step
        peak = max(peak, current)
    return peak


def steady_state(records: Sequence[RequestRecord], concurrency: int | None) -> SteadyState | None:
    """Output throughput of the part of a run that says what the server sustains; None when there is no such part.

    Closed loop: from when the first `concurrency` requests all have their first token (or have ended), to the first end
    of a request after the last was sent: in between, `concurrency` requests were always running.
    Open loop: from one median E2EL after the first request, to when the last was sent: arrivals never stopped.
    """
    if not records or (concurrency is not None and len(records) < concurrency):
        return None
    last_sent_s = max(record.start_s for record in records)
    if concurrency is not None:
        first = sorted(records, key=lambda record: record.start_s)[:concurrency]
        start_s = max(record.token_times[0] if record.token_times else record.end_s for record in first)
        end_s = min((record.end_s for record in records if record.end_s > last_sent_s), default=last_sent_s)
    else:
        ends = sorted(record.e2el_s for record in records if record.completed)
        if not ends:
            return None
        start_s = min(record.start_s for record in records) + percentile(ends, 50)
        end_s = last_sent_s
    if end_s <= start_s:
        return None
    num_tokens = math.fsum(tokens for time_s, tokens in token_arrivals(records) if start_s < time_s <= end_s)
    return SteadyState(start_s, end_s, num_tokens / (end_s - start_s))


def count_refusals(records: Iterable[RequestRecord], percentiles: Sequence[float]) -> Refusals:
    """Refused requests apart: how fast the answer was and when to come again."""
    refused = [record for record in records if record.outcome is Outcome.REFUSED]
    waits = [record.retry_after_s for record in refused if record.retry_after_s is not None]
    return Refusals(
        count=len(refused),
        latency=Distribution.of((record.e2el_s for record in refused), percentiles),
        num_with_retry_after=len(waits),
        retry_after_min_s=min(waits, default=None),
        retry_after_max_s=max(waits, default=None),
    )
