"""What is lost when: `--fail ROLE:INDEX@SECONDS[+RESTART_S]`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from afd.errors import ConfigError
from afd.types import Topology

_FAILURE = re.compile(r"^(attention|ffn):(\d{1,4})@(\d+(?:\.\d+)?)(?:\+(\d+(?:\.\d+)?))?$")


@dataclass(frozen=True, slots=True)
class Failure:
    """A worker is killed at `at_s`; restart_s later its successor is ready (None = never)."""

    role: str
    rank: int
    at_s: float
    restart_s: float | None

    @classmethod
    def parse(cls, text: str, topology: Topology) -> Failure:
        """ "attention:0@30+12" or "ffn:1@30"; ConfigError otherwise, or where the topology has no such worker."""
        match = _FAILURE.match(text)
        if match is None:
            raise ConfigError(f"--fail {text!r} is not ROLE:INDEX@SECONDS[+RESTART_S], such as attention:0@30+12")
        role, rank = match[1], int(match[2])
        size = topology.num_attention if role == "attention" else topology.num_ffn
        if rank >= size:
            raise ConfigError(f"--fail {text!r}: {topology} has {role} workers 0 to {size - 1}")
        return cls(role, rank, float(match[3]), None if match[4] is None else float(match[4]))
