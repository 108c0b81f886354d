"""Who takes part: AFD in some configuration (ours.py), or a peer (peer_process.py). Both answer rounds of prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import psutil

from bench.drawing import GREEDY, Drawing


@dataclass(frozen=True, slots=True)
class Outcome:
    """Output tokens/s from submission to the last token, prefill included, and each prompt's output tokens."""

    tokens_per_s: float
    ids: list[list[int]]


class Contestant(AbstractContextManager, Protocol):
    """Up while its context is entered.  pid: of the process that all its processes descend from."""

    name: str
    pid: int

    def run_round(self, prompts: Sequence[Sequence[int]], output_len: int, drawing: Drawing = GREEDY) -> Outcome: ...


def idle_shares(contestants: Sequence[Contestant], seconds: float) -> dict[str, float]:
    """How much of one core each contestant's processes use while nothing is asked of them."""
    before = [_cpu_seconds(c.pid) for c in contestants]
    begun = time.perf_counter()
    time.sleep(seconds)
    passed = time.perf_counter() - begun
    used = [_cpu_seconds(c.pid) - start for c, start in zip(contestants, before, strict=True)]
    return {c.name: cpu_s / passed for c, cpu_s in zip(contestants, used, strict=True)}


def _cpu_seconds(pid: int) -> float:
    process = psutil.Process(pid)
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)
