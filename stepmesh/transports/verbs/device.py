"""The real `Verbs`: pyverbs. Imported by `binding.load` only, once it knows that pyverbs is there.

What pyverbs asks of its user, and this file keeps to itself:
- Work requests and scatter entries leak when dropped (their finaliser has the wrong name) and are freed twice when
  closed twice: each adapter has a few, made once, changed in place for every post, never closed. Posting copies them.
- A closed object holds NULL and kills the process when asked for a key: keys are read once.
- Nothing keeps memory, or the second request of a chain, alive: holders do.
- Immediates travel in network order, converted by the user.
- From release 59 on, enums live elsewhere, and a completion channel has an `fd`.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import ipaddress
import os
from collections.abc import Callable, Iterator, Sequence
from socket import htonl, ntohl
from typing import Any

from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ, CompChannel
from pyverbs.device import Context, get_device_list
from pyverbs.mr import MR, DmaBufMR
from pyverbs.pd import PD
from pyverbs.pyverbs_error import PyverbsError
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, RecvWR, SendWR

from stepmesh.errors import TransportError
from stepmesh.transports.verbs.base import (
    POLL_BATCH,
    Adapter,
    Gid,
    GidKind,
    Port,
    QueueLimits,
    QueuePair,
    Region,
    Remote,
    RowSource,
    Verbs,
    Wire,
)

try:
    e: Any = importlib.import_module("pyverbs.enums")
except ImportError:
    e = importlib.import_module("pyverbs.libibverbs_enums")

# Plain numbers: pyverbs's are enum members, whose operators cost more than a post.
_SIGNALLED, _INLINE = int(e.IBV_SEND_SIGNALED), int(e.IBV_SEND_INLINE)
_ETHERNET = 2  # IBV_LINK_LAYER_ETHERNET: an enum that older releases do not export
_MAX_GIDS = 256
_INLINE_TRIES = (192, 128, 0)  # a header and a little more, a header alone, nothing
_NOTHING: tuple[tuple[int, int, int], ...] = ()


class PyVerbs(Verbs):
    """The devices of this machine."""

    def __init__(self, version: str) -> None:
        self.version = version

    def ports(self) -> list[Port]:
        with _explained("cannot list the RDMA devices"):
            names = sorted(device.name.decode() for device in get_device_list())
        found = []
        for name in names:
            with _explained(f"cannot query {name}"):
                context = Context(name=name)
                try:
                    found += _ports_of(name, context)
                finally:
                    context.close()
        return found

    def open(self, port: Port, num_completions: int) -> PyAdapter:
        return PyAdapter(port, num_completions)


class PyAdapter(Adapter):
    """One opened port."""

    def __init__(self, port: Port, num_completions: int) -> None:
        self.port = port
        self._closers: list[Callable[[], None]] = []
        try:
            with _explained(f"cannot open {port.device}"):
                self._open(num_completions)
        except TransportError:
            self.close()
            raise
        self.body, self.head = _send_request(e.IBV_WR_RDMA_WRITE), _send_request(e.IBV_WR_RDMA_WRITE_WITH_IMM)
        self.rows = _send_request(e.IBV_WR_RDMA_WRITE)
        self.rows.request.next_wr = self.body.request
        self.body.request.next_wr = self.head.request
        self.probe = _send_request(e.IBV_WR_RDMA_WRITE)
        self.receive = RecvWR(num_sge=1, sg=[SGE(0, 0, 0)])
        self.receive.num_sge = 0  # an immediate brings no data of its own

    def register(self, address: int, num_bytes: int, *, remote: bool) -> PyRegion:
        with _explained(f"cannot register {num_bytes} bytes"):
            return PyRegion(MR(self.pd, num_bytes, _access(remote), address=address), address)

    def register_dmabuf(self, fd: int, offset: int, num_bytes: int, *, remote: bool) -> PyRegion:
        # pyverbs makes the offset the region's address: work requests count from it, not from the device pointer.
        with _explained(f"cannot register {num_bytes} bytes of device memory"):
            return PyRegion(DmaBufMR(self.pd, num_bytes, _access(remote), dmabuf=fd, offset=offset), offset)

    def create_queue_pair(self, gid_index: int, limits: QueueLimits) -> PyQueuePair:
        for inline_bytes in _INLINE_TRIES:
            cap = QPCap(
                max_send_wr=limits.num_writes,
                max_recv_wr=limits.num_receives,
                max_send_sge=1,
                max_recv_sge=1,
                max_inline_data=inline_bytes,
            )
            attributes = QPInitAttr(qp_type=e.IBV_QPT_RC, scq=self._cq, rcq=self._cq, cap=cap, sq_sig_all=0)
            try:
                with _explained("cannot create a queue pair"):
                    return PyQueuePair(self, QP(self.pd, attributes), gid_index, inline_bytes)
            except TransportError:
                if inline_bytes == _INLINE_TRIES[-1]:
                    raise
        raise AssertionError("the last try returns or raises")

    def poll(self) -> Sequence[tuple[int, int, int]]:
        number, found = self._cq.poll(POLL_BATCH)
        if not number:
            return _NOTHING
        return [(wc.wr_id, wc.status, ntohl(wc.imm_data)) for wc in found]

    def arm(self) -> None:
        self._cq.req_notify()

    def take_event(self) -> None:
        # Would block, and hold the interpreter: only called behind a poll of event_fd.
        with _explained("completion channel"):
            self._channel.get_cq_event(self._cq)
            self._cq.ack_events(1)

    def close(self) -> None:
        while self._closers:
            self._closers.pop()()

    def _open(self, num_completions: int) -> None:
        self.context = Context(name=self.port.device)
        self._closers.append(self.context.close)
        self.pd = PD(self.context)
        self._closers.append(self.pd.close)
        before = _event_fds()
        self._channel = CompChannel(self.context)
        self._closers.append(self._channel.close)
        fd = getattr(self._channel, "fd", None)
        self.event_fd = int(fd) if fd is not None else (_event_fds() - before).pop()
        self._cq = CQ(self.context, num_completions, None, self._channel, 0)
        self._closers.append(self._cq.close)


class PyRegion(Region):
    """A memory region; its keys outlive it here, as pyverbs's own would not."""

    def __init__(self, mr: Any, base: int) -> None:
        self.base = base
        self.lkey, self.rkey = int(mr.lkey), int(mr.rkey)
        self._mr = mr

    def close(self) -> None:
        mr, self._mr = self._mr, None
        if mr is not None:
            mr.close()


