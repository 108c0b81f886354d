"""What does the verbs transport add to bare verbs? Ratios, which an emulated guest can show as well as a cluster.

    python bench/verbs.py --devices rxe0,rxe1 [--seconds 3]         # `make bench-rdma` runs it in the guest

Both ends live in this process, one on each device. Round trips, in turn with each other:
  bare      a WRITE by pyverbs out of a reused work request, the other side spins on its last byte
  channel   a frame posted and polled: WRITE and WRITE_WITH_IMM, completions, receives given back
  mesh      a whole dispatch and combine, with header checks, windows and arrays
and the bandwidth of frames in flight against `ib_write_bw` of perftest. Correctness gate first (the content of every
frame size), warm-up dropped, medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from stepmesh import (
    CombineArrived,
    CombineMeta,
    DispatchArrived,
    DispatchMeta,
    DispatchParts,
    Member,
    Mesh,
    MeshConfig,
    PayloadLayout,
    RankId,
    Role,
    WireDtype,
)
from stepmesh.config import VerbsOptions
from stepmesh.transports.base import ChannelSpec
from stepmesh.transports.verbs.channel import VerbsChannel
from stepmesh.transports.verbs.endpoint import VerbsEndpoint, open_endpoint

SIZES = (64, 8192, 65536)
LARGEST = max(SIZES)
LIMIT_S = 30.0
NUM_STREAMS = 16  # of the frames in flight, two each
WARM_UP = 20
IBV_WR_RDMA_WRITE, IBV_SEND_SIGNALED = 0, 2  # pyverbs keeps its enums in another module from release to release
LAYOUT = PayloadLayout(
    hidden=64, max_tokens=1024, max_top_k=0, dispatch_dtype=WireDtype.FP8_E4M3, combine_dtype=WireDtype.FP32
)
A0, F0 = RankId(Role.ATTENTION, 0), RankId(Role.FFN, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", required=True, help="two RDMA devices, or one twice")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    arguments = parser.parse_args()
    devices = arguments.devices.split(",")
    configs = [config(rank_id, device) for rank_id, device in zip((A0, F0), devices, strict=True)]
    endpoints = [open_endpoint(one) for one in configs]
    channels = connect(endpoints)
    results: dict[str, Any] = {"devices": devices, "kernel": platform.release(), "us": {}, "ratio": {}}
    for size in SIZES:
        gate(channels, size)
        bare = Bare(endpoints, size)
        frame = Frames(channels, size)
        subjects: dict[str, Callable[[], None]] = {"bare": bare.round_trip, "channel": frame.round_trip}
        if size == min(SIZES):
            meshes = Meshes(configs)
            subjects["mesh"] = meshes.round_trip
        times = interleaved(subjects, arguments.seconds)
        results["us"][size] = {name: round(value * 1e6, 1) for name, value in times.items()}
        results["ratio"][size] = {name: round(value / times["bare"], 2) for name, value in times.items()}
        bare.close()
        if size == min(SIZES):
            meshes.close()
        print(f"{size:6d} B round trip: " + ", ".join(f"{name} {value * 1e6:.0f} us" for name, value in times.items()))
    ours = bandwidth(channels, arguments.seconds)
    for one in (*channels, *endpoints):
        one.close()
    theirs = ib_write_bw(devices)
    results["MB/s"] = {"channel": round(ours), "ib_write_bw": theirs}
    print(f"{LARGEST} B frames in flight: {ours:.0f} MB/s, ib_write_bw {theirs} MB/s")
    print(json.dumps(results))
    return 0


def config(rank_id: RankId, device: str) -> MeshConfig:
    return MeshConfig(
        id=rank_id,
        incarnation="bench",
        secret=bytes(16),
        config_hash=b"bench",
        layout=LAYOUT,
        transport="verbs",
        verbs=VerbsOptions(device=device),
    )


def connect(endpoints: list[VerbsEndpoint]) -> list[VerbsChannel]:
    spec = ChannelSpec("bench", NUM_STREAMS, LARGEST, LARGEST, b"s")
    near, far = (endpoint.open_channel(spec) for endpoint in endpoints)
    near.attach(far.offer().descriptor, ())
    far.attach(near.offer().descriptor, ())
    spin(lambda: far.poll() or far.ready)
    return [near, far]


def spin(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the other side does not answer")


def gate(channels: list[VerbsChannel], size: int) -> None:
    """What is posted arrives, byte for byte."""
    near, far = channels
    frame = bytes((size + index) % 251 for index in range(size))
    near.outgoing(3, 1)[:size] = frame
    near.post(3, 1, near_seq(far, 3), size)
    spin(far.poll)
    if far.incoming(3, 1)[:size] != frame:
        sys.exit(f"{size} bytes arrived changed")


def near_seq(channel: VerbsChannel, stream: int) -> int:
    """The next odd seq that the receiver has not seen."""
    last = channel._last_seq[stream]
    return last + 1 + last % 2


class Bare:
    """Two queue pairs and one reused work request an end, without any of our logic."""

    def __init__(self, endpoints: list[VerbsEndpoint], size: int) -> None:
        self._channels = connect(endpoints)  # queue pairs and memory only
        self._size = size
        self._mark = 0
        self._posts = 0
        self._requests = [self._request(channel) for channel in self._channels]
        self._endpoints = endpoints
        self._views = [(channel.outgoing(0, 0), channel.incoming(0, 0)) for channel in self._channels]

    def round_trip(self) -> None:
        self._mark = self._mark % 127 + 1
        last = self._size - 1
        for end in (0, 1):
            self._views[end][0][last] = self._mark
            self._write(end)
            arrived = self._views[1 - end][1]
            spin(lambda arrived=arrived: arrived[last] == self._mark)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def _write(self, end: int) -> None:
        self._posts += 1
        request = self._requests[end]
        signalled = self._posts % 16 < 2  # both ends in turn
        request.send_flags = IBV_SEND_SIGNALED if signalled else 0
        self._channels[end]._qp._qp.post_send(request)  # type: ignore[union-attr, attr-defined]
        if signalled:
            self._endpoints[end].drain()

    def _request(self, channel: Any) -> Any:
        from pyverbs.wr import SGE, SendWR  # not sooner: `binding.load` keeps its hands off the root logger

        entry = SGE(channel._tx.region.base, self._size, channel._tx.region.lkey)
        request = SendWR(num_sge=1, sg=[entry], opcode=IBV_WR_RDMA_WRITE)
        request.set_wr_rdma(channel._qp._rkey, channel._addresses[0][1])
        return request


class Frames:
    """Frames through two channels."""

    def __init__(self, channels: list[VerbsChannel], size: int) -> None:
        self._channels = channels
        self._size = max(size, 136)
        self._seq = max(channel._last_seq[0] for channel in channels)

    def round_trip(self) -> None:
        self._seq += 1
        near, far = self._channels
        for sender, receiver in ((near, far), (far, near)):
            sender.post(0, self._seq & 1, self._seq, self._size)
            spin(receiver.poll)


class Meshes:
    """One attention and one FFN rank, a token of 64 bytes."""

    def __init__(self, configs: list[MeshConfig]) -> None:
        self._attention, self._ffn = (Mesh(one) for one in configs)
        members = [Member(one.config.id, one.config.incarnation, one.address) for one in (self._attention, self._ffn)]
        self._attention.set_members(1, members[1:])
        self._ffn.set_members(1, members[:1])
        spin(self._connected)

    def round_trip(self) -> None:
        view: DispatchParts = self._attention.dispatch_view(F0, 0, 1, 0)
        self._attention.dispatch([F0], DispatchMeta(0, 1, 1, 0), view)
        arrival = self._next(self._ffn, DispatchArrived)
        self._ffn.combine(arrival, CombineMeta(), self._ffn.combine_view(arrival))
        self._next(self._attention, CombineArrived)

    def _connected(self) -> bool:
        self._ffn.progress(0.0)
        self._attention.progress(0.0)
        return bool(self._ffn.peers and self._attention.peers)

    def close(self) -> None:
        self._attention.close()
        self._ffn.close()

    @staticmethod
    def _next(mesh: Mesh, kind: type) -> Any:
        found: list[Any] = []
        spin(lambda: found.extend(event for event in mesh.progress(0.0) if isinstance(event, kind)) or found)
        return found[0]


def interleaved(subjects: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Median seconds of a round trip, each subject in turn."""
    for call in subjects.values():
        for _ in range(WARM_UP):
            call()
    times: dict[str, list[float]] = {name: [] for name in subjects}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, call in subjects.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def bandwidth(channels: list[VerbsChannel], seconds: float) -> float:
    """MB/s of the largest frames, with every slot in flight."""
    near, far = channels
    seqs = [far._last_seq[stream] for stream in range(NUM_STREAMS)]
    in_flight = arrived = 0
    began = time.perf_counter()
    while (now := time.perf_counter()) < began + seconds or in_flight:
        while in_flight < 2 * NUM_STREAMS and now < began + seconds:
            stream = min(range(NUM_STREAMS), key=lambda stream: seqs[stream])
            seqs[stream] += 1
            near.post(stream, seqs[stream] & 1, seqs[stream], LARGEST)
            in_flight += 1
        found = len(far.poll())
        in_flight -= found
        arrived += found
        if near.failure is not None:
            sys.exit(near.failure.reason)
    return arrived * LARGEST / (time.perf_counter() - began) / 1e6


def ib_write_bw(devices: list[str]) -> float | None:
    """perftest's MB/s between the same devices; None where it is not installed."""
    command = ["ib_write_bw", "-s", str(LARGEST), "-n", "2000", "-F", "-x", "1", "--report_gbits"]
    try:
        with subprocess.Popen(
            [*command, "-d", devices[0]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as server:
            time.sleep(2.0)  # it tells nobody when it listens
            client = subprocess.run(
                [*command, "-d", devices[1], "127.0.0.1"], capture_output=True, text=True, timeout=60
            )
            server.terminate()
    except FileNotFoundError:
        return None
    found = re.search(rf"^\s*{LARGEST}\s+\d+\s+[\d.]+\s+([\d.]+)", client.stdout, re.MULTILINE)
    return round(float(found.group(1)) * 1000 / 8) if found else None


if __name__ == "__main__":
    sys.exit(main())
