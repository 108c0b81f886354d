"""How long does one exchange take, and how far is that from what the host can do at all?

    python bench/transport.py [--quick] [--parts trips,cpu,idle,loaded] [--shapes 64B,8KiB,128x7168]
                              [--topologies 1x1,2x2,4x2] [--transports shm,tcp] [--libraries zeromq,gloo,nixl]

trips   An exchange is a dispatch from one attention rank to all N FFN ranks and all N combines back, every rank in a
        process of its own; both sides write their rows into the slot. Beside it at 1x1, in the same run and in turn
        with it: memcpy through shared memory (floor of shm), a bare TCP socket pair (floor of tcp), and other
        libraries, with the same bytes.
cpu     Interpreter time of dispatch, gather, receive, combine against the number of peers (transport_cpu.py).
idle    64 B after a pause of 1 ms, 10 ms, 1 s: the price of waking up.
loaded  64 B and 128x7168 while every core runs something else.

Every subject passes a correctness gate first; warm-up is dropped; the last line is JSON. Not included: anything a model
does.

Expect on two idle cores: shm below 15 us at 64 B, tcp near a bare socket pair; at 128x7168 both near their floors.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import transport_libraries as libraries
import transport_subjects as subjects
from transport_cpu import cpu_table
from transport_latency import GOAL_LOADED_P99_US, PAUSES_S, busy_cores, percentiles
from transport_subjects import LIMIT_S, SHAPES, Shape

spawn = multiprocessing.get_context("spawn")


class Subject:
    """Processes that can be told to run a number of round trips. `pin`: each on the next core, for the whole run."""

    pin = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.times_ns: list[int] = []
        self._drivers: list[Connection] = []
        self._servers: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        self._folder = ""

    def meet_in(self, folder: str) -> str:
        """A folder that goes with this subject."""
        self._folder = folder
        return folder

    def start(self, target: Callable[..., None], *args: Any, server: bool = False) -> Connection:
        here, there = spawn.Pipe()
        process = spawn.Process(target=target, args=(there, *args), daemon=True)
        process.start()
        if self.pin and process.pid is not None:
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(process.pid, {cores[len(self._processes) % len(cores)]})
        there.close()
        self._processes.append(process)
        (self._servers if server else self._drivers).append(here)
        return here

    @property
    def last_pid(self) -> int:
        pid = self._processes[-1].pid
        assert pid is not None
        return pid

    def await_ready(self) -> None:
        for driver in self._drivers:
            receive(driver)

    def run(self, count: int, *, record: bool = True, pause_s: float = 0.0) -> None:
        """All drivers at once, each trip after a pause; the first one's times are kept."""
        for driver in self._drivers:
            driver.send((count, pause_s) if pause_s else count)
        times = [receive(driver) for driver in self._drivers]
        if record:
            self.times_ns += times[0]

    def close(self) -> None:
        for pipe in (*self._drivers, *self._servers):
            try:
                pipe.send(0)
            except OSError:
                continue  # it has ended already
        for process in self._processes:
            process.join(10.0)
            if process.is_alive():
                process.terminate()
                process.join()
        for pipe in (*self._drivers, *self._servers):
            pipe.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def receive(pipe: Connection) -> Any:
    if not pipe.poll(LIMIT_S):
        raise TimeoutError("a benchmark process does not answer")
    return pipe.recv()


def mesh_subject(shape: Shape, transport: str, num_attention: int, num_ffn: int) -> Subject:
    subject = Subject(transport)
    servers = [
        subject.start(subjects.mesh_server, shape, transport, rank, num_attention, server=True)
        for rank in range(num_ffn)
    ]
    addresses = [receive(server) for server in servers]
    for rank in range(num_attention):
        subject.start(subjects.mesh_driver, shape, transport, rank, addresses)
    return subject


def memcpy_subject(shape: Shape) -> Subject:
    subject = Subject("memcpy")
    server = subject.start(subjects.memcpy_server, shape, server=True)
    subject.start(subjects.memcpy_driver, shape, server, subject.last_pid)
    return subject


def socket_subject(shape: Shape) -> Subject:
    subject = Subject("socket")
    port = receive(subject.start(subjects.socket_server, shape, server=True))
    subject.start(subjects.socket_driver, shape, port)
    return subject


def library_subject(shape: Shape, name: str) -> Subject:
    subject = Subject(name)
    place = subject.meet_in(libraries.meeting_place())
    serve, drive = libraries.LIBRARIES[name]
    server = subject.start(serve, shape, place, server=True)
    subject.start(drive, shape, place, server)
    return subject


def measure(
    shape: Shape, topology: str, transports: list[str], others: list[str], rounds: int, count: int
) -> list[dict[str, Any]]:
    """Interleaved rounds of all subjects of one shape and topology."""
    num_attention, num_ffn = (int(number) for number in topology.split("x"))
    running: list[Subject] = []
    try:
        running += [mesh_subject(shape, transport, num_attention, num_ffn) for transport in transports]
        if topology == "1x1":
            running += [memcpy_subject(shape), socket_subject(shape)]
            running += [library_subject(shape, name) for name in others]
        for subject in running:
            subject.await_ready()
        for subject in running:
            subject.run(count, record=False)
        for _ in range(rounds):
            for subject in running:
                subject.run(count)
        return [summarise(subject, shape, topology) for subject in running]
    finally:
        for subject in running:
            subject.close()


