"""A made-up timeline of a 2A1F run: every stage, gang and crossing is known."""

from __future__ import annotations

from afd.telemetry.ring import Stage
from afd.trace.timeline import ATTENTION, FFN, Timeline, Worker

MS = 1e-3
GANG_BASE = 1 << 48


def gang_of(step: int, stream: int) -> int:
    return GANG_BASE | (step * 2 + stream + 1)


def two_to_one(
    *, num_steps: int = 4, num_layers: int = 4, num_streams: int = 2, seconds: float = 0.2, title: str = "2A1F made up"
) -> Timeline:
    """Each layer: 1 ms attention, 0.1 ms dispatch, away 2 ms, of which the FFN computes 0.8 ms; 0.1 ms combine."""
    rows: dict[tuple[str, int], list[Stage]] = {(ATTENTION, 0): [], (ATTENTION, 1): [], (FFN, 0): []}
    for rank in (0, 1):
        own = rows[ATTENTION, rank]
        for step in range(num_steps):
            for stream in range(num_streams):
                gang = gang_of(step, stream)
                t = (step * num_layers * 4 + stream * 1.5 + rank * 0.1) * MS
                for layer in range(num_layers):
                    first = "combine" if layer else "embed"
                    own.append(Stage(first, t, t + 0.1 * MS, stream, layer - 1, 8, step))
                    own.append(Stage("attention", t + 0.1 * MS, t + 1.1 * MS, stream, layer, 8, step))
                    own.append(Stage("dispatch", t + 1.1 * MS, t + 1.2 * MS, stream, layer, 8, step))
                    own.append(Stage("exchange", t + 1.2 * MS, t + 3.2 * MS, stream, layer, 16, step, gang, 2, 1))
                    t += 3.2 * MS
                own.append(Stage("combine", t, t + 0.1 * MS, stream, num_layers - 1, 8, step))
                own.append(Stage("head", t + 0.1 * MS, t + 0.5 * MS, stream, -1, 8, step))
            own.append(Stage("wait", t + 0.5 * MS, t + 0.6 * MS))
    for step in range(num_steps):
        for stream in range(num_streams):
            t = (step * num_layers * 4 + stream * 1.5 + 1.2) * MS
            for layer in range(num_layers):
                where = (stream, layer, 16, 0, gang_of(step, stream), 2, 1)
                rows[FFN, 0].append(Stage("gang_wait", t, t + 0.2 * MS, *where))
                rows[FFN, 0].append(Stage("ffn", t + 0.2 * MS, t + 1.0 * MS, *where))
                rows[FFN, 0].append(Stage("combine", t + 1.0 * MS, t + 1.1 * MS, *where))
                t += 3.2 * MS
    workers = tuple(
        Worker(role, rank, 100 + rank, tuple(sorted(stages, key=lambda s: (s.start_s, s.end_s))))
        for (role, rank), stages in rows.items()
    )
    return Timeline(workers, seconds, title)
