"""Requests recorded elsewhere, replayed: JSON lines in this project's form or in that of the Mooncake traces.

    {"at_s": 0.25, "input_len": 310, "output_len": 128}
    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353]}

Mooncake's timestamps are milliseconds. Either may have hash_ids: names of a prompt's leading blocks (512 tokens each in
Mooncake's), where the same names mean the same prefix.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from afd.errors import ConfigError
from afd.simulate.arrivals import Request

MOONCAKE_BLOCK_TOKENS = 512
MAX_HASH_ID = (1 << 63) - 1

_Count = Annotated[int, msgspec.Meta(ge=1)]
_Moment = Annotated[float, msgspec.Meta(ge=0)]
_HashId = Annotated[int, msgspec.Meta(ge=0, le=MAX_HASH_ID)]


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request in either form: a time and two lengths, each by one of two names."""

    at_s: _Moment | None = None
    timestamp: _Moment | None = None
    input_len: _Count | None = None
    input_length: _Count | None = None
    output_len: _Count | None = None
    output_length: _Count | None = None
    hash_ids: list[_HashId] = []

    def request(self, idx: int, speed: float) -> Request:
        """ValueError naming what is missing or there twice."""
        own = (self.at_s, self.input_len, self.output_len)
        mooncake = (self.timestamp, self.input_length, self.output_length)
        for ours, theirs, names in zip(own, mooncake, _NAMES, strict=True):
            if (ours is None) == (theirs is None):
                raise ValueError(f"expected exactly one of {names[0]} and {names[1]}")
        at_s = self.at_s if self.at_s is not None else (self.timestamp or 0.0) / 1e3
        num_prompt, num_output = self.input_len or self.input_length or 0, self.output_len or self.output_length or 0
        return Request(idx, at_s / speed, num_prompt, num_output, tuple(self.hash_ids))


_NAMES = (("at_s", "timestamp"), ("input_len", "input_length"), ("output_len", "output_length"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceLimits:
    """What of a trace is replayed, and how.

    num_requests: at most, the earliest; 0 = all.
    max_context: tokens of a prompt and its answer that the model can hold.
    max_tokens: what clients allow for an answer; 0 = its length.
    skip_long: requests past the model's limit are left out, instead of being an error.
    speed: the trace runs so many times as fast as it was recorded.
    hash_block_tokens: tokens that one of its hash_ids names.
    """

    max_context: int
    num_requests: int = 0
    max_tokens: int = 0
    skip_long: bool = False
    speed: float = 1.0
    hash_block_tokens: int = MOONCAKE_BLOCK_TOKENS


class Trace:
    """Arrivals from a file, which is read once to check it, and again by each iteration. 8 bytes a request are kept.

    num_requests: that are replayed.
    num_skipped: that were left out as too long.
    mean_prompt, mean_output: tokens.
    last_s: of the last arrival.
    shares_prefixes: some request has hash_ids.
    """

    def __init__(self, path: str, limits: TraceLimits):
        """ConfigError names the line at fault."""
        self._path = path
        self._limits = limits
        self._decoder = msgspec.json.Decoder(_Line)
        self.num_skipped = 0
        self.shares_prefixes = False
        try:
            found = sorted(self._survey())
        except OSError as error:
            raise ConfigError(f"--trace {path}: {error.strerror or error}") from None
        if not found:
            skipped = f" but {self.num_skipped} that are too long" if self.num_skipped else ""
            raise ConfigError(f"--trace {path}: no requests{skipped}")
        del found[limits.num_requests or len(found) :]
        self._offsets = array("q", [offset for _, offset, _, _ in found])  # of the lines, in order of time
        self.num_requests = len(found)
        self.mean_prompt = sum(num_prompt for *_, num_prompt, _ in found) / len(found)
        self.mean_output = sum(num_output for *_, num_output in found) / len(found)
        self.last_s = found[-1][0]

    @property
    def summary(self) -> str:
        """ "12031 requests of FILE in 3535 s", and what was left out."""
        skipped = f" ({self.num_skipped} longer than {self._limits.max_context} left out)" if self.num_skipped else ""
        return f"{self.num_requests} requests of {self._path} in {self.last_s:.0f} s{skipped}"

    @property
    def concurrency(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Request]:
        with Path(self._path).open("rb") as lines:
            for idx, offset in enumerate(self._offsets):
                lines.seek(offset)
                yield self._decoder.decode(lines.readline()).request(idx, self._limits.speed)

    def _survey(self) -> Iterator[tuple[float, int, int, int]]:
        """Checks every line: (when, where it begins, tokens of the prompt, of the answer) of those to be replayed."""
        with Path(self._path).open("rb") as lines:
            offset = 0
            for number, text in enumerate(lines, start=1):
                request = self._checked(text, number) if text.strip() else None
                if request is not None:
                    yield request.at_s, offset, request.num_prompt, request.num_output
                    self.shares_prefixes = self.shares_prefixes or bool(request.hash_ids)
                offset += len(text)

    def _checked(self, text: bytes, number: int) -> Request | None:
        """The request of a line; None where it is too long and may be left out."""
        limits, where = self._limits, f"--trace {self._path}, line {number}"
        try:
            request = self._decoder.decode(text).request(0, limits.speed)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from None
        most = -(-request.num_prompt // limits.hash_block_tokens)
        if len(request.hash_ids) > most:
            raise ConfigError(
                f"{where}: {len(request.hash_ids)} hash_ids for {request.num_prompt} tokens, {most} blocks of "
                f"{limits.hash_block_tokens}: give --hash-block-tokens"
            )
        if limits.max_tokens and request.num_output > limits.max_tokens:
            raise ConfigError(f"{where}: its answer is longer than --max-tokens {limits.max_tokens}")
        longest = request.num_prompt + (limits.max_tokens or request.num_output)
        if longest <= limits.max_context:
            return request
        if not limits.skip_long:
            raise ConfigError(
                f"{where}: {longest} tokens are past the limit of {limits.max_context}: --skip-long leaves it out"
            )
        self.num_skipped += 1
        return None
