"""Round trips that are not back to back: after a pause, and on a host whose cores are all busy with other work."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from typing import Any

PAUSES_S = {"1 ms": 0.001, "10 ms": 0.01, "1 s": 1.0}
GOAL_LOADED_P99_US = 20_000.0

spawn = multiprocessing.get_context("spawn")


def burn(stop: Event) -> None:
    """Other work: integer arithmetic that never sleeps."""
    number = 1
    while not stop.is_set():
        for _ in range(10_000):
            number = number * 1103515245 + 12345 & 0x7FFFFFFF


@contextmanager
def busy_cores() -> Iterator[int]:
    """Keep as many processes busy as this process has cores."""
    stop = spawn.Event()
    num_cores = len(os.sched_getaffinity(0))
    workers = [spawn.Process(target=burn, args=(stop,), daemon=True) for _ in range(num_cores)]
    for worker in workers:
        worker.start()
    try:
        time.sleep(1.0)  # an interpreter takes a moment to start
        yield num_cores
    finally:
        stop.set()
        for worker in workers:
            worker.join(10.0)
            if worker.is_alive():
                worker.terminate()
                worker.join()


def percentiles(times_ns: list[int]) -> dict[str, Any]:
    micros = sorted(time_ns / 1e3 for time_ns in times_ns)
    return {
        "p50_us": round(micros[len(micros) // 2], 1),
        "p99_us": round(micros[len(micros) * 99 // 100], 1),
        "max_us": round(micros[-1], 1),
        "samples": len(micros),
    }