def summarise(subject: Subject, shape: Shape, topology: str) -> dict[str, Any]:
    micros = sorted(time_ns / 1e3 for time_ns in subject.times_ns)
    return {
        "subject": subject.name,
        "shape": shape.label,
        "topology": topology,
        "out_bytes": shape.out_bytes,
        "back_bytes": shape.back_bytes,
        "p50_us": round(statistics.median(micros), 1),
        "p99_us": round(micros[len(micros) * 99 // 100], 1),
        "samples": len(micros),
    }


FLOOR_OF = {"shm": "memcpy", "tcp": "socket"}


def show(results: list[dict[str, Any]]) -> None:
    by_name = {result["subject"]: result for result in results}
    for result in results:
        floor = by_name.get(FLOOR_OF.get(result["subject"], ""))
        ratio = f"{result['p50_us'] / floor['p50_us']:5.2f} x {floor['subject']}" if floor else ""
        print(
            f"{result['shape']:>9} {result['topology']:>4} {result['subject']:>7}"
            f"  p50 {result['p50_us']:9.1f} us  p99 {result['p99_us']:9.1f} us  {ratio}",
            flush=True,
        )


def idle_table(transports: list[str], count: int) -> list[dict[str, Any]]:
    """64 B after a pause."""
    results = []
    for transport in transports:
        subject = mesh_subject(SHAPES["64B"], transport, 1, 1)
        try:
            subject.await_ready()
            subject.run(20, record=False)
            for name, pause_s in PAUSES_S.items():
                subject.times_ns.clear()
                subject.run(max(3, min(count, int(5.0 / pause_s))), pause_s=pause_s)
                result = {"transport": transport, "pause": name, **percentiles(subject.times_ns)}
                print(f"after {name:>5} idle {transport:>7}  p50 {result['p50_us']:9.1f} us", flush=True)
                results.append(result)
        finally:
            subject.close()
    return results


def loaded_table(transports: list[str], rounds: int, count: int) -> list[dict[str, Any]]:
    """Back to back, with every core busy."""
    results = []
    for label in ("64B", "128x7168"):
        for transport in transports:
            subject = mesh_subject(SHAPES[label], transport, 1, 1)
            try:
                subject.await_ready()
                subject.run(20, record=False)
                with busy_cores():
                    for _ in range(rounds):
                        subject.run(count)
            finally:
                subject.close()
            result = {"transport": transport, "shape": label, **percentiles(subject.times_ns)}
            kept = "kept" if result["p99_us"] <= GOAL_LOADED_P99_US else "MISSED"
            print(
                f"all cores busy {label:>9} {transport:>7}  p50 {result['p50_us']:9.1f} us"
                f"  p99 {result['p99_us']:9.1f} us  (limit {GOAL_LOADED_P99_US:g}: {kept})",
                flush=True,
            )
            results.append(result)
    return results


def present(names: list[str]) -> list[str]:
    """The libraries that are installed; says why the others are left out."""
    for name in names:
        if (reason := libraries.missing(name)) is not None:
            print(f"{name} is left out: {reason}", flush=True)
    return [name for name in names if libraries.missing(name) is None]


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--topologies", default="1x1,2x2,4x2")
    parser.add_argument("--transports", default="shm,tcp")
    parser.add_argument("--libraries", default="zeromq,gloo,nixl", help='"": none')
    parser.add_argument("--parts", default="trips,cpu,idle,loaded")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--count", type=int, default=200, help="round trips of one subject in one round")
    parser.add_argument("--pin", action="store_true", help="every process on a core of its own, as a deployment has it")
    parser.add_argument("--quick", action="store_true", help="only show that it runs")
    args = parser.parse_args()
    Subject.pin = args.pin
    if args.quick:
        args.rounds, args.count = 2, 20
    parts, transports = args.parts.split(","), args.transports.split(",")
    results: dict[str, list[dict[str, Any]]] = {"trips": []}
    if "trips" in parts:
        others = present([name for name in args.libraries.split(",") if name])
        for label in args.shapes.split(","):
            for topology in args.topologies.split(","):
                part = measure(SHAPES[label], topology, transports, others, args.rounds, args.count)
                show(part)
                results["trips"] += part
    if "cpu" in parts:
        results["cpu"] = cpu_table(transports)
    if "idle" in parts:
        results["idle"] = idle_table(transports, args.count)
    if "loaded" in parts:
        results["loaded"] = loaded_table(transports, args.rounds, args.count)
    host = {"machine": platform.machine(), "cores": os.cpu_count(), "kernel": platform.release()}
    print(json.dumps({"bench": "transport", "commit": commit(), "host": host, **results}))


if __name__ == "__main__":
    main()
