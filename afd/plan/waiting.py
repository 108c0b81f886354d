"""How long requests wait for one of several servers that take equal times: M/D/c in closed form. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

RARE = 0.01
"""Share of requests that wait for longer than `Waiting.p99_s`."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Seconds between the arrival of a request and the begin of its service."""

    mean_s: float
    p99_s: float


def waiting(rate: float, service_s: float, servers: float) -> Waiting:
    """Poisson arrivals at `rate` a second, `servers` servers that take `service_s` for each; infinite from load 1 on.

    Somebody waits with the chance load^(sqrt(2 (c + 1)) - 1) (Sakasegawa, exact for one server), then for
    service / (2 c (1 - load)) in the mean, half of what exponential service would cost, and exponentially distributed.
    """
    load = rate * service_s / servers
    if load >= 1.0:
        return Waiting(math.inf, math.inf)
    chance = load ** (math.sqrt(2.0 * (servers + 1.0)) - 1.0)
    if_any_s = service_s / (2.0 * servers * (1.0 - load))
    return Waiting(chance * if_any_s, max(0.0, math.log(max(chance, RARE) / RARE)) * if_any_s)
