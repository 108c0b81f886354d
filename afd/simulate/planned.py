"""What is planned to happen: losses (`--fail ROLE:INDEX@SECONDS[+RESTART_S]`), rollouts (`--rollout
ROLE@SECONDS`), other numbers of attention workers (`--scale WORKERS@SECONDS`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from afd.errors import ConfigError
from afd.plan.search import MAX_ATTENTION
from afd.simulate.loading import LoadTimes
from afd.types import Topology

_FAILURE = re.compile(r"^(attention|ffn):(\d{1,4})@(\d+(?:\.\d+)?)(?:\+(load|\d+(?:\.\d+)?))?$")

_SCALING = re.compile(r"^([1-9]\d{0,2})@(\d+(?:\.\d+)?)$")
_ROLLOUT = re.compile(r"^(attention|ffn)@(\d+(?:\.\d+)?)$")


@dataclass(frozen=True, slots=True)
class Failure:
    """A worker is killed at `at_s`; restart_s later its successor is ready (None = never)."""

    role: str
    rank: int
    at_s: float
    restart_s: float | None

    def __str__(self) -> str:
        return f"the loss of {self.role}/{self.rank}"

    @classmethod
    def parse(cls, text: str, topology: Topology, load: LoadTimes) -> Failure:
        """ "attention:0@30+12", "ffn:1@30+load" (as long as its successor loads weights) or "ffn:1@30"; ConfigError
        otherwise, or where the topology has no such worker.
        """
        match = _FAILURE.match(text)
        if match is None:
            raise ConfigError(f"--fail {text!r} is not ROLE:INDEX@SECONDS[+RESTART_S|+load], such as attention:0@30+12")
        role, rank = match[1], int(match[2])
        size = topology.num_attention if role == "attention" else topology.num_ffn
        if rank >= size:
            raise ConfigError(f"--fail {text!r}: {topology} has {role} workers 0 to {size - 1}")
        restart_s = load.of_role(role) if match[4] == "load" else None if match[4] is None else float(match[4])
        return cls(role, rank, float(match[3]), restart_s)


@dataclass(frozen=True, slots=True)
class PlannedRollout:
    """The workers of `role` are replaced, from `at_s` on."""

    role: str
    at_s: float

    def __str__(self) -> str:
        return f"the rollout of {self.role}"

    @classmethod
    def parse(cls, text: str) -> PlannedRollout:
        """ "attention@30"; ConfigError otherwise."""
        match = _ROLLOUT.match(text)
        if match is None:
            raise ConfigError(f"--rollout {text!r} is not ROLE@SECONDS, such as attention@30")
        return cls(match[1], float(match[2]))


@dataclass(frozen=True, slots=True)
class PlannedScaling:
    """There are to be so many attention workers, from `at_s` on."""

    num_attention: int
    at_s: float

    def __str__(self) -> str:
        return f"the change to {self.num_attention} attention workers"

    @classmethod
    def parse(cls, text: str) -> PlannedScaling:
        """ "4@30"; ConfigError otherwise."""
        match = _SCALING.match(text)
        if match is None or int(match[1]) > MAX_ATTENTION:
            raise ConfigError(f"--scale {text!r} is not WORKERS@SECONDS, such as 4@30, of 1 to {MAX_ATTENTION}")
        return cls(int(match[1]), float(match[2]))
