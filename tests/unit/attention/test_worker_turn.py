"""When a worker's loop publishes what a step brought, lets the latency model learn of it, and reports."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from afd.attention.worker import _Worker
from afd.errors import PeerLostError


class Engine:
    """Plays one step after another: what each `run_once` brings, and whether anything is in flight behind it."""

    def __init__(self, log: list[str], *turns: tuple[list[str], bool], idle: bool = False) -> None:
        self.log, self.turns = log, list(turns)
        self.in_flight = False
        self.scheduler = SimpleNamespace(idle=idle)
        self.stages = SimpleNamespace(deliver=lambda: log.append("deliver"))

    def run_once(self, timeout_s: float) -> list[str]:
        self.log.append("run")
        outputs, self.in_flight = self.turns.pop(0)
        if outputs == ["lost"]:
            raise PeerLostError("gone")
        return outputs


def worker_of(engine: Engine, log: list[str]) -> _Worker:
    worker = object.__new__(_Worker)
    worker._engine, worker._news = engine, []
    worker._book = SimpleNamespace(publish=lambda news: log.append(f"publish {' '.join(news)}"))
    worker._choose_streams = lambda: None
    worker._patience = lambda: 0.01
    worker._report = lambda now: log.append("report")
    return worker


def run(worker: _Worker, seconds: float = 60.0) -> None:
    import time

    worker._run_stages(time.monotonic() + seconds)


def test_a_steps_tokens_leave_behind_the_next_steps_first_stage() -> None:
    log: list[str] = []
    worker = worker_of(Engine(log, (["a"], False), ([], True), ([], False)), log)
    run(worker)
    assert log == ["run"]  # another step begins at once: in the next turn
    run(worker)
    assert log == ["run", "run", "publish a", "deliver", "report", "run", "deliver"]


def test_the_last_ones_leave_at_once() -> None:
    log: list[str] = []
    run(worker_of(Engine(log, (["a"], False), idle=True), log))
    assert log == ["run", "publish a", "deliver", "report", "deliver"]


def test_with_other_streams_in_flight_they_leave_before_the_next_stage() -> None:
    log: list[str] = []
    run(worker_of(Engine(log, (["a"], True), ([], False)), log))
    assert log == ["run", "publish a", "deliver", "report", "run", "deliver"]


def test_a_step_without_tokens_is_learnt_of_too() -> None:
    """A chunk of a long prompt."""
    log: list[str] = []
    run(worker_of(Engine(log, ([], False)), log))
    assert log == ["run", "deliver"]


def test_a_lost_peer_holds_no_token_back() -> None:
    log: list[str] = []
    worker = worker_of(Engine(log, (["a"], False), (["lost"], False)), log)
    run(worker)
    with pytest.raises(PeerLostError):
        run(worker)
    assert log == ["run", "run", "publish a", "deliver", "report"]
