"""Ring of per-stage timestamps: what a run is explained from. Bounded, cheap to add to, dumped on demand.

Stages hold names, times and counts only: no text, no token, nothing of a request.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import msgspec

RING_CAPACITY = 50_000
CHUNK_STAGES = 256  # encoded at a time: the GIL is held for no longer (about 0.1 ms), then the socket releases it
MAX_SECONDS = 3600.0


class Stage(msgspec.Struct, frozen=True, gc=False):
    """One stage of one micro-batch. Times in seconds of this process's `time.perf_counter()`.

    name, attention worker: "embed" or "combine" (add the partials), "attention", "dispatch" (rows into the transfer
    slots), "exchange" (rows are away; overlaps the others), "look_ahead" (inputs of the step after this one),
    "head_slice" and at last "head", "wait" (work in flight, nothing ready), and in topology mono "ffn".
    name, FFN worker: "gang_wait" (first arrival until computed), "ffn", "combine" (answer every member), "wait" (a step
    is under way somewhere, nothing is complete).
    num_tokens: rows computed or moved; of a head those that are sampled.
    layer, stream: -1 where a stage is not tied to one.
    gang_id, epoch: 0 where they are not known.
    gang_size: attention workers whose rows were computed together.

    An instance costs 0.15 us to make and is invisible to the garbage collector.
    """

    name: str
    start_s: float
    end_s: float
    stream: int = -1
    layer: int = -1
    num_tokens: int = 0
    step: int = 0
    gang_id: int = 0
    gang_size: int = 0
    epoch: int = 0


class TraceHeader(msgspec.Struct, frozen=True):
    """First line of a dump.

    now_s: the process's clock when the stages were taken.
    kept_since_s: stages that ended before it are gone (0 while the ring has room).
    machine: `machine_id`.
    """

    role: str
    rank: int
    pid: int
    machine: str
    now_s: float
    kept_since_s: float
    num_stages: int


class StageBlock(NamedTuple):
    """Many stages at once, made only if somebody looks. stages: in order of their ends, the last of which is end_s."""

    end_s: float
    num_stages: int
    stages: Callable[[], Iterable[Stage]]


class TraceRing:
    """The newest stages of this process. Appending is one deque operation, so any thread may take a snapshot."""

    def __init__(self, capacity: int = RING_CAPACITY):
        self._ring: deque[Stage | StageBlock] = deque()
        self._room = capacity
        self._is_full = False

    def add(self, stage: Stage) -> None:
        self._ring.append(stage)
        self._room -= 1
        if self._room < 0:
            self._make_room()

    def add_block(self, block: StageBlock) -> None:
        self._ring.append(block)
        self._room -= block.num_stages
        if self._room < 0:
            self._make_room()

    def snapshot(self, since_s: float = 0.0) -> list[Stage]:
        """Stages that ended after `since_s`, oldest first."""
        kept = self._copy()
        # Stages are added as they end, so their ends rise.
        newest = kept[bisect_left(kept, since_s, key=lambda item: item.end_s) :]
        stages = [stage for item in newest for stage in (item.stages() if isinstance(item, StageBlock) else (item,))]
        return stages[bisect_left(stages, since_s, key=lambda stage: stage.end_s) :]

    @property
    def kept_since_s(self) -> float:
        """Stages that ended before it have fallen out; 0 while the ring has room."""
        try:
            return self._ring[0].end_s if self._is_full else 0.0
        except IndexError:
            return 0.0

    def _make_room(self) -> None:
        """The oldest ones fall out, a block as a whole."""
        while self._room < 0 and self._ring:
            oldest = self._ring.popleft()
            self._room += oldest.num_stages if isinstance(oldest, StageBlock) else 1
            self._is_full = True

    def _copy(self) -> list[Stage | StageBlock]:
        for _ in range(8):  # the hot thread may append while we iterate
            try:
                return list(self._ring)
            except RuntimeError:
                continue
        return []


class TracePage:
    """What `GET /trace?seconds=S` of a worker answers: a header line, then one JSON line a stage. Metrics thread."""

    def __init__(self, role: str, pid: int, clock: Callable[[], float] = time.perf_counter):
        self._role = role
        self._pid = pid
        self._clock = clock
        self._rank = -1
        self._ring: TraceRing | None = None
        self._machine = machine_id()

    def attach(self, rank: int, ring: TraceRing) -> None:
        """The worker has its seat and its engine. Any thread."""
        self._rank = rank
        self._ring = ring

    def __call__(self, query: Mapping[str, str]) -> Iterator[bytes]:
        """Lines in chunks. ValueError when `seconds` is no number in 0..MAX_SECONDS."""
        seconds = float(query.get("seconds", "2"))
        if not 0.0 <= seconds <= MAX_SECONDS:
            raise ValueError(f"seconds={seconds:g} is not in 0..{MAX_SECONDS:g}")
        now_s = self._clock()
        ring = self._ring
        kept_since_s = 0.0 if ring is None else ring.kept_since_s
        stages = [] if ring is None else ring.snapshot(now_s - seconds)
        return _lines(
            TraceHeader(self._role, self._rank, self._pid, self._machine, now_s, kept_since_s, len(stages)), stages
        )


def _lines(header: TraceHeader, stages: Iterable[Stage]) -> Iterator[bytes]:
    encoder = msgspec.json.Encoder()
    yield encoder.encode_lines([header])
    rest = iter(stages)
    while chunk := list(islice(rest, CHUNK_STAGES)):
        yield encoder.encode_lines(chunk)


def machine_id() -> str:
    """Boot id and time namespace of this kernel: processes for which it is equal read the same clock. "" = unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/time').readlink()}"
    except OSError:
        return ""