class PyQueuePair(QueuePair):
    """A reliable connection."""

    def __init__(self, adapter: PyAdapter, qp: Any, gid_index: int, inline_bytes: int) -> None:
        self._adapter = adapter
        self._qp = qp
        self._gid_index = gid_index
        self.inline_bytes = inline_bytes
        self.number = int(qp.qp_num)
        self._lkey = self._rkey = 0
        attributes = QPAttr(port_num=adapter.port.number)
        attributes.pkey_index = 0
        attributes.qp_access_flags = _access(True)
        try:
            qp.to_init(attributes)
        except PyverbsError:
            self.close()
            raise

    def post_receive(self, wr_id: int) -> None:
        request = self._adapter.receive
        request.wr_id = wr_id
        try:
            self._qp.post_recv(request)
        except PyverbsError as error:
            raise _failure("cannot post a receive", error) from error

    def connect(self, psn: int, remote: Remote, wire: Wire, lkey: int, rkey: int) -> None:
        self._lkey, self._rkey = lkey, rkey
        port = self._adapter.port
        attributes = QPAttr(port_num=port.number)
        attributes.path_mtu = wire.mtu
        attributes.dest_qp_num, attributes.rq_psn, attributes.sq_psn = remote.qp_number, remote.psn, psn
        attributes.max_dest_rd_atomic = attributes.max_rd_atomic = 1
        attributes.min_rnr_timer = 12  # 0.64 ms; receives are posted ahead, so it is never needed
        attributes.timeout, attributes.retry_cnt, attributes.rnr_retry = wire.timeout, wire.retry_count, wire.rnr_retry
        route = GlobalRoute(
            dgid=GID(ipaddress.IPv6Address(remote.gid).exploded),
            sgid_index=self._gid_index,
            hop_limit=64,
            traffic_class=wire.traffic_class,
        )
        attributes.ah_attr = AHAttr(gr=route, is_global=1, port_num=port.number, sl=wire.service_level, dlid=remote.lid)
        with _explained(f"cannot connect to GID {remote.gid} from GID index {self._gid_index} of {port.device}"):
            self._qp.to_rtr(attributes)
            self._qp.to_rts(attributes)

    def post_frame(
        self,
        wr_id: int,
        signalled: bool,
        source: int,
        target: int,
        head: int,
        size: int,
        imm: int,
        rows: RowSource | None = None,
    ) -> None:
        adapter, lkey, rkey = self._adapter, self._lkey, self._rkey
        flags = _SIGNALLED if signalled else 0
        if head <= self.inline_bytes:
            flags |= _INLINE
        entry = adapter.head.entry
        entry.addr, entry.length, entry.lkey = source, head, lkey
        first = request = adapter.head.request
        request.wr_id, request.send_flags, request.imm_data = wr_id, flags, htonl(imm)
        request.set_wr_rdma(rkey, target)
        if size > head:
            start = head if rows is None else head + rows.num_bytes
            adapter.body.place(source + start, size - start, lkey)
            first = adapter.body.request
            first.wr_id = wr_id
            first.set_wr_rdma(rkey, target + start)
        if rows is not None:
            adapter.rows.place(rows.base, rows.num_bytes, rows.lkey)
            first = adapter.rows.request
            first.wr_id = wr_id
            first.set_wr_rdma(rkey, target + head)
        try:
            self._qp.post_send(first)
        except PyverbsError as error:
            raise _failure("cannot post a write", error) from error

    def post_probe(self, wr_id: int) -> None:
        probe = self._adapter.probe
        probe.place(0, 0, self._lkey)
        probe.request.wr_id, probe.request.send_flags = wr_id, _SIGNALLED
        probe.request.set_wr_rdma(self._rkey, 0)
        probe.request.num_sge = 0
        with _explained("cannot post a write"):
            self._qp.post_send(probe.request)

    def close(self) -> None:
        qp, self._qp = self._qp, None
        if qp is not None:
            qp.close()


