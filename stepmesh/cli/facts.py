"""What `doctor` looks at: plain values read from /proc, /sys, limits and a few harmless tries."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import resource
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from stepmesh.cli.topo import Host, read_host
from stepmesh.errors import MeshError
from stepmesh.transports.shm import unsupported_reason
from stepmesh.transports.sockets import listen_unix

_CLOCK_READS = 2000
_PEER_MODULES = ("nvidia_peermem", "nv_peer_mem", "amdgpu_peermem")


@dataclass(frozen=True, slots=True)
class Facts:
    """One host, as this process sees it. Limits: -1 is unlimited; sizes in bytes."""

    is_linux: bool
    kernel: str
    kernel_release: tuple[int, int]
    machine: str
    python: str
    numpy: str
    num_cores: int
    num_host_cores: int
    cpu_quota_cores: float | None
    governor: str
    shm_problem: str
    max_fds: int
    max_locked_bytes: int
    rmem_max: int
    wmem_max: int
    memory_limit_bytes: int | None
    huge_pages: int
    huge_pages_free: int
    shmem_huge: str
    clock_source: str
    clock_read_ns: float
    pyverbs: str
    pyverbs_problem: str
    uverbs: tuple[str, ...]
    uverbs_usable: bool
    peermem: str
    has_cuda: bool
    host: Host


def read_facts(root: Path = Path("/")) -> Facts:
    """Look around. Never raises for what is missing; leaves nothing behind."""
    proc, sys_folder, dev = root / "proc", root / "sys", root / "dev"
    meminfo = _table(proc / "meminfo")
    uverbs = tuple(sorted(str(path) for path in (dev / "infiniband").glob("uverbs*")))
    pyverbs, pyverbs_problem = _pyverbs()
    modules = _text(proc / "modules")
    return Facts(
        is_linux=sys.platform.startswith("linux"),
        kernel=platform.release(),
        kernel_release=_release(platform.release()),
        machine=platform.machine(),
        python=platform.python_version(),
        numpy=np.__version__,
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        num_host_cores=os.cpu_count() or 1,
        cpu_quota_cores=_cpu_quota(_text(sys_folder / "fs/cgroup/cpu.max")),
        governor=_text(sys_folder / "devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        shm_problem=_try_shm(),
        max_fds=_limit(resource.RLIMIT_NOFILE),
        max_locked_bytes=_limit(resource.RLIMIT_MEMLOCK),
        rmem_max=_number(_text(proc / "sys/net/core/rmem_max")),
        wmem_max=_number(_text(proc / "sys/net/core/wmem_max")),
        memory_limit_bytes=_number(_text(sys_folder / "fs/cgroup/memory.max")) or None,
        huge_pages=meminfo.get("HugePages_Total", 0),
        huge_pages_free=meminfo.get("HugePages_Free", 0),
        shmem_huge=_chosen(_text(sys_folder / "kernel/mm/transparent_hugepage/shmem_enabled")),
        clock_source=_text(sys_folder / "devices/system/clocksource/clocksource0/current_clocksource"),
        clock_read_ns=_clock_read_ns(),
        pyverbs=pyverbs,
        pyverbs_problem=pyverbs_problem,
        uverbs=uverbs,
        uverbs_usable=bool(uverbs) and all(os.access(path, os.R_OK | os.W_OK) for path in uverbs),
        peermem=next((name for name in _PEER_MODULES if f"{name} " in modules), ""),
        has_cuda=(dev / "nvidiactl").exists(),
        host=read_host(root),
    )


def _try_shm() -> str:
    """Why shared memory cannot be used here, found by using it; empty when it can."""
    problem = unsupported_reason()
    if problem is not None:
        return problem
    try:
        os.close(os.memfd_create("stepmesh-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.close(os.eventfd(0, os.EFD_CLOEXEC))
        listen_unix(f"stepmesh-doctor-{os.getpid()}").close()
    except (OSError, MeshError) as error:
        return str(error)
    return ""


def _pyverbs() -> tuple[str, str]:
    """(what was found, why it cannot be used). Only looked for: one of a wrong release could crash the doctor."""
    if importlib.util.find_spec("pyverbs") is None:
        return "", "not installed"
    with contextlib.suppress(PackageNotFoundError):
        return f"release {version('pyverbs')}", ""
    return "installed with the system's rdma-core", ""


def _clock_read_ns() -> float:
    began = time.perf_counter_ns()
    for _ in range(_CLOCK_READS):
        time.monotonic()
    return (time.perf_counter_ns() - began) / _CLOCK_READS


def _limit(kind: int) -> int:
    soft, _ = resource.getrlimit(kind)
    return -1 if soft == resource.RLIM_INFINITY else soft


def _cpu_quota(text: str) -> float | None:
    """cgroup 2's "max 100000" or "150000 100000"."""
    words = text.split()
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        return None
    return int(words[0]) / int(words[1])


def _release(kernel: str) -> tuple[int, int]:
    parts = kernel.split(".")
    return (_number(parts[0]), _number(parts[1])) if len(parts) > 1 else (0, 0)


def _chosen(text: str) -> str:
    """The bracketed word of "always within_size [never]"."""
    _, _, rest = text.partition("[")
    return rest.partition("]")[0]


def _table(path: Path) -> dict[str, int]:
    """ "Name:   123 kB" lines."""
    table = {}
    for line in _text(path).splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            table[name] = int(words[0])
    return table


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
