"""`python -m stepmesh doctor`: what this host can do for a mesh, and what to fix.

`facts.read_facts` looks, `findings` judges and is pure. A finding is good (OK), worth knowing (INFO), costs speed or
comfort (WARN), or keeps a mesh from working (FAIL); WARN and FAIL say what to do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from stepmesh.cli import topo
from stepmesh.cli.facts import Facts, read_facts

OK, INFO, WARN, FAIL = "ok", "info", "warn", "fail"

_MIN_FDS = 4096
_MIN_SOCKET_BYTES = 4 << 20
_UNLIMITED = -1


class Finding(NamedTuple):
    """One line of the report. `fix` is empty when there is nothing to do."""

    level: str
    what: str
    found: str
    fix: str = ""


def examine(root: Path = Path("/")) -> list[Finding]:
    """Look at this host and judge."""
    return findings(read_facts(root))


def findings(facts: Facts) -> list[Finding]:
    """All of them, in a fixed order."""
    parts: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
        _platform,
        _processor,
        _shared_memory,
        _sockets,
        _rdma_software,
        _rdma_ports,
        _device_memory,
        _memory,
        _clock,
    )
    return [finding for part in parts for finding in part(facts)]


def text(found: list[Finding]) -> str:
    """The findings for people: problems stand out, each with its fix."""
    lines = []
    for finding in found:
        lines.append(f"{finding.level:>5}  {finding.what}: {finding.found}")
        if finding.fix:
            lines.append(f"       -> {finding.fix}")
    counts = {level: sum(finding.level == level for finding in found) for level in (FAIL, WARN)}
    lines.append(f"{counts[FAIL]} to fix, {counts[WARN]} to improve")
    return "\n".join(lines)


def _platform(facts: Facts) -> Iterator[Finding]:
    system = f"Linux {facts.kernel} {facts.machine}, Python {facts.python}, numpy {facts.numpy}"
    if facts.is_linux:
        yield Finding(OK, "system", system)
    else:
        yield Finding(
            FAIL, "system", f"{sys.platform}: shm, tcp and verbs need Linux", "run it on Linux, or in a container"
        )


def _processor(facts: Facts) -> Iterator[Finding]:
    cores = f"{facts.num_cores} of {facts.num_host_cores} usable"
    if facts.num_cores < 2:
        fix = "give the process two cores or more: a poll that spins keeps its peer from running"
        yield Finding(WARN, "cores", cores, fix)
    else:
        yield Finding(OK, "cores", cores)
    if facts.cpu_quota_cores is not None and facts.cpu_quota_cores < facts.num_cores:
        fix = "raise the container's CPU limit or set none: throttling shows as pauses of tens of milliseconds"
        yield Finding(WARN, "CPU quota", f"{facts.cpu_quota_cores:g} cores of {facts.num_cores}", fix)
    if facts.governor and facts.governor != "performance":
        fix = "cpupower frequency-set -g performance (a core that sleeps deeply adds to every wake-up)"
        yield Finding(WARN, "CPU governor", facts.governor, fix)


def _shared_memory(facts: Facts) -> Iterator[Finding]:
    if facts.shm_problem:
        fix = "nothing to do on other processors; in a container allow memfd_create, eventfd and UNIX sockets"
        yield Finding(WARN, "shm", f"not offered, same-host pairs use tcp: {facts.shm_problem}", fix)
    else:
        yield Finding(OK, "shm", "sealed memfd, eventfd and abstract UNIX sockets work (/dev/shm is not used)")


def _sockets(facts: Facts) -> Iterator[Finding]:
    if facts.max_fds != _UNLIMITED and facts.max_fds < _MIN_FDS:
        fix = f"ulimit -n {_MIN_FDS} or LimitNOFILE= in the unit (a pair takes up to four descriptors)"
        yield Finding(WARN, "open files", f"limit {facts.max_fds}", fix)
    else:
        yield Finding(OK, "open files", f"limit {_limit(facts.max_fds)}")
    for name, value in (("net.core.rmem_max", facts.rmem_max), ("net.core.wmem_max", facts.wmem_max)):
        if 0 < value < _MIN_SOCKET_BYTES:
            yield Finding(
                INFO, name, f"{value} bytes", f"for tcp between hosts of 100 Gb/s: sysctl -w {name}={64 << 20}"
            )
    slow = [net for net in facts.host.networks if net.up and net.device and 0 < net.speed_mbps < 10_000]
    for net in slow:
        yield Finding(
            INFO, f"network {net.name}", f"{net.speed_mbps / 1000:g} Gb/s: tcp between hosts will not be faster"
        )
    for net in facts.host.networks:
        if net.up and net.device and net.speed_mbps >= 10_000 and net.mtu < 4200:
            fix = f"ip link set {net.name} mtu 9000, on the switch as well (RoCE's 4096-byte MTU needs 4200)"
            yield Finding(WARN, f"network {net.name}", f"mtu {net.mtu} at {net.speed_mbps / 1000:g} Gb/s", fix)


def _rdma_software(facts: Facts) -> Iterator[Finding]:
    if not facts.host.ports:
        yield Finding(INFO, "RDMA", "no device; pairs between hosts use tcp")
        return
    if facts.pyverbs_problem:
        fix = "install pyverbs of the same release as rdma-core (Debian: apt install python3-pyverbs)"
        yield Finding(FAIL, "pyverbs", facts.pyverbs_problem, fix)
    else:
        yield Finding(OK, "pyverbs", facts.pyverbs)
    if not facts.uverbs:
        fix = "modprobe ib_uverbs; in a container pass /dev/infiniband (Kubernetes: an RDMA device plugin)"
        yield Finding(FAIL, "/dev/infiniband", "no uverbs device", fix)
    elif not facts.uverbs_usable:
        fix = "let the user read and write /dev/infiniband/uverbs* (group rdma, or a udev rule)"
        yield Finding(FAIL, "/dev/infiniband", "no permission", fix)
    if facts.max_locked_bytes != _UNLIMITED:
        fix = "ulimit -l unlimited, LimitMEMLOCK=infinity in the unit (for a container: its runtime's)"
        yield Finding(
            WARN, "locked memory", f"limit {facts.max_locked_bytes >> 10} KiB: slots cannot be registered", fix
        )
    else:
        yield Finding(OK, "locked memory", "unlimited")


def _rdma_ports(facts: Facts) -> Iterator[Finding]:
    for port in facts.host.ports:
        name = f"port {port.name}"
        state = f"{port.state}, {port.rate}, {port.link_layer}"
        devices = ",".join(port.netdevs) or "its network device"
        if not topo.is_active(port):
            yield Finding(WARN, name, state, f"check the cable and the switch port; ip link set {devices} up")
            continue
        yield Finding(OK, name, state)
        if port.link_layer != "Ethernet":
            continue
        routable = [gid for gid in port.gids if "v2" in gid[1]]
        if not routable:
            yield Finding(FAIL, name, "no RoCE v2 GID", f"give {devices} an address (ip address add ... dev {devices})")
        else:
            yield Finding(OK, name, f"{len(routable)} RoCE v2 GIDs, first index {routable[0][0]} {routable[0][2]}")


def _device_memory(facts: Facts) -> Iterator[Finding]:
    if not facts.host.accelerators:
        yield Finding(INFO, "accelerators", "none; rows live in host memory")
        return
    for one in facts.host.accelerators:
        near = topo.nearest(one, facts.host.ports)
        if near is None:
            yield Finding(INFO, one.name, "no RDMA port to go with it")
        else:
            yield Finding(OK, one.name, f"nearest port {near.name}")
    if not facts.host.ports:
        return
    if facts.peermem:
        yield Finding(OK, "GPU memory registration", f"module {facts.peermem}")
    elif facts.has_cuda and facts.kernel_release >= (5, 12):
        yield Finding(
            INFO, "GPU memory registration", "by dma-buf, where the driver's kernel modules are the open ones"
        )
    else:
        fix = "modprobe nvidia-peermem, or Linux 5.12 and the open NVIDIA modules for dma-buf"
        yield Finding(WARN, "GPU memory registration", "none: rows are staged through host memory", fix)


def _memory(facts: Facts) -> Iterator[Finding]:
    if facts.memory_limit_bytes is not None:
        yield Finding(INFO, "memory", f"this control group's limit is {facts.memory_limit_bytes >> 20} MiB")
    pages = (
        f"{facts.huge_pages_free} of {facts.huge_pages} huge pages free, shmem_enabled {facts.shmem_huge or 'unknown'}"
    )
    yield Finding(INFO, "huge pages", f"{pages} (not required)")


def _clock(facts: Facts) -> Iterator[Finding]:
    if facts.clock_source in ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page"):
        yield Finding(OK, "clock", f"{facts.clock_source}, {facts.clock_read_ns:.0f} ns to read")
    elif facts.clock_source:
        fix = "boot with clocksource=tsc tsc=reliable where the processor's is: every time stamp costs this"
        yield Finding(WARN, "clock", f"{facts.clock_source}, {facts.clock_read_ns:.0f} ns to read", fix)


def _limit(value: int) -> str:
    return "unlimited" if value == _UNLIMITED else str(value)
