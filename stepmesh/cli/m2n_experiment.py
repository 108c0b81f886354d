"""What `python -m stepmesh m2n` is asked to exchange, from the command line's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from stepmesh.config import MAX_ATTENTION_RANKS, TRANSPORTS, TransportChoice
from stepmesh.errors import ConfigError
from stepmesh.types import RankId, Role

ROW_BYTES = 64

_MAX_BYTES = 64 << 20
_UNITS = {"K": 1 << 10, "M": 1 << 20}


@dataclass(frozen=True, slots=True)
class Experiment:
    """What to run."""

    num_attention: int
    num_ffn: int
    transports: tuple[TransportChoice, ...]
    sizes: tuple[int, ...]  # bytes of a dispatch to one peer
    back: int  # bytes of an answer: this many times as many
    count: int
    host: str
    timeout_s: float

    @classmethod
    def parse(
        cls, *, ranks: str, transports: str, sizes: str, back: str, count: int, host: str, timeout_s: float
    ) -> Experiment:
        """Read an experiment from the command line's words. Raises ConfigError."""
        sides = ranks.split("x")
        if len(sides) != 2 or not all(side.isdecimal() and 1 <= int(side) <= MAX_ATTENTION_RANKS for side in sides):
            raise ConfigError(f"ranks {ranks!r}: say MxN with numbers in 1..{MAX_ATTENTION_RANKS}, such as 2x2")
        names = transports.split(",")
        usable = [name for name in TRANSPORTS if name != "inproc"]
        if unknown := [name for name in names if name not in usable]:
            raise ConfigError(f"transport {unknown[0]!r} is not one of {', '.join(usable)}")
        if back not in ("1", "2"):
            raise ConfigError(f"back {back!r} is not 1 or 2")
        if count < 1 or not timeout_s > 0:
            raise ConfigError("count and timeout must be positive")
        wanted = tuple(parse_size(size) for size in sizes.split(","))
        return cls(
            int(sides[0]),
            int(sides[1]),
            tuple(cast(TransportChoice, name) for name in names),
            wanted,
            int(back),
            count,
            host,
            timeout_s,
        )

    @property
    def ranks(self) -> list[RankId]:
        attention = [RankId(Role.ATTENTION, rank) for rank in range(self.num_attention)]
        return attention + [RankId(Role.FFN, rank) for rank in range(self.num_ffn)]


def parse_size(text: str) -> int:
    """A number of bytes, rounded up to whole rows of 64. Raises ConfigError."""
    digits, unit = (text[:-1], _UNITS[text[-1]]) if text[-1:] in _UNITS else (text, 1)
    if not digits.isdecimal() or not 0 <= int(digits) * unit <= _MAX_BYTES:
        raise ConfigError(f"size {text!r} is not a number of bytes up to 64M, such as 64, 8K or 917504")
    return -(-int(digits) * unit // ROW_BYTES) * ROW_BYTES