class _SendRequest:
    """A work request and its scatter entry, for ever."""

    def __init__(self, request: Any, entry: Any) -> None:
        self.request = request
        self.entry = entry

    def place(self, address: int, length: int, lkey: int) -> None:
        self.entry.addr, self.entry.length, self.entry.lkey = address, length, lkey


def _send_request(opcode: int) -> _SendRequest:
    entry = SGE(0, 0, 0)
    request = SendWR(opcode=opcode, num_sge=1, sg=[entry], send_flags=0)
    request.sg_list = entry  # from now on a change of the entry is a change of the request
    return _SendRequest(request, entry)


def _access(remote: bool) -> int:
    return int(e.IBV_ACCESS_LOCAL_WRITE) | (int(e.IBV_ACCESS_REMOTE_WRITE) if remote else 0)


def _ports_of(name: str, context: Any) -> list[Port]:
    device = context.query_device()
    gids = [
        (entry.port_num, Gid(int(entry.gid_index), GidKind(int(entry.gid_type)), str(entry.gid_str())))
        for entry in context.query_gid_table(_MAX_GIDS)
    ]
    folder = f"/sys/class/infiniband/{name}/device"
    pci_path = os.path.realpath(folder) if os.path.exists(folder) else ""
    found = []
    for number in range(1, device.phys_port_cnt + 1):
        attributes = context.query_port(number)
        found.append(
            Port(
                device=name,
                number=number,
                active=attributes.state == e.IBV_PORT_ACTIVE,
                ethernet=attributes.link_layer == _ETHERNET,
                mtu=int(attributes.active_mtu),
                lid=int(attributes.lid),
                max_message_bytes=int(attributes.max_msg_sz),
                max_completions=int(device.max_cqe),
                gids=tuple(gid for port_number, gid in gids if port_number == number),
                pci_path=pci_path,
            )
        )
    return found


def _event_fds() -> set[int]:
    """Descriptors of completion channels: older releases do not tell theirs."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "infinibandevent" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
    return found


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Failures of verbs as TransportError. Not for the data path: a `with` costs as much as a post."""
    try:
        yield
    except PyverbsError as error:
        raise _failure(what, error) from error


def _failure(what: str, error: Exception) -> TransportError:
    """The failure as an error; for the common one, what to do about it."""
    advice = ""
    if getattr(error, "error_code", 0) == errno.ENOMEM:
        advice = " (locked-memory limit? see `ulimit -l`, LimitMEMLOCK=, or the container's ulimits)"
    return TransportError(f"{what}: {error}{advice}")
