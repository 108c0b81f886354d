"""Asks every worker for its clock and its stages, through its metrics port. Blocking; every wait has a deadline."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from afd.messages.membership import MemberStatus
from afd.telemetry.ring import Stage, TraceHeader, machine_id
from afd.trace.clocks import Bounds, Offset, Ping, agree, bounds_of
from afd.trace.errors import TraceError
from afd.trace.timeline import ATTENTION, FFN, Dump, Timeline, build

NUM_PINGS = 16
TIMEOUT_S = 2.0  # of one answer
BODY_TIMEOUT_S = 10.0  # of a whole dump
MAX_BODY_BYTES = 64 << 20
READ_BYTES = 1 << 18
MARGIN_S = 1.0  # asked for beyond the window: the workers are asked one after another
NUM_THREADS = 8

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """A worker and its metrics port, "host:port"."""

    role: str
    rank: int
    address: str

    @property
    def name(self) -> str:
        return f"{self.role}/{self.rank}"


@dataclass(frozen=True, slots=True)
class Collected:
    """The trace, and each worker's clock offset (the dumps' shifts are made of `used`)."""

    timeline: Timeline
    offsets: dict[str, Offset]


def targets_of(members: Sequence[MemberStatus]) -> list[Target]:
    """The workers of a cluster that say where their metrics are, in rank order."""
    workers = [status.member for status in members if status.member.info.role in (ATTENTION, FFN)]
    workers.sort(key=lambda member: (member.info.role, member.rank))
    return [Target(m.info.role, m.rank, m.info.metrics) for m in workers if m.info.metrics]


def collect(
    targets: Sequence[Target],
    seconds: float,
    token: str,
    *,
    title: str = "",
    clock: Callable[[], float] = time.perf_counter,
) -> Collected:
    """The last `seconds` of all workers. One that does not answer is named in `missing`; TraceError if none does.

    token: `afd.messages.keys.trace_token` of the cluster.
    """
    if not targets:
        raise TraceError("the cluster has no worker yet: wait until `afd status` shows one")
    missing: list[str] = []
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="trace") as pool:
        measured: dict[str, Bounds] = {}
        for target, bounds in zip(
            targets, pool.map(lambda t: _attempt(lambda: measure_clock(t, clock)), targets), strict=True
        ):
            if isinstance(bounds, TraceError):
                missing.append(str(bounds))
            else:
                measured[target.name] = bounds
        alive = [target for target in targets if target.name in measured]
        answers = list(pool.map(lambda t: _attempt(lambda: fetch(t, seconds + MARGIN_S, token)), alive))
    dumps: dict[Target, tuple[TraceHeader, list[Stage]]] = {}
    for target, answer in zip(alive, answers, strict=True):
        if isinstance(answer, TraceError):
            missing.append(str(answer))
        else:
            dumps[target] = answer
    if not dumps:
        raise TraceError("no worker gave a trace: " + "; ".join(missing))
    machines = {target.name: header.machine for target, (header, _) in dumps.items()}
    offsets = agree({name: measured[name] for name in machines}, machines, machine_id())
    moved = [
        Dump(t.role, t.rank, header.pid, header.now_s, header.kept_since_s, stages, offsets[t.name])
        for t, (header, stages) in dumps.items()
    ]
    return Collected(build(moved, seconds, title=title, missing=missing), offsets)


def _attempt(visit: Callable[[], T]) -> T | TraceError:
    """The answer, or why there is none: one worker that is gone must not cost the others' trace."""
    try:
        return visit()
    except TraceError as error:
        return error


def measure_clock(target: Target, clock: Callable[[], float]) -> Bounds:
    """Pings over one connection. TraceError."""
    pings = []
    with _connected(target) as connection:
        for _ in range(NUM_PINGS):
            sent_s = clock()
            connection.request("GET", "/clock")
            with connection.getresponse() as response:
                received_s = clock()
                body = response.read()
            if response.status != 200:
                raise TraceError(f"{target.name} at {target.address} has no /clock (HTTP {response.status})")
            pings.append(Ping(sent_s, received_s, float(json.loads(body)["perf_counter_s"])))
    return bounds_of(pings)


def fetch(target: Target, seconds: float, token: str) -> tuple[TraceHeader, list[Stage]]:
    """One worker's dump of its last `seconds`. TraceError."""
    with _connected(target) as connection:
        connection.request("GET", f"/trace?seconds={seconds:.3f}", headers={"Authorization": f"Bearer {token}"})
        with connection.getresponse() as response:
            body = _read(target, response)
        line, _, lines = body.partition(b"\n")
        header = msgspec.json.decode(line, type=TraceHeader)
        stages = msgspec.json.Decoder(Stage).decode_lines(lines)
        if len(stages) != header.num_stages:
            raise TraceError(f"{target.name}: its trace ends after {len(stages)} of {header.num_stages} stages")
        return header, stages


def _read(target: Target, response: http.client.HTTPResponse) -> bytes:
    """The whole body, within its bounds."""
    if response.status == 401:
        raise TraceError(f"{target.name} at {target.address} belongs to a cluster with another secret")
    if response.status != 200:
        raise TraceError(f"{target.name} at {target.address} has no /trace (HTTP {response.status})")
    body = bytearray()
    until_s = time.monotonic() + BODY_TIMEOUT_S
    while chunk := response.read(READ_BYTES):
        body += chunk
        if len(body) > MAX_BODY_BYTES or time.monotonic() > until_s:
            raise TraceError(f"{target.name}: its trace is too long or too slow ({len(body) >> 20} MiB so far)")
    return bytes(body)


@contextmanager
def _connected(target: Target) -> Iterator[http.client.HTTPConnection]:
    """A connection, closed in the end; whatever goes wrong with it is a TraceError that names the worker."""
    host, _, port = target.address.rpartition(":")
    try:
        connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=TIMEOUT_S)
        try:
            yield connection
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, msgspec.MsgspecError, ValueError, KeyError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise TraceError(f"{target.name} at {target.address} does not answer: {reason}") from None
