"""Who asks when, for how many tokens. Requests are made one at a time, so memory does not grow with their number."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Request:
    """One simulated request.

    at_s: when it reaches the gateway.
    num_output: tokens that its answer will have.
    hash_ids: names of its prompt's leading blocks, each of the block and all before it; two prompts that begin with
        the same names begin with the same tokens (`afd.simulate.prompts`).
    """

    idx: int
    at_s: float
    num_prompt: int
    num_output: int
    hash_ids: tuple[int, ...] = ()


class Arrivals(Protocol):
    """Requests in order of time, the same ones whenever they are iterated.

    concurrency: clients of a closed loop, each of which sends its next request when the last one is answered (`at_s` is
        not used); 0 = requests come when they come.
    shares_prefixes: some request has hash_ids.
    """

    @property
    def concurrency(self) -> int: ...

    @property
    def shares_prefixes(self) -> bool: ...

    def __iter__(self) -> Iterator[Request]: ...


@dataclass(frozen=True, slots=True)
class Lengths:
    """Uniform over the whole numbers within +- `ratio` of the mean, as `afd bench --range-ratio`."""

    mean: int
    ratio: float = 0.0

    @property
    def longest(self) -> int:
        return max(self._low, int(self.mean * (1 + self.ratio)))

    @property
    def _low(self) -> int:
        return max(1, int(self.mean * (1 - self.ratio)))

    def sample(self, rng: random.Random) -> int:
        low = self._low
        return low if not self.ratio else rng.randint(low, self.longest)


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """`rate` requests/s, gaps gamma distributed with shape `burstiness`: 1 = Poisson, below = bursts."""

    num_requests: int
    rate: float
    burstiness: float
    prompt: Lengths
    output: Lengths
    seed: int

    @property
    def concurrency(self) -> int:
        return 0

    @property
    def shares_prefixes(self) -> bool:
        return False

    def __iter__(self) -> Iterator[Request]:
        rng, at_s = random.Random(f"{self.seed}/arrivals"), 0.0
        scale = 1.0 / (self.rate * self.burstiness)
        for idx in range(self.num_requests):
            at_s += rng.gammavariate(self.burstiness, scale)
            yield Request(idx, at_s, self.prompt.sample(rng), self.output.sample(rng))


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """`concurrency` clients, each of which sends its next request when the last one is answered."""

    num_requests: int
    concurrency: int
    prompt: Lengths
    output: Lengths
    seed: int

    @property
    def shares_prefixes(self) -> bool:
        return False

    def __iter__(self) -> Iterator[Request]:
        rng = random.Random(f"{self.seed}/arrivals")
        for idx in range(self.num_requests):
            yield Request(idx, 0.0, self.prompt.sample(rng), self.output.sample(rng))
