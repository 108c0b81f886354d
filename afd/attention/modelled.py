"""An engine without a model: steps take the time that a formula says, tokens are hashes. No weights, no KV tensors.

For all that is not computing (gateway, admission, supervisor, load tests) at the speed of a real machine and the cost
of none. It has the interface, scheduler and stage clock of `AttentionEngine`, in topology mono. Configuration:
`attention.modelled = "base_ms=4,token_us=150,context_us=0.2"`.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from afd.attention.python_path import leg_of_one
from afd.attention.stages import StageClock
from afd.errors import ConfigError
from afd.messages.serving import TokenLogprobs
from afd.sched.latency import StepLoad
from afd.sched.scheduler import Scheduler
from afd.sched.sequence import MicroBatch, Output, Sequence

PRECISION_S = 1e-3  # of `wait`; shorter rests are slept


@dataclass(frozen=True, slots=True)
class StepFormula:
    """Seconds of one micro-batch: base_s + token_s * tokens + context_s * (KV entries read)."""

    base_s: float = 0.0
    token_s: float = 0.0
    context_s: float = 0.0

    @classmethod
    def parse(cls, text: str) -> StepFormula:
        """ "base_ms=4,token_us=150,context_us=0.2", each key at most once; ConfigError otherwise."""
        units = {"base_ms": ("base_s", 1e-3), "token_us": ("token_s", 1e-6), "context_us": ("context_s", 1e-6)}
        values: dict[str, float] = {}
        for part in text.split(","):
            key, equals, number = part.partition("=")
            field, unit = units.get(key.strip(), ("", 0.0))
            try:
                value = float(number) * unit
            except ValueError:
                value = -1.0
            if not equals or not field or field in values or not 0.0 <= value < math.inf:
                raise ConfigError(
                    f"attention.modelled: {part.strip()!r} is not KEY=NUMBER with one of {', '.join(units)}, each once"
                )
            values[field] = value
        if not sum(values.values()):
            raise ConfigError("attention.modelled: steps would take no time; set base_ms or token_us")
        return cls(**values)

    def step_s(self, load: StepLoad) -> float:
        return self.base_s + self.token_s * load.num_tokens + self.context_s * load.context_tokens


@dataclass(frozen=True, slots=True)
class _Flight:
    batch: MicroBatch
    started_s: float
    ends_s: float


class ModelledEngine:
    """One device that computes one micro-batch at a time, streams in turn. Main thread only.

    wait: block for at most so many seconds (to PRECISION_S), less when there is something else to do.
    """

    def __init__(
        self,
        formula: StepFormula,
        scheduler: Scheduler,
        vocab_size: int,
        *,
        wait: Callable[[float], None],
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.scheduler = scheduler
        self.stages = StageClock(clock)
        self._formula = formula
        self._vocab_size = vocab_size
        self._wait = wait
        self._sleep = sleep
        self._clock = clock
        self._flight: _Flight | None = None
        self._next_stream = 0

    @property
    def in_flight(self) -> bool:
        """True while a micro-batch is being computed."""
        return self._flight is not None

    def run_once(self, timeout_s: float) -> list[Output]:
        """Start a micro-batch if none runs; return what one brought if it ends within `timeout_s`."""
        if self._flight is None:
            self._flight = self._begin()
        if self._flight is None:
            return []
        left_s = self._flight.ends_s - self._clock()
        if left_s > 0.0 and timeout_s > 0.0:
            pause = self._wait if left_s >= PRECISION_S else self._sleep
            pause(min(left_s, timeout_s))
        if self._clock() < self._flight.ends_s:
            return []
        return self._finish(self._flight)

    def fail(self) -> None:
        """Drop what is being computed; its sequences stay where they were."""
        if self._flight is not None:
            self.scheduler.fail_stream(self._flight.batch)
            self.stages.reset()
            self._flight = None

    def _begin(self) -> _Flight | None:
        """The next stream in turn that has something to compute."""
        num_slots = self.scheduler.num_slots
        for offset in range(num_slots):
            stream = (self._next_stream + offset) % num_slots
            batch = self.scheduler.schedule(stream)
            if batch is not None:
                self._next_stream = stream + 1
                now = self._clock()
                return _Flight(batch, now, now + self._formula.step_s(StepLoad.of(batch)))
        return None

    def _finish(self, flight: _Flight) -> list[Output]:
        self._flight = None
        batch = flight.batch
        computed_s = self._clock()
        times = (flight.started_s, flight.started_s, computed_s, computed_s)
        self.stages.book(batch, leg_of_one(batch.stream, 0, times))
        sampled = {
            item.seq.req_id: modelled_token(item.seq, self._vocab_size)
            for item in batch.items
            if item.samples and item.seq.doomed is None
        }
        progress = self.scheduler.commit(batch, sampled)
        more = not self.scheduler.idle
        self.stages.finish(batch.stream, batch, computed_s, started_s=flight.started_s, more=more)
        return [Output(p, self._logprobs(p.seq, p.ids[0])) for p in progress]

    def _logprobs(self, seq: Sequence, token: int) -> TokenLogprobs | None:
        """Every token is equally likely; the "most likely" ones are the sampled one and its neighbours."""
        if seq.sampling.logprobs < 0:
            return None
        logprob = -math.log(self._vocab_size)
        return TokenLogprobs(
            logprob, [((token + offset) % self._vocab_size, logprob) for offset in range(seq.sampling.logprobs)]
        )


def modelled_token(seq: Sequence, vocab_size: int) -> int:
    """Depends on position, the token before and, unless greedy, seed and choice: a moved request goes on as before."""
    drawn = "" if seq.sampling.greedy else f"{seq.sampling.seed} {seq.sampling.choice}"
    key = f"{drawn} {seq.num_output} {seq.tokens[-1]}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") % vocab_size
