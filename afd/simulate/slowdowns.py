"""Workers that are slower than their kind: `--slow ROLE:INDEX*FACTOR[@SECONDS[+FOR_S]]`. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from afd.errors import ConfigError
from afd.types import Topology

_NUMBER = r"\d+(?:\.\d+)?"
_SLOWDOWN = re.compile(rf"^(attention|ffn):(\d{{1,4}})\*({_NUMBER})(?:@({_NUMBER})(?:\+({_NUMBER}))?)?$")
MAX_FACTOR = 1000.0


@dataclass(frozen=True, slots=True)
class Slowdown:
    """A worker computes for `factor` times as long from `from_s` until `until_s`, simulated seconds."""

    role: str
    rank: int
    factor: float
    from_s: float = 0.0
    until_s: float = float("inf")

    @classmethod
    def parse(cls, text: str, topology: Topology) -> Slowdown:
        """ "ffn:0*1.5" or "attention:3*2@10+30"; ConfigError otherwise, or where the topology has no such worker."""
        match = _SLOWDOWN.match(text)
        if match is None:
            raise ConfigError(
                f"--slow {text!r} is not ROLE:INDEX*FACTOR[@SECONDS[+FOR_S]], such as attention:0*1.5@30+12"
            )
        role, rank, factor = match[1], int(match[2]), float(match[3])
        size = topology.num_attention if role == "attention" else topology.num_ffn
        if rank >= size:
            raise ConfigError(f"--slow {text!r}: {topology} has {role} workers 0 to {size - 1}")
        if not 1.0 <= factor <= MAX_FACTOR:
            raise ConfigError(f"--slow {text!r}: a factor is 1 to {MAX_FACTOR:g}")
        from_s = float(match[4] or 0.0)
        return cls(role, rank, factor, from_s, from_s + float(match[5]) if match[5] else float("inf"))


class Pace:
    """How many times as long as its kind a worker computes at a moment. Slowdowns of one worker multiply.

    The moment at which a stage begins decides for the whole of it.
    """

    def __init__(self, slowdowns: tuple[Slowdown, ...] = (), num_ffn: int = 1):
        self._attention = [slowdown for slowdown in slowdowns if slowdown.role == "attention"]
        self._ffn = [slowdown for slowdown in slowdowns if slowdown.role == "ffn"]
        self._num_ffn = num_ffn

    @property
    def steady(self) -> bool:
        """No worker is ever slower than its kind."""
        return not self._attention and not self._ffn

    def attention(self, rank: int, now: float) -> float:
        """The factor of an attention worker."""
        return _factor(self._attention, rank, now) if self._attention else 1.0

    def ffn(self, rank: int, now: float) -> float:
        """The factor of an FFN rank."""
        return _factor(self._ffn, rank, now) if self._ffn else 1.0

    def ffn_span(self, now: float) -> tuple[float, float]:
        """(mean, largest) factor of all FFN ranks, each of which takes part in every layer."""
        if not self._ffn:
            return 1.0, 1.0
        factors = [self.ffn(rank, now) for rank in range(self._num_ffn)]
        return sum(factors) / len(factors), max(factors)


def _factor(slowdowns: list[Slowdown], rank: int, now: float) -> float:
    factor = 1.0
    for slowdown in slowdowns:
        if slowdown.rank == rank and slowdown.from_s <= now < slowdown.until_s:
            factor *= slowdown.factor
    return factor
