"""Rows that lie in GPU memory: read by the network card itself where it can, through pinned host memory where not.

    driver = open_cuda()
    fabric = GpuFabric(config, driver)
    mesh = Mesh(config, fabric)
    fabric.register(tensor.data_ptr(), num_bytes)       # once per buffer that rows will be sent from
    ...
    view = mesh.dispatch_view(peer, stream, num_tokens, top_k)      # routing is written here, on the host
    with fabric.rows(DeviceRows(address, num_bytes), cuda_stream):
        mesh.dispatch(peers, meta, view)                # returns at once

What is posted inside the `with` waits for what is queued on the CUDA stream by its end (the kernel that makes the rows,
and the copy to the host if there has to be one); `progress` looks whether that is done, and never blocks on the GPU.
Rows must not change until the exchange is answered. Header, scales, routing and trailer always lie in host memory.

Received rows land in the host's slots, which are pinned, so that the engine's own asynchronous copies run at the bus's
speed. Verified against a twin only: no machine with a GPU and an RDMA port has run this (docs/rdma.md).
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from stepmesh.config import MeshConfig
from stepmesh.errors import ConfigError, TransportError
from stepmesh.gpu import DeviceRows, GpuDriver, GpuError, GpuPath
from stepmesh.layout import HEADER_BYTES, NUM_PARITIES
from stepmesh.transports.base import Channel, ChannelSpec, Fabric, Failure, Link, Offer, Posted, Wakeups
from stepmesh.transports.host import HostFabric
from stepmesh.transports.verbs.base import Adapter, Region, RowSource, Verbs
from stepmesh.transports.verbs.channel import VerbsChannel

log = logging.getLogger("stepmesh")

_LOOK_EVERY_S = 20e-6  # while something waits for the GPU, which rings no descriptor
_LAST_WAIT_S = 1.0  # for copies that still run when everything is closed


class _Event:
    """An event of the driver, shared by the posts that wait for it; released with the last one."""

    def __init__(self, driver: GpuDriver, stream: int, num_holders: int) -> None:
        self._driver = driver
        self._handle = driver.record(stream)
        self._num_holders = num_holders
        self._is_done = False

    def done(self) -> bool:
        """Raises GpuError."""
        if not self._is_done:
            self._is_done = self._driver.done(self._handle)
        return self._is_done

    def drop(self) -> None:
        self._num_holders -= 1
        if self._num_holders == 0:
            self._driver.release(self._handle)


class _Deferred(NamedTuple):
    """A post that waits. `source` is None when rows come through the host slot; `event` when only order matters."""

    posted: Posted
    frame_bytes: int
    source: RowSource | None
    event: _Event | None


class _Buffer(NamedTuple):
    """A registered buffer. `region` is None when its rows have to be staged."""

    address: int
    num_bytes: int
    path: GpuPath
    region: Region | None
    base: int  # what its first byte is called in work requests

    def holds(self, rows: DeviceRows) -> bool:
        return self.address <= rows.address and rows.address + rows.num_bytes <= self.address + self.num_bytes


@dataclass(slots=True)
class _Sending:
    """A `with rows(...)` and what was posted inside."""

    rows: DeviceRows
    source: RowSource | None  # of channels that can send from there
    posts: list[tuple[GpuChannel, Posted, int]] = field(default_factory=list)


class _Grave(NamedTuple):
    """Slots of a closed channel that the GPU may still be writing: they stay until it is done."""

    events: list[_Event]
    pinned: list[int]
    slots: list[memoryview]


class GpuFabric(Fabric):
    """A HostFabric whose channels take rows from device memory. Main thread, as the mesh that owns it.

    Raises ConfigError for a mesh with checksums: they would need the rows in host memory.
    """

    waits = True

    def __init__(self, config: MeshConfig, driver: GpuDriver, verbs: Verbs | None = None) -> None:
        if config.checksum:
            raise ConfigError("checksum needs rows in host memory: switch it off, or send without a GPU fabric")
        self._inner = HostFabric(config, verbs)
        self.address = self._inner.address
        self.driver = driver  # the caller's: closed by it, behind the mesh
        self.num_deferred = 0
        self.sending: _Sending | None = None
        self._buffers: list[_Buffer] = []
        self._graves: list[_Grave] = []

    @property
    def paths(self) -> tuple[GpuPath, ...]:
        """How the rows of each registered buffer are sent."""
        return tuple(buffer.path for buffer in self._buffers)

    def register(self, address: int, num_bytes: int) -> GpuPath:
        """Rows will be sent from this device memory, which must outlive the mesh. Tries the best way first."""
        failed = []
        region, base = None, 0
        path = GpuPath("staged", "")
        for kind, attempt in (("peermem", self._register_by_address), ("dmabuf", self._register_by_dmabuf)):
            try:
                region, base = attempt(address, num_bytes)
            except TransportError as error:
                failed.append(f"{kind}: {error}")
            else:
                path = GpuPath(kind, "")
                break
        reason = "; ".join(failed) or "the first way that was tried"
        path = GpuPath(path.kind, reason)
        self._buffers.append(_Buffer(address, num_bytes, path, region, base))
        log.info("rows of %d bytes of device memory go by %s (%s)", num_bytes, path.kind, path.reason)
        return path

    @contextlib.contextmanager
    def rows(self, rows: DeviceRows, stream: int) -> Iterator[None]:
        """What is dispatched inside has its rows at `rows`, made by what is queued on `stream`.

        Rows outside of every registered buffer are staged.
        """
        buffer = next((buffer for buffer in self._buffers if buffer.holds(rows)), None)
        source = None
        if buffer is not None and buffer.region is not None:
            source = RowSource(buffer.base + rows.address - buffer.address, rows.num_bytes, buffer.region.lkey)
        self.sending = sending = _Sending(rows, source)
        try:
            yield
        finally:
            self.sending = None
            self._defer(sending, stream)

    def now(self) -> float:
        return self._inner.now()

    def nonce(self, num_bytes: int) -> bytes:
        return self._inner.nonce(num_bytes)

    @property
    def transports(self) -> tuple[str, ...]:
        return self._inner.transports

    def connect(self, address: Any) -> Link | None:
        return self._inner.connect(address)

    def open_channel(self, transport: str, spec: ChannelSpec, link: Link) -> Channel:
        return GpuChannel(self, self._inner.open_channel(transport, spec, link), spec.num_streams)

    def collect(self) -> None:
        self._inner.collect()

    def leave(self) -> None:
        self._inner.leave()

    def wait(self, timeout_s: float) -> Wakeups:
        self._visit_graves()
        if self.num_deferred and timeout_s > 0.0:
            time.sleep(_LOOK_EVERY_S)
            timeout_s = 0.0
        return self._inner.wait(timeout_s)

    def every(self, interval_s: float, call: Callable[[], None]) -> None:
        self._inner.every(interval_s, call)

    def watch(self, fd: int) -> None:
        self._inner.watch(fd)

    def unwatch(self, fd: int) -> None:
        self._inner.unwatch(fd)

    def wake(self) -> None:
        self._inner.wake()

    def bury(self, grave: _Grave) -> None:
        """A channel was closed: unpin its slots once no copy into them runs."""
        self._graves.append(grave)
        self._visit_graves()

    def close(self) -> None:
        deadline = time.monotonic() + _LAST_WAIT_S
        while self._graves and time.monotonic() < deadline:
            self._visit_graves()
        if self._graves:
            log.error("copies from the GPU do not end: slots of %d channels stay pinned", len(self._graves))
        for buffer in self._buffers:
            if buffer.region is not None:
                buffer.region.close()
        self._buffers.clear()
        self._inner.close()

    def _register_by_address(self, address: int, num_bytes: int) -> tuple[Region, int]:
        adapter = self._adapter()
        if not self.driver.has_peer_memory():
            raise TransportError("no peer-memory module (nvidia-peermem) is loaded")
        return adapter.register(address, num_bytes, remote=False), address

    def _register_by_dmabuf(self, address: int, num_bytes: int) -> tuple[Region, int]:
        adapter = self._adapter()
        exported = self.driver.export_dmabuf(address, num_bytes)
        try:
            region = adapter.register_dmabuf(exported.fd, exported.offset, num_bytes, remote=False)
        finally:
            os.close(exported.fd)
        return region, region.base

    def _adapter(self) -> Adapter:
        if self._inner.rdma is None:
            raise TransportError("this rank offers no RDMA port")
        return self._inner.rdma.adapter

    def _defer(self, sending: _Sending, stream: int) -> None:
        """Queue the copies that are needed, then one event behind them all."""
        if not sending.posts:
            return
        rows = sending.rows
        try:
            for channel, posted, _ in sending.posts:
                if not (sending.source and channel.sends_from_device):
                    self.driver.copy_to_host(channel.rows_address(posted), rows.address, rows.num_bytes, stream)
            event = _Event(self.driver, stream, len(sending.posts))
        except GpuError as error:
            for channel, _, _ in sending.posts:
                channel.fail(error)
            return
        for channel, posted, frame_bytes in sending.posts:
            source = sending.source if channel.sends_from_device else None
            channel.defer(_Deferred(posted, frame_bytes, source, event))

    def _visit_graves(self) -> None:
        for grave in list(self._graves):
            if all(_over(event) for event in grave.events):
                self._graves.remove(grave)
                for event in grave.events:
                    event.drop()
                for address in grave.pinned:
                    with contextlib.suppress(GpuError):
                        self.driver.unpin(address)


class GpuChannel(Channel):
    """A channel whose posts may wait for the GPU. Its slots are pinned while it is open."""

    def __init__(self, fabric: GpuFabric, inner: Channel, num_streams: int) -> None:
        self.kind = inner.kind
        self.sends_from_device = isinstance(inner, VerbsChannel)
        self._fabric = fabric
        self._inner = inner
        self._places = [(stream, parity) for stream in range(num_streams) for parity in range(NUM_PARITIES)]
        self._slots: list[memoryview] = []
        self._pinned: list[int] = []
        self._deferred: list[_Deferred] = []
        self._gpu_failure: Failure | None = None
        self._open = True

    def offer(self) -> Offer:
        return self._inner.offer()

    def attach(self, descriptor: dict[str, Any], fds: Sequence[int]) -> None:
        self._inner.attach(descriptor, fds)
        for place in self._places:
            self._pin(self._inner.outgoing(*place))
            self._pin(self._inner.incoming(*place))

    @property
    def ready(self) -> bool:
        return self._inner.ready

    def outgoing(self, stream: int, parity: int) -> memoryview:
        return self._inner.outgoing(stream, parity)

    def incoming(self, stream: int, parity: int) -> memoryview:
        return self._inner.incoming(stream, parity)

    def rows_address(self, posted: Posted) -> int:
        """Address of the rows in the host slot of a post."""
        return _address(self._inner.outgoing(posted.stream, posted.parity)) + HEADER_BYTES

    def post(self, stream: int, parity: int, seq: int, frame_bytes: int) -> None:
        sending, posted = self._fabric.sending, Posted(stream, parity, seq)
        if sending is not None and sending.rows.num_bytes:
            sending.posts.append((self, posted, frame_bytes))
        elif any(other.posted.stream == stream for other in self._deferred):
            self.defer(_Deferred(posted, frame_bytes, None, None))
        else:
            self._inner.post(stream, parity, seq, frame_bytes)

    def defer(self, deferred: _Deferred) -> None:
        """Post it later: `poll` looks."""
        self._deferred.append(deferred)
        self._fabric.num_deferred += 1

    def fail(self, error: GpuError) -> None:
        """The rows of a post will never come."""
        self._gpu_failure = Failure(f"GPU: {error}", False)

    def poll(self) -> Sequence[Posted]:
        if self._deferred:
            self._post_ready()
        return self._inner.poll()

    @property
    def failure(self) -> Failure | None:
        return self._gpu_failure or self._inner.failure

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._inner.close()
        self._fabric.num_deferred -= len(self._deferred)
        events = [deferred.event for deferred in self._deferred if deferred.event is not None]
        self._deferred.clear()
        self._fabric.bury(_Grave(events, self._pinned, self._slots))

    def _post_ready(self) -> None:
        """Post what is ready, in the order of each stream."""
        held: set[int] = set()
        waiting = []
        for deferred in self._deferred:
            stream = deferred.posted.stream
            if stream in held or not self._is_ready(deferred):
                held.add(stream)
                waiting.append(deferred)
                continue
            self._fabric.num_deferred -= 1
            if deferred.source is not None and isinstance(self._inner, VerbsChannel):
                self._inner.post(*deferred.posted, deferred.frame_bytes, deferred.source)
            else:
                self._inner.post(*deferred.posted, deferred.frame_bytes)
            if deferred.event is not None:
                deferred.event.drop()
        self._deferred = waiting

    def _is_ready(self, deferred: _Deferred) -> bool:
        try:
            return deferred.event is None or deferred.event.done()
        except GpuError as error:
            self.fail(error)
            return False

    def _pin(self, slot: memoryview) -> None:
        self._slots.append(slot)
        try:
            self._fabric.driver.pin(_address(slot), len(slot))
        except GpuError as error:
            log.warning("a slot is not pinned, copies between it and the GPU will be slow: %s", error)
        else:
            self._pinned.append(_address(slot))


def _over(event: _Event) -> bool:
    """Done, or failed for good: either way nothing is written any more."""
    try:
        return event.done()
    except GpuError:
        return True


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)
