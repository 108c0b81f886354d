"""Stages of all workers on one time axis. Pure.

A `Timeline`'s times are seconds since its start. What crosses from one worker to another is found again by name: an
exchange and the batch that served it have the same (stream, layer, gang).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from afd.telemetry.ring import Stage
from afd.trace.clocks import Offset

ATTENTION, FFN = "attention", "ffn"
COMPUTING = ("embed", "attention", "dispatch", "combine", "look_ahead", "head_slice", "head", "ffn")
"""Stages that keep the main thread busy; the others ("exchange", "wait", "gang_wait") are waits or overlap."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One process.

    stages: in order of their start.
    complete_from_s: before it, some stages may be missing.

    clock_error_s: its stages may be off by this much either way, against the other workers.
    """

    role: str
    rank: int
    pid: int
    stages: tuple[Stage, ...]
    clock_error_s: float = 0.0
    complete_from_s: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.role}/{self.rank}"

    @property
    def short_name(self) -> str:
        """ "A0", "F1"."""
        return f"{self.role[0].upper()}{self.rank}"


@dataclass(frozen=True, slots=True)
class Timeline:
    """The stages of all workers on one clock.

    workers: attention first, in rank order.
    missing: workers that gave nothing, with the reason.
    """

    workers: tuple[Worker, ...]
    seconds: float
    title: str = ""
    missing: tuple[str, ...] = ()

    @property
    def num_streams(self) -> int:
        return 1 + max((stage.stream for worker in self.workers for stage in worker.stages), default=-1)

    def of_role(self, role: str) -> tuple[Worker, ...]:
        return tuple(worker for worker in self.workers if worker.role == role)


@dataclass(frozen=True, slots=True)
class Dump:
    """The answer of one worker, in its own clock.

    now_s: its reading then.
    kept_since_s: older stages are gone.
    """

    role: str
    rank: int
    pid: int
    now_s: float
    kept_since_s: float
    stages: Sequence[Stage]
    offset: Offset


def build(dumps: Iterable[Dump], seconds: float, *, title: str = "", missing: Sequence[str] = ()) -> Timeline:
    """The last `seconds` that all dumps cover, on our clock."""
    dumps = sorted(dumps, key=lambda dump: (dump.role != ATTENTION, dump.role, dump.rank))
    end_s = min((dump.now_s + dump.offset.used.offset_s for dump in dumps), default=0.0)
    start_s = end_s - seconds
    workers = []
    for dump in dumps:
        shift_s = dump.offset.used.offset_s - start_s
        moved = (shifted(stage, shift_s) for stage in dump.stages)
        stages = sorted((s for s in moved if s.end_s > 0.0 and s.start_s < seconds), key=lambda s: (s.start_s, s.end_s))
        workers.append(
            Worker(
                dump.role,
                dump.rank,
                dump.pid,
                tuple(stages),
                dump.offset.used.error_s,
                max(0.0, dump.kept_since_s + shift_s) if dump.kept_since_s else 0.0,
            )
        )
    return Timeline(tuple(workers), seconds, title, tuple(missing))


def shifted(stage: Stage, by_s: float) -> Stage:
    """The same stage `by_s` later."""
    return Stage(
        stage.name,
        stage.start_s + by_s,
        stage.end_s + by_s,
        stage.stream,
        stage.layer,
        stage.num_tokens,
        stage.step,
        stage.gang_id,
        stage.gang_size,
        stage.epoch,
    )


def gang_name(gang_id: int) -> str:
    """ "1.0.23": epoch, forming FFN rank, count; "" without a gang."""
    return f"{gang_id >> 48}.{gang_id >> 32 & 0xFFFF}.{gang_id & 0xFFFFFFFF}" if gang_id else ""


def gang_of_name(name: str) -> int:
    """The inverse of `gang_name`. ValueError for anything else."""
    if not name:
        return 0
    epoch, rank, count = (int(part) for part in name.split("."))
    return epoch << 48 | rank << 32 | count


@dataclass(frozen=True, slots=True)
class Hop:
    """One attention worker's part in one batch.

    dispatch, combine: of the attention worker; None = outside the trace.
    exchange: from its dispatch until it noticed the last FFN worker's answer.
    ffn, answer: the FFN worker's computing and sending.
    """

    attention: Worker
    ffn_worker: Worker
    dispatch: Stage | None
    ffn: Stage
    answer: Stage | None
    combine: Stage | None
    exchange: Stage


def hops(timeline: Timeline) -> Iterator[Hop]:
    """Every crossing that can be told: those of batches whose gang is known (an FFN rank that did not form it does
    not know it at layer 0)."""
    exchanges: dict[tuple[int, int, int], list[tuple[Worker, Stage]]] = defaultdict(list)
    dispatches: dict[tuple[str, int, int, int], Stage] = {}
    combines: dict[tuple[str, int, int, int], Stage] = {}
    for worker in timeline.of_role(ATTENTION):
        for stage in worker.stages:
            where = (worker.name, stage.stream, stage.layer, stage.step)
            if stage.name == "exchange" and stage.gang_id:
                exchanges[stage.stream, stage.layer, stage.gang_id].append((worker, stage))
            elif stage.name == "dispatch":
                dispatches[where] = stage
            elif stage.name == "combine":
                combines[where] = stage
    for ffn_worker in timeline.of_role(FFN):
        answers = {(s.stream, s.layer, s.gang_id): s for s in ffn_worker.stages if s.name == "combine"}
        for ffn in ffn_worker.stages:
            if ffn.name != "ffn" or not ffn.gang_id:
                continue
            answer = answers.get((ffn.stream, ffn.layer, ffn.gang_id))
            for worker, exchange in exchanges[ffn.stream, ffn.layer, ffn.gang_id]:
                where = (worker.name, exchange.stream, exchange.layer, exchange.step)
                yield Hop(worker, ffn_worker, dispatches.get(where), ffn, answer, combines.get(where), exchange)


def gang_members(timeline: Timeline) -> dict[int, str]:
    """gang_id -> "A0+A1", as far as the trace shows."""
    members: dict[int, set[str]] = defaultdict(set)
    for worker in timeline.of_role(ATTENTION):
        for stage in worker.stages:
            if stage.gang_id:
                members[stage.gang_id].add(worker.short_name)
    return {gang_id: "+".join(sorted(names)) for gang_id, names in members.items()}


def lanes(stages: Sequence[Stage]) -> list[int]:
    """Lane of each stage (in order of their start) such that no two of one lane overlap: the first free one."""
    free_at_s: list[float] = []
    chosen = []
    for stage in stages:
        lane = next((idx for idx, until_s in enumerate(free_at_s) if until_s <= stage.start_s), len(free_at_s))
        free_at_s[lane:] = [stage.end_s, *free_at_s[lane + 1 :]]
        chosen.append(lane)
    return chosen
