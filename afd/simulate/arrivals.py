"""Who asks when, for how many tokens. Requests are made one at a time, so memory does not grow with their number."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from afd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Request:
    """One simulated request.

    at_s: when it reaches the gateway.
    num_output: tokens that its answer will have.
    """

    idx: int
    at_s: float
    num_prompt: int
    num_output: int


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

    def __iter__(self) -> Iterator[Request]:
        rng, at_s = random.Random(f"{self.seed}/arrivals"), 0.0
        scale = 1.0 / (self.rate * self.burstiness)
        for idx in range(self.num_requests):
            at_s += rng.gammavariate(self.burstiness, scale)
            yield Request(idx, at_s, self.prompt.sample(rng), self.output.sample(rng))


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """`concurrency` clients, each of which sends its next request when the last one is answered (at_s is not used)."""

    num_requests: int
    concurrency: int
    prompt: Lengths
    output: Lengths
    seed: int

    def __iter__(self) -> Iterator[Request]:
        rng = random.Random(f"{self.seed}/arrivals")
        for idx in range(self.num_requests):
            yield Request(idx, 0.0, self.prompt.sample(rng), self.output.sample(rng))


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    at_s: Annotated[float, msgspec.Meta(ge=0)]
    input_len: Annotated[int, msgspec.Meta(ge=1)]
    output_len: Annotated[int, msgspec.Meta(ge=1)]


@dataclass(frozen=True, slots=True)
class TraceFile:
    """JSON lines {"at_s": 0.25, "input_len": 310, "output_len": 128}, in order of time.

    num_requests: at most.
    """

    path: str
    num_requests: int

    def check(self, max_context: int, max_tokens: int = 0) -> TraceSize:
        """Reads the file once; ConfigError names the line at fault.

        max_tokens: what clients allow; 0 = the length.
        """
        total, prompt, output, last_s = 0, 0, 0, 0.0
        for request in self:
            longest, where = request.num_prompt + (max_tokens or request.num_output), f"request {request.idx + 1}"
            if longest > max_context:
                raise ConfigError(f"--trace {self.path}, {where}: {longest} tokens are past the limit of {max_context}")
            if max_tokens and request.num_output > max_tokens:
                raise ConfigError(f"--trace {self.path}, {where}: its answer is longer than --max-tokens {max_tokens}")
            total, prompt, output = total + 1, prompt + request.num_prompt, output + request.num_output
            last_s = request.at_s
        if not total:
            raise ConfigError(f"--trace {self.path}: no requests")
        return TraceSize(total, prompt / total, output / total, last_s)

    def __iter__(self) -> Iterator[Request]:
        try:
            yield from self._read()
        except OSError as error:
            raise ConfigError(f"--trace {self.path}: {error.strerror or error}") from None

    def _read(self) -> Iterator[Request]:
        decoder, idx, last_s = msgspec.json.Decoder(_Line), 0, 0.0
        with Path(self.path).open("rb") as lines:
            for number, text in enumerate(lines, start=1):
                if idx == self.num_requests:
                    return
                if not text.strip():
                    continue
                try:
                    line = decoder.decode(text)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise ConfigError(f"--trace {self.path}, line {number}: {error}") from None
                if line.at_s < last_s:
                    raise ConfigError(f"--trace {self.path}, line {number}: at_s goes back from {last_s:g} s")
                last_s = line.at_s
                yield Request(idx, line.at_s, line.input_len, line.output_len)
                idx += 1


@dataclass(frozen=True, slots=True)
class TraceSize:
    """What a trace file holds.

    mean_prompt, mean_output: tokens.
    last_s: of the last arrival.
    """

    num_requests: int
    mean_prompt: float
    mean_output: float
    last_s: float


Arrivals = OpenLoop | ClosedLoop | TraceFile
