"""How long an answer will get, from the answers that ended. Pure."""

from __future__ import annotations

import math

from afd.types import SamplingParams

FIRST_GUESS = 256  # output tokens, before any answer has ended
EMA = 0.05
DEVIATIONS = 1.0  # planned above the mean: most answers end before
OVERDUE = 1.25  # an answer already longer than planned is expected to get a quarter longer still


class LengthForecast:
    """`max_tokens` is a bound, and often just the context limit; a request that cannot stop early does reach it."""

    def __init__(self) -> None:
        self._mean = float(FIRST_GUESS)
        self._variance = 0.0
        self._num_ended = 0
        self._planned = self._mean

    def add(self, num_output: int) -> None:
        """One answer ended by itself, with so many output tokens."""
        self._num_ended += 1
        weight = max(EMA, 1.0 / self._num_ended)
        error = num_output - self._mean
        self._mean += weight * error
        self._variance = (1.0 - weight) * (self._variance + weight * error * error) if self._num_ended > 1 else 0.0
        self._planned = self._mean + DEVIATIONS * math.sqrt(self._variance)

    def final_output(self, sampling: SamplingParams, num_output: int) -> int:
        """Planned number of output tokens of a request that has `num_output` now; at most its max_tokens."""
        if not sampling.stop_token_ids:
            return sampling.max_tokens
        return min(sampling.max_tokens, math.ceil(max(self._planned, OVERDUE * num_output, num_output + 1)))
